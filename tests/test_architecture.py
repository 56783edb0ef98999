"""The house's rules: imports point one way, files stay small, heavy imports come late."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gaternet

ROOT = Path(__file__).parents[1]
SOURCE = Path(gaternet.__file__).parent
# Each may import those before it, and nothing after it.
FLOORS = [
    "errors",
    "files",
    "locks",
    "recipe",
    "method",
    "modes",
    "sessions",
    "aliasing",
    "graph",
    "channels",
    "sites",
    "cost",
    "models.common",
    "models.cifar_resnet",
    "models.densenet",
    "models.shake_shake",
    "models.imagenet",
    "models.create",
    "models",
    "gating",
    "card",
    "checkpoint",
    "official",
    "skipping.plan",
    "skipping.checks",
    "skipping.saved",
    "skipping.stacking",
    "skipping.lifetimes",
    "skipping.planner",
    "skipping.kernels",
    "skipping.triton_kernels",
    "skipping.program",
    "skipping.native.library",
    "skipping.native.memory",
    "skipping.native.operations",
    "skipping.native.segment",
    "skipping.native.program",
    "skipping.native",
    "skipping.engines",
    "skipping.specialise",
    "skipping.skip",
    "skipping.dense",
    "skipping.bench",
    "skipping",
    "recipes",
    "objective",
    "augment",
    "arrays",
    "folders",
    "data",
    "loader",
    "export.parity",
    "export.gathered",
    "export.source",
    "export.exported",
    "export.to_onnx",
    "export.to_pt2",
    "export.int8",
    "export",
    "run",
    "machine",
    "evaluate",
    "network",
    "measures",
    "findings",
    "analysis",
    "forcing",
    "report.reading",
    "report.figures",
    "report.numbers",
    "report.page",
    "report.comparison",
    "report",
    "report.runs",
    "explore",
    "state",
    "progress",
    "predict",
    "export.saved",
    "step",
    "preparation",
    "train",
    "ledger",
    "sweep",
    "cli.common",
    "cli.training",
    "cli.using",
    "cli.exporting",
    "cli",
    "__main__",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def top_level_imports(path: Path) -> set[str]:
    """Modules of ours that are imported when `path` is; imports within functions come later and do not count."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gaternet":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.removeprefix("gaternet.") for name in names}
    known = set(FLOORS)
    found.discard("__version__")
    return {name if name in known else name.rsplit(".", 1)[0] for name in found}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    if name == "__init__":
        assert not top_level_imports(path)
        return
    assert name in FLOORS, "give the new module its place in FLOORS"
    for imported in top_level_imports(path):
        assert FLOORS.index(imported) < FLOORS.index(name), f"{name} imports {imported}"


def test_files_stay_small_enough_to_read():
    paths = [*SOURCE.rglob("*.py"), *(path for name in ("tests", "benchmarks") for path in (ROOT / name).glob("*.py"))]
    lengths = {path.name: len(path.read_text().splitlines()) for path in paths}
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
    for name in gaternet.__all__:
        assert getattr(gaternet, name).__doc__
    assert set(gaternet.__all__) <= set(dir(gaternet))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gaternet.nonsense  # pyright: ignore[reportAttributeAccessIssue]
