"""How much slower does gated training step than plain training, and does the slowdown exceed that of the work?

python benchmarks/training.py [--steps 20] [--out docs/results/training.json]

A step is all that `gaternet train` does: the batch is cut from uint8 images in memory and augmented, forward,
backward, SGD. Steps of the plain backbone, of the gater's extractor alone and of the gated model alternate in one
process, so that a machine whose speed drifts slows all three alike; medians are compared. Multiply-accumulates (MACs)
are counted by PyTorch's FlopCounterMode. `overhead` is the time of a gated step over that of its two parts: what gates
and bookkeeping cost. `outside` is the share of a step's time in which no kernel runs, from PyTorch's profiler: on a
CPU the time outside of aten's operators, on a GPU that in which it is idle: at most that much, for the profiler slows
the processor and not the GPU. With --compile a gated model under torch.compile takes its turns as well.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from gaternet.cost import count_dense_macs
from gaternet.data import ImageData, ImageSet, Preprocessing, mix_seed
from gaternet.files import write_json
from gaternet.machine import make_accelerator, seed_step, tuned_convolutions
from gaternet.objective import schedule
from gaternet.preparation import prepare
from gaternet.provenance import describe_machine
from gaternet.recipe import Recipe, Runtime
from gaternet.recipes import find_recipe
from gaternet.step import WARM_UP

BATCH = 128
CLASSES = tuple("0123456789")
PREPROCESSING = Preprocessing(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


class Stepper:
    """Training steps of one model, as `gaternet.train` does them, on random pixels."""

    def __init__(self, recipe: Recipe, runtime: Runtime) -> None:
        self.recipe, self.accelerator = recipe, make_accelerator(runtime)
        torch.manual_seed(0)
        pixels = torch.randint(0, 256, (20 * BATCH, 3, 32, 32), dtype=torch.uint8)
        images = ImageSet(pixels, torch.randint(0, 10, (len(pixels),)).tolist(), recipe.augmentation)
        data = ImageData(images, images, CLASSES, PREPROCESSING)
        self.prepared = prepare(replace(recipe, batch_size=BATCH), data, runtime, 0, self.accelerator)
        self.batches = (batch for epoch in itertools.count() for batch in self.prepared.train_batches.epoch(epoch))
        self.seconds: list[float] = []

    def step(self) -> None:
        """One timed step."""
        start = time.perf_counter()
        state = self.prepared.state
        seed_step(mix_seed("step", 0, state.step, 0), self.accelerator.device)
        images, labels = next(self.batches)
        state.add(self.prepared.step(images, labels, schedule(self.recipe, state.step, 390)))
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def outside(self, steps: int = 5) -> float:
        """Share of the time in which no kernel runs, in [0, 1]."""
        on_gpu = self.accelerator.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds, acc_events=True) as found:
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            wall = 1e6 * (time.perf_counter() - start)
        del self.seconds[-steps:]  # the profiler slows them
        events = found.key_averages()
        if on_gpu:
            return 1 - sum(event.self_device_time_total for event in events) / wall
        return 1 - sum(event.self_cpu_time_total for event in events if event.key.startswith("aten::")) / wall

    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass."""
        example = self.prepared.to_input(self.prepared.data.test[0][0][None].to(self.accelerator.device))
        return count_dense_macs(self.prepared.network, example)


@tuned_convolutions()
def main() -> None:
    """Measure, print one table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model")
    parser.add_argument("--depth", type=int, choices=(20, 56, 110, 164), default=56)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--no-cuda-graph", action="store_true", help="on a GPU: run each step anew")
    parser.add_argument("--compile", action="store_true", help="a compiled gated model as well")
    name = "training_gpu.json" if torch.cuda.is_available() else "training.json"
    parser.add_argument("--out", type=Path, default=Path("docs/results") / name)
    args = parser.parse_args()
    runtime = replace(Runtime(), precision=args.precision, cuda_graph=not args.no_cuda_graph)
    names = {"plain": f"resnet{args.depth}", "extractor": "resnet20", "gated": f"resnet{args.depth}_gated"}
    steppers = {part: Stepper(find_recipe(f"cifar10_{name}"), runtime) for part, name in names.items()}
    if args.compile:
        names["compiled"] = names["gated"]
        steppers["compiled"] = Stepper(find_recipe(f"cifar10_{names['gated']}"), replace(runtime, compile=True))
    for round_ in range(args.steps + WARM_UP + 2):
        for stepper in steppers.values():
            stepper.step()
            if round_ < WARM_UP + 2:  # a graph is captured, too
                stepper.seconds.clear()
    seconds = {part: statistics.median(stepper.seconds) for part, stepper in steppers.items()}
    outside = {part: stepper.outside() for part, stepper in steppers.items()}
    macs = {part: stepper.macs() for part, stepper in steppers.items()}
    ratio, work = seconds["gated"] / seconds["plain"], macs["gated"] / macs["plain"]
    pairs = zip(steppers["gated"].seconds, steppers["plain"].seconds, steppers["extractor"].seconds, strict=True)
    overhead = statistics.median(gated / (plain + extractor) for gated, plain, extractor in pairs)
    turns = zip(steppers["compiled"].seconds, steppers["gated"].seconds, strict=True) if args.compile else ()
    compiled = statistics.median(one / other for one, other in turns) if args.compile else None
    result = {
        "models": names,
        "batch": BATCH,
        "steps": args.steps,
        "precision": steppers["plain"].accelerator.mixed_precision,
        "seconds": seconds,
        "images_per_second": {part: BATCH / value for part, value in seconds.items()},
        "outside": outside,
        "macs": macs,
        "time_ratio": ratio,
        "mac_ratio": work,
        "time_ratio_over_mac_ratio": ratio / work,
        "overhead": overhead,
        **({"compiled": compiled} if args.compile else {}),
        **describe_machine(),
        "command": f"python benchmarks/training.py --steps {args.steps} --depth {args.depth} "
        f"--precision {args.precision}{' --no-cuda-graph' * args.no_cuda_graph}{' --compile' * args.compile}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    table = Table(
        "model", "ms a step", "images/s", "outside", "MACs", title=f"training, batch {BATCH}, median of {args.steps}"
    )
    for part, name in names.items():
        times = f"{1e3 * seconds[part]:.0f}", f"{BATCH / seconds[part]:.0f}", f"{100 * outside[part]:.0f} %"
        table.add_row(name + ", compiled" * (part == "compiled"), *times, f"{macs[part] / 1e6:.1f}M")
    console = Console()
    console.print(table)
    console.print(
        f"gated / plain: time {ratio:.2f}, MACs {work:.2f}, quotient {ratio / work:.2f} (target: at most 1.10)\n"
        f"gated / (plain + extractor), the cost of gates and bookkeeping: {overhead:.3f}"
        + (f"\ncompiled / gated: {compiled:.2f}" if args.compile else "")
    )


if __name__ == "__main__":
    main()
