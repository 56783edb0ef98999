"""What does skipping save on the clock? Writes docs/results/skipping.json; benchmarks/results.py makes the page.

python benchmarks/skipping.py                                 # ResNet-50 at 224 pixels, random gates; minutes
python benchmarks/skipping.py --trained NAME RUN DATA PLAIN   # and a trained model under its own gates; may be repeated
python benchmarks/skipping.py --gpu                           # ResNet-50 on a GPU, to skipping_gpu.json beside it

PLAIN is the run, or the file of weights, of the network without gates: what its accuracy is.

ResNet-50 has gates at all sites, drawn for each image and gate by itself, so no two images of a batch agree: the
hardest case. All engines take turns in one process. Times of skipping contain the reading of the gates, and for trained
models the gater.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pretrained_cifar_resnet import ResNet, load
from tables import RESULTS
from timing_tables import GPU_PRECISIONS

import gaternet
from gaternet.checkpoint import load_model
from gaternet.cost import CostModel
from gaternet.files import read_json, write_json
from gaternet.graph import read_graph
from gaternet.method import GaterNet
from gaternet.provenance import describe_machine
from gaternet.recipe import data_name
from gaternet.skipping import Skipper
from gaternet.skipping.bench import Timing, bench, over, time_interleaved
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.planner import make_plan
from gaternet.skipping.specialise import Specialised, prune
from gaternet.trained import Trained, find_model

RESULT = RESULTS / "skipping.json"
GPU_RESULT = RESULT.with_name("skipping_gpu.json")
DENSITIES = (1.0, 0.75, 0.5, 0.25)
OTHERS = (  # groups, groups with SE, concatenations, depthwise convolutions
    "resnext50_32x4d",
    "regnety_016",
    "densenet121",
    "inception_v4",
    "efficientnet_b0",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
)


def fresh(name: str, group_size: int = 1) -> GaterNet:
    """A network of timm's with fresh weights, on which time does not depend, and with all its filters gated."""
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(name).eval()
    return gaternet.gate(backbone, torch.zeros(1, 3, 224, 224), sites="all", group_size=group_size).eval()


def rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """Timings as plain data."""
    return [asdict(timing) for timing in timings]


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


def bounds(model: GaterNet, rounds: int) -> list[dict[str, float]]:
    """Where the time goes, one image at a time: beside skipping, the same filters as a network that has no others.

    That network copies no weights together, so the difference to it is the copying; what it takes above its share of
    the MACs is what small convolutions and the dense residual stream lose.
    """
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plan = make_plan(read_graph(model.backbone, images), model.sites)
    cost, program = CostModel.of(model, images), NativeProgram(plan)
    opened = torch.ones(1, model.num_gates)
    runs, shares = {"open": lambda: program(images, opened)}, {}
    for density in DENSITIES[1:]:
        gates = (torch.rand(1, model.num_gates, generator=torch.Generator().manual_seed(0)) < density).float()
        pruned = prune(plan, gates[0].bool())
        alone = NativeProgram(replace(pruned, steps=[replace(step, mask=None) for step in pruned.steps]))
        runs[f"skipped {density}"] = lambda gates=gates: program(images, gates)
        runs[f"alone {density}"] = lambda alone=alone: alone(images, opened)
        shares[density] = cost(gates).item() / cost.dense
    times = time_interleaved(runs, 3 * rounds)

    return [
        {"density": density, "macs": share}
        | {way: over(times[f"{way} {density}"], times["open"]) for way in ("alone", "skipped")}
        for density, share in shares.items()
    ]


def trained(name: str, run: str, data: str, plain: str, rounds: int) -> dict[str, Any]:
    """A trained model under its own gates, with its accuracy masked and skipped on the test images."""
    folder = find_model(Path(run))
    theirs = not (read_json(folder / "config.json").get("metadata") or {}).get("backbone")  # of benchmarks/finetune.py
    backbone = ResNet((int(name.removeprefix("resnet")) - 2) // 6) if theirs else None
    before = load(Path(plain)) if theirs else load_model(find_model(Path(plain)))[0]
    model, metadata = load_model(folder, backbone=backbone)
    assert isinstance(model, GaterNet)
    opened = Trained(folder, model, metadata, data)
    preprocessing, (train, test) = opened.preprocessing, opened.load_sets()
    images = preprocessing.normalize(test.take(range(len(test))))
    labels = torch.from_numpy(test.labels)
    seen = preprocessing.normalize(train.take(range(0, len(train), 10)))
    fast = gaternet.skip(model, images[:64], "slice")
    calibration = torch.cat([fast.gates(part) for part in seen.split(64)])
    special = gaternet.skip(model, images[:64], "specialise", calibration=calibration)
    assert isinstance(special.program, Specialised)
    with torch.no_grad():
        logits = {
            way: torch.cat([run(part) for part in images.split(64)])
            for way, run in (("plain", before.eval()), ("masked", model), ("skipped", fast), ("specialised", special))
        }
    gates = torch.cat([fast.gates(part) for part in images.split(64)])
    timings = []
    for batch in (1, 64):
        timings += bench(model, images[:batch], calibration=calibration, rounds=rounds)
    return {
        **describe_machine(),
        "model": name,
        "data": data_name(data),
        "images": len(test),
        "right": {way: int((found.argmax(1) == labels).sum()) for way, found in logits.items()},
        "density": gates.mean().item(),
        "kept": [kept.float().mean().item() for kept in special.program.kept],
        "fitting": (special.program.choose(gates) < len(special.program.kept)).float().mean().item(),
        "command": f"python benchmarks/skipping.py --trained "
        f"{name} {Path(run).name} {Path(data).name} {Path(plain).name} --rounds {rounds}",
        "rounds": rounds,
        "timings": rows(timings),
    }


def on_gpu(rounds: int) -> None:
    """ResNet-50 under random gates on a GPU; what is measured is written at once."""
    found: dict[str, Any] = {**describe_machine(), "command": f"python benchmarks/skipping.py --gpu --rounds {rounds}"}
    found |= {"rounds": rounds, "parts": []}
    for dtype, precision in zip((torch.bfloat16, torch.float32), GPU_PRECISIONS, strict=True):
        model = fresh("resnet50").to("cuda", dtype)
        for batch in (64, 1):
            images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
            engines = ("eager", "channels_last", "inductor")
            timings = bench(model, images, DENSITIES, engines, rounds=rounds, seconds=0.1, note=print)
            found["parts"].append({"precision": precision, "timings": rows(timings)})
            write_json(GPU_RESULT, found)
            print_rows(rows(timings))


def print_rows(found: list[dict[str, Any]]) -> None:
    """One line for each engine and batch."""
    for row in found:
        density = "" if row["density"] is None else f"{row['density']:.2f}"
        print(f"{row['name']:24} {row['batch']:3} {density:5} {row['median']:8.2f} ms  x dense {row['over_dense']:.3f}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", nargs=4, action="append", default=[], metavar=("NAME", "RUN", "DATA", "PLAIN"))
    parser.add_argument("--rounds", type=int, default=9, help="turns at 16 images or more; at one, three times as many")
    parts = ("resnet50", "planning", "bounds", "groups", "others")
    parser.add_argument("--part", choices=parts, action="append", help="measure this, keep what is recorded of others")
    parser.add_argument("--gpu", action="store_true", help="measure on a GPU, and nothing else")
    args = parser.parse_args()
    if args.gpu:
        on_gpu(args.rounds)
        return
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    wanted = args.part or ([] if args.trained else parts)
    machine = describe_machine()["machine"]
    if args.part and found.get("machine", machine) != machine:
        parser.error(f"the other parts were measured on another machine, {found['machine']}: measure all of them")
    if args.part and found.get("rounds", args.rounds) != args.rounds:
        parser.error(f"the other parts were measured in {found['rounds']} rounds: take as many, or measure all of them")
    model = fresh("resnet50")
    if "resnet50" in wanted:
        images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        timings = []
        for batch, rounds, seconds in ((1, 3 * args.rounds, 0.3), (16, args.rounds, 1.0)):
            timings += bench(model, images[:batch], DENSITIES, rounds=rounds, seconds=seconds, note=print)
        found["resnet50"] = rows(timings)
    if "planning" in wanted:
        found["planning"] = planning(model)
    if "bounds" in wanted:
        found["bounds"] = bounds(model, args.rounds)
    if "groups" in wanted:
        images = torch.zeros(1, 3, 224, 224)
        found["groups"] = {
            str(size): rows(bench(model, images, (0.5,), ("openvino",), rounds=3 * args.rounds, note=print))
            for size, model in ((size, fresh("resnet50", size)) for size in (1, 4, 8, 16))
        }
    if "others" in wanted:
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        found["others"] = {
            name: rows(bench(fresh(name), images, (1.0, 0.5, 0.25), rounds=3 * args.rounds, note=print))
            for name in OTHERS
        }
    if wanted:
        command = f"python benchmarks/skipping.py --rounds {args.rounds}"
        about = describe_machine()
        found["commits"] = found.get("commits", {}) | dict.fromkeys(wanted, about["commit"])
        found |= {**about, "command": command, "rounds": args.rounds}
    if args.trained:
        before = {model["model"]: model for model in found.get("trained", [])}
        new = {given[0]: trained(*given, rounds=args.rounds) for given in args.trained}
        found["trained"] = [*(before | new).values()]
    write_json(RESULT, found)
    print_rows([*found.get("resnet50", []), *(row for model in found.get("trained", []) for row in model["timings"])])


if __name__ == "__main__":
    main()
