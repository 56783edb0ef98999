"""What does skipping save on the clock? Writes docs/results/skipping.json; benchmarks/results.py makes the page.

python benchmarks/skipping.py                           # ResNet-50 at 224 pixels, random gates; minutes
python benchmarks/skipping.py --trained NAME=RUN=DATA   # and a trained model under its own gates; may be repeated

ResNet-50 has gates at all sites, drawn for each image and gate by itself, so no two images of a batch agree: the
hardest case. All engines take turns in one process. Times of skipping contain the reading of the gates, and for trained
models the gater.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pretrained_cifar_resnet import ResNet

import gaternet
from gaternet.checkpoint import load_model, read_json
from gaternet.data import Preprocessing, load_data
from gaternet.evaluate import load_test_set
from gaternet.graph import read_graph
from gaternet.method import GaterNet
from gaternet.run import describe_machine, find_model
from gaternet.skipping import Skipper
from gaternet.skipping.bench import Timing, bench
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.planner import make_plan
from gaternet.skipping.specialise import Specialised

RESULT = Path(__file__).parents[1] / "docs" / "results" / "skipping.json"
DENSITIES = (1.0, 0.75, 0.5, 0.25)


def resnet50(group_size: int = 1) -> GaterNet:
    """timm's ResNet-50 with fresh weights; time does not depend on them."""
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model("resnet50").eval()
    return gaternet.gate(backbone, torch.zeros(1, 3, 224, 224), sites="all", group_size=group_size).eval()


def rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """Timings as plain data, each with its time over that of the fastest dense engine."""
    found = []
    for timing in timings:
        dense = min(t.median for t in timings if t.batch == timing.batch and t.name.startswith("dense"))
        found.append({**asdict(timing), "over_dense": timing.median / dense})
    return found


def planning(model: GaterNet) -> dict[str, Any]:
    """Seconds to plan, to save and to load; bytes of weights, dense and in the engine."""
    images, dense = torch.zeros(1, 3, 224, 224), sum(p.numel() * 4 for p in model.backbone.parameters())
    began = time.perf_counter()
    fast = gaternet.skip(model, images, "slice")
    planned = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as directory:
        fast.save(directory)
        began = time.perf_counter()
        Skipper.load(directory)
        loaded = time.perf_counter() - began
    program = NativeProgram(make_plan(read_graph(model.backbone, images), model.sites))
    program(images, torch.ones(1, model.num_gates))
    return {
        "plan_seconds": planned,
        "load_seconds": loaded,
        "dense_bytes": dense,
        "weight_bytes": program.weight_bytes,
        "arena_bytes": program.arena_bytes,
    }


def trained(name: str, run: str, data: str, rounds: int) -> dict[str, Any]:
    """A trained model under its own gates, with its accuracy masked and skipped on the test images."""
    folder = find_model(Path(run))
    theirs = not (read_json(folder / "config.json").get("metadata") or {}).get("backbone")  # of benchmarks/finetune.py
    backbone = ResNet((int(name.removeprefix("resnet")) - 2) // 6) if theirs else None
    model, metadata = load_model(folder, backbone=backbone)
    assert isinstance(model, GaterNet)
    preprocessing = Preprocessing.from_metadata(metadata)
    test, train = load_test_set(data, metadata), load_data(data, image_size=preprocessing.height).train
    images = preprocessing.normalize(torch.stack([torch.as_tensor(test[i][0]) for i in range(len(test))]))
    labels = torch.tensor([test[i][1] for i in range(len(test))])
    seen = preprocessing.normalize(torch.stack([torch.as_tensor(train[i][0]) for i in range(0, len(train), 10)]))
    fast = gaternet.skip(model, images[:64], "slice")
    calibration = torch.cat([fast.gates(part) for part in seen.split(64)])
    special = gaternet.skip(model, images[:64], "specialise", calibration=calibration)
    assert isinstance(special.program, Specialised)
    with torch.no_grad():
        logits = {
            way: torch.cat([run(part) for part in images.split(64)])
            for way, run in (("masked", model), ("skipped", fast), ("specialised", special))
        }
    gates = torch.cat([fast.gates(part) for part in images.split(64)])
    timings = []
    for batch in (1, 64):
        timings += bench(model, images[:batch], calibration=calibration, rounds=rounds)
    return {
        "model": name,
        "data": Path(data).stem,
        "images": len(test),
        "right": {way: int((found.argmax(1) == labels).sum()) for way, found in logits.items()},
        "density": gates.mean().item(),
        "kept": [kept.float().mean().item() for kept in special.program.kept],
        "fitting": (special.program.choose(gates) < len(special.program.kept)).float().mean().item(),
        "timings": rows(timings),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", action="append", default=[], help="NAME=RUN=DATA")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only-trained", action="store_true", help="keep what is recorded of ResNet-50")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if not args.only_trained:
        images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        model = resnet50()
        timings = []
        for batch in (1, 16):
            timings += bench(model, images[:batch], DENSITIES, rounds=args.rounds, seconds=1.0, note=print)
        found["resnet50"] = rows(timings)
        found["planning"] = planning(model)
        groups = {}
        for size in (1, 4, 8, 16):
            timings = bench(resnet50(size), images[:1], (0.5,), ("openvino",), rounds=args.rounds, note=print)
            groups[str(size)] = rows(timings)
        found["groups"] = groups
    if args.trained:
        found["trained"] = [trained(*given.split("=", 2), rounds=args.rounds) for given in args.trained]
    command = "python benchmarks/skipping.py" + "".join(
        f" --trained {given.split('=')[0]}={Path(given.split('=')[1]).name}={Path(given.split('=')[2]).name}"
        for given in args.trained
    )
    found |= {**describe_machine(), "command": command, "rounds": args.rounds}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    for row in [*found["resnet50"], *(row for model in found.get("trained", []) for row in model["timings"])]:
        density = "" if row["density"] is None else f"{row['density']:.2f}"
        print(f"{row['name']:24} {row['batch']:3} {density:5} {row['median']:8.2f} ms  x dense {row['over_dense']:.3f}")


if __name__ == "__main__":
    main()
