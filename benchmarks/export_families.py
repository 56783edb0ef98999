"""Export every family of CNNs and every model of the paper's tables, gated, and compare each file with its model.

python benchmarks/export_families.py             # what docs/results/export.json does not hold yet; then docs/export.md
python benchmarks/export_families.py NAME...     # these anew
python benchmarks/export_families.py --page      # the page alone

Families are those of benchmarks/families.py with gates at all sites; a model of the tables has its own. Each is written
to ONNX, in the masked and in the skipping form, and to .pt2. Rows are kept as they are made, so it can be cut.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import families
import torch
from tables import DOCS, RESULTS
from torch import Tensor

import gaternet
from gaternet.export import ExportError
from gaternet.export.parity import Parity
from gaternet.export.to_onnx import OPSET
from gaternet.models.create import create_backbone
from gaternet.models.imagenet import IMAGENET
from gaternet.provenance import describe_machine

RESULT, PAGE = RESULTS / "export.json", DOCS / "export.md"
EXPORTS: dict[str, Callable[..., Parity]] = {
    "ONNX": gaternet.export_onnx,
    "ONNX, skipping": partial(gaternet.export_onnx, form="skipping"),
    ".pt2": gaternet.export_pt2,
}


def export(name: str) -> dict[str, Any]:
    """The model's row: how each file compared, or why there is none."""
    torch.manual_seed(0)
    model, images = build(name)
    row: dict[str, Any] = {"model": name, "pixels": images.shape[-1], "gates": model.num_gates}
    with tempfile.TemporaryDirectory() as directory:
        for kind, write in EXPORTS.items():
            try:
                parity = write(model, images, Path(directory) / "file", gates=True)
            except ExportError as error:
                row[kind] = str(error)
            else:
                row[kind] = {"patterns": parity.patterns, "max_error": parity.max_error}
    return row


def build(name: str) -> tuple[gaternet.GaterNet, Tensor]:
    """The gated model, unsettled so that a wrong gate shows, and an example of its images."""
    if ":" not in name:
        side = 96 if name.removesuffix("_gated") in IMAGENET else 32
        model: Any = gaternet.create_model(name, 10).eval()
        families.unsettle_(model.backbone)
        return model, torch.randn(2, 3, side, side)
    backbone = create_backbone(name, 10).eval()
    families.unsettle_(backbone)
    images = families.example_for(backbone)
    sites = gaternet.find_sites(backbone, images, "all")
    return families.small_gater_net(backbone, sites).eval(), images


def names() -> list[str]:
    """Of the tables' gated models and of the families, those that are fast to check first."""
    rows = sorted(json.loads(families.MODELS.read_text()), key=lambda row: row["seconds"])
    return [name for name in gaternet.model_names() if name.endswith("_gated")] + [row["model"] for row in rows]


def read() -> dict[str, dict[str, Any]]:
    """The rows so far, by model."""
    return {row["model"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}


def keep(rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows in the order of `names`."""
    ordered = [rows[name] for name in names() if name in rows]
    head = {name: value for name, value in describe_machine().items() if name in ("versions", "commit")}
    lines = ",\n".join(json.dumps(row) for row in ordered)
    RESULT.write_text(f'{{"made": {json.dumps(head)},\n"rows": [\n{lines}\n]}}\n')


def page() -> str:
    """docs/export.md."""
    data = json.loads(RESULT.read_text())
    rows, versions = data["rows"], data["made"]["versions"]
    counts = {kind: sum(isinstance(row[kind], dict) for row in rows) for kind in EXPORTS}
    missing = len(names()) - len(rows)
    text = (
        "# Export\n\n"
        f"{len(rows)} gated networks, exported and compared by `python benchmarks/export_families.py` with gaternet "
        f"{versions['gaternet']}, torch {versions['torch']}; ONNX opset {OPSET}."
        + (f" {missing} more are not measured." if missing else "")
        + "\n\nExported and equal: "
        + ", ".join(f"{count} to {kind}" for kind, count in counts.items())
        + ".\n\nEach file ran on 16 images of noise and under 7 gate patterns drawn at random, of all densities. Gates "
        "were the model's; the table has the largest difference of a logit, relative to the largest logit where that "
        "is above 1 (1e-4 is allowed). *Patterns* is how many of the 16 images had different gates.\n\n"
    )
    text += "| model | pixels | gates | patterns | " + " | ".join(EXPORTS) + " |\n|---|---:|---:|---:|---:|---:|---:|\n"
    reasons: Counter[str] = Counter()
    for row in rows:
        cells = [f"`{row['model']}`", f"{row['pixels']}", f"{row['gates']:,}"]
        found = [row[kind] for kind in EXPORTS]
        cells.append(str(max((item["patterns"] for item in found if isinstance(item, dict)), default="")))
        for kind, item in zip(EXPORTS, found, strict=True):
            cells.append(f"{item['max_error']:.0e}" if isinstance(item, dict) else "no")
            if isinstance(item, str):
                reasons[f"`{row['model']}`, {kind}: {item}"] += 1
        text += "| " + " | ".join(cells) + " |\n"
    return text + ("\nWhy not:\n\n" + "".join(f"- {reason}\n" for reason in reasons) if reasons else "")


def main() -> None:
    """Export, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    rows = read()
    wanted = args.models or ([] if args.page else [name for name in names() if name not in rows])
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), partial(torch.set_num_threads, 1)) as pool:
        running = [pool.submit(export, name) for name in wanted]
        for done in as_completed(running):
            row = done.result()
            rows[row["model"]] = row
            keep(rows)
            print(json.dumps(row), flush=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
