"""The house's rules: imports point one way, files stay small, heavy imports come late."""

import ast
import graphlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gaternet

ROOT = Path(__file__).parents[1]
SOURCE = Path(gaternet.__file__).parent
# The layers, lowest first: a module may import those of its own layer and of lower ones, but for circles.
LAYERS = [
    {"errors", "files", "locks", "recipe"},
    {"method"},
    {"modes", "wrapping", "sessions", "aliasing", "graph", "channels", "sites", "cost", "models", "leaks", "gating"},
    {"card", "checkpoint", "official", "skipping"},
    {"recipes", "objective", "augment", "arrays", "folders", "data", "loader"},
    {"measures", "findings", "provenance", "machine", "run", "trained", "evaluate", "network", "export"},
    {"analysis", "forcing", "report", "explore", "predict"},
    {"state", "progress", "step", "preparation", "train", "ledger", "jobs", "sweep"},
    {"cli", "__main__"},
]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def top_level_imports(path: Path) -> set[str]:
    """Modules of ours that are imported when `path` is; imports within functions come later and do not count."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gaternet":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.removeprefix("gaternet.") for name in names}
    known = set(map(module_name, SOURCE.rglob("*.py")))
    found.discard("__version__")
    return {name if name in known else name.rsplit(".", 1)[0] for name in found}


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    imported = top_level_imports(MODULES[name])
    if name in ("__init__", "method"):
        assert not imported
        return
    assert name.split(".")[0] in LAYER, "give the new module its place in LAYERS"
    for other in imported:
        assert LAYER[other.split(".")[0]] <= LAYER[name.split(".")[0]], f"{name} imports {other}"


def test_no_modules_import_each_other():
    graphlib.TopologicalSorter({name: top_level_imports(path) for name, path in MODULES.items()}).prepare()


def test_the_picture_of_imports_is_theirs():
    """Of what it shows: each arrow follows from imports, and each import from arrows."""
    page = (ROOT / "docs" / "design.md").read_text()
    arrows: dict[str, set[str]] = {}
    for line in re.findall(r"^    (\w.* --> .*)$", page, re.MULTILINE):
        names = [part.split(" & ") for part in line.split(" --> ")]
        for sources, targets in itertools.pairwise(names):
            for source in sources:
                arrows.setdefault(source, set()).update(targets)
    imports: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        package = name.split(".")[0]
        imports.setdefault(package, set()).update(n.split(".")[0] for n in top_level_imports(path))
    shown = arrows.keys() | set().union(*arrows.values())
    assert len(shown) > 30
    for name in shown:
        assert reached(arrows, name) == reached(imports, name) & shown - {name}, name


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Where the edges lead, in one step or several."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found - {start}
        found |= new
        waiting += new
    return found


def test_files_stay_small_enough_to_read():
    paths = [path for ending in ("py", "cpp", "h", "js") for path in SOURCE.rglob(f"*.{ending}")]
    paths += [path for name in ("tests", "benchmarks") for path in (ROOT / name).glob("*.py")]
    lengths = {str(path): len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def imported_by(code: str) -> set[str]:
    """Top-level packages that `code` imports, in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_gaternet_and_the_command_line_is_light():
    assert "torch" not in imported_by("import gaternet")
    assert not {"torch", "numpy", "sklearn"} & imported_by("import gaternet.cli")
    assert "sklearn" not in imported_by("import gaternet.train")


def test_public_names_are_there():
    (typed,) = [node for node in ast.parse((SOURCE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    imported = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imported for alias in node.names}
    assert homes == gaternet._HOMES  # what type checkers see
    assert sorted(homes) == sorted(gaternet.__all__)
    for name in gaternet.__all__:
        assert getattr(gaternet, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gaternet.nonsense  # pyright: ignore[reportAttributeAccessIssue]
