"""How fast are exported models? Writes docs/results/export_speed.json; benchmarks/results.py makes the page.

python benchmarks/export.py                            # ResNet-50 at 224 pixels; minutes
python benchmarks/export.py --trained NAME RUN DATA    # and a trained model under its own gates; may be repeated

All run in ONNX Runtime, in turns: the backbone exported without gates, the gated model masked and in its skipping form,
both with the gater's time, and the plain and the masked one in 8 bits. ResNet-50 has gates at all sites and a fresh
gater, whose bias is set so that images open the share of gates asked for.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch
from tables import RESULTS
from torch import Tensor

import gaternet
from gaternet.export import ExportedModel, compare_int8, export_onnx, quantize_onnx
from gaternet.method import Gater, GaterNet
from gaternet.provenance import describe_machine
from gaternet.skipping.bench import over, spread, time_interleaved
from gaternet.trained import Trained

RESULT = RESULTS / "export_speed.json"
DENSITIES = (0.75, 0.5, 0.25)


@torch.no_grad()
def open_share_(model: GaterNet, images: Tensor, share: float) -> None:
    """Set the gater's bias so that the images open that share of all gates."""
    gater = model.gater
    assert isinstance(gater, Gater)
    gater.fc2.bias.zero_()
    gater.fc2.bias.fill_(-float(gater.logits(images).quantile(1 - share)))


def time_files(files: dict[str, Path], images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row for each file: milliseconds of a batch, and the time over that of the file "plain"."""
    models = {name: ExportedModel(path) for name, path in files.items()}
    runs = {name: lambda m=model: m.run(images) for name, model in models.items()}
    times = time_interleaved(runs, rounds, 0.5)
    rows = []
    for name, turns in times.items():
        gates = models[name].run(images)[1]
        row = {"name": name, "batch": len(images), "density": None if gates is None else gates.mean().item()}
        row |= dict(zip(("median", "p10", "p90"), spread(turns), strict=True))
        rows.append(row | {"over_plain": over(turns, times["plain"]), "bytes": files[name].stat().st_size})
    return rows


def resnet50(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """timm's, with fresh weights."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 224, 224)
    model = gaternet.gate(timm.create_model("resnet50").eval(), images[:2], sites="all").eval()
    files = {"plain": folder / "plain.onnx"}
    export_onnx(model.backbone, images, files["plain"], held_out=images[:2])
    for share in DENSITIES:
        open_share_(model, images, share)
        for form in ("masked", "skipping"):
            name = f"{form} {share:g}"
            if name != "masked 0.75" and name != "masked 0.25":  # it takes the same time
                files[name] = folder / f"{name}.onnx"
                export_onnx(model, images, files[name], form=form, gates=True, held_out=images[:2])
    for name in ("plain", "masked 0.5"):
        files[f"{name}, 8 bits"] = folder / f"{name}-int8.onnx"
        quantize_onnx(files[name], files[f"{name}, 8 bits"], [images])
    batched = {name: path for name, path in files.items() if "skipping" not in name}
    return time_files(files, images[:1], rounds) + time_files(batched, images, rounds)


def trained(path: Path, source: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A run's model on its test images, with the accuracy in 8 bits."""
    run = Trained.open_gated(path, data=source)
    model, metadata = run.network, run.metadata
    train, test = run.load_sets()
    pixels = test.take(range(16))
    files = {"plain": folder / "plain.onnx", "masked": folder / "masked.onnx", "skipping": folder / "skipping.onnx"}
    export_onnx(model.backbone, pixels, files["plain"], metadata=metadata)
    export_onnx(model, pixels, files["masked"], metadata=metadata, gates=True)
    export_onnx(model, pixels, files["skipping"], metadata=metadata, gates=True, form="skipping")
    step = max(1, len(train) // 512)
    calibration = train.take(range(0, len(train), step)).split(64)
    effects = {}
    for name, original, gater in (
        ("plain, 8 bits", "plain", False),
        ("masked, 8 bits", "masked", False),
        ("masked, gater too in 8 bits", "masked", True),
    ):
        files[name] = folder / f"{name}.onnx"
        quantize_onnx(files[original], files[name], calibration, gater=gater)
        parts = torch.arange(len(test)).split(100)
        batches = ((test.take(part.tolist()), torch.from_numpy(test.labels[part.numpy()])) for part in parts)
        if original != "plain":  # without its gates, the backbone says nothing of use
            effects[name] = asdict(compare_int8(files[original], files[name], batches))
    batched = {name: file for name, file in files.items() if name != "skipping"}
    timings = time_files(files, pixels[:1], rounds) + time_files(batched, pixels, rounds)
    return {"timings": timings, "int8": effects}


def main() -> None:
    """Time, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", nargs=3, action="append", default=[], metavar=("NAME", "RUN", "DATA"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = describe_machine() | {"rounds": args.rounds, "trained": {}}
    given = [["--trained", name, Path(run).parent.name, Path(data).name] for name, run, data in args.trained]
    found["command"] = " ".join(["python benchmarks/export.py", *chain(*given)])
    with tempfile.TemporaryDirectory() as directory:
        found["resnet50"] = resnet50(Path(directory), args.rounds)
    for name, run, data in args.trained:
        with tempfile.TemporaryDirectory() as directory:
            found["trained"][name] = trained(Path(run), data, Path(directory), args.rounds)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
