"""What would the parameters of a gater do as a second plain network? Pairs of plain networks, their guesses averaged.

python benchmarks/averaged.py --data cifar10.npz RUN...

The RUNs are run directories of plain networks; those that differ only in their seed are averaged, two at a time, as
many parameters and MACs as a gated network whose extractor is as large as its backbone. Writes
docs/results/averaged.json; the line of the same recipe and options is replaced.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from measured_runs import keep, trained_as
from tables import RESULTS
from torch import Tensor, nn

from gaternet.data import ToInput
from gaternet.evaluate import BATCH, evaluate
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.modes import channels_last_
from gaternet.provenance import describe_machine
from gaternet.recipe import Runtime
from gaternet.trained import Trained

RESULT = RESULTS / "averaged.json"


class Averaged(nn.Module):
    """The mean of networks' probabilities, as logits."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Inputs (B, C, H, W) -> logits (B, K)."""
        return torch.stack([network(images).softmax(1) for network in self.networks]).mean(0).log()


def measure(runs: dict[int, Path], data: str) -> dict[str, Any]:
    """Seed -> run: errors of each network and of each pair, in percent."""
    runtime = Runtime(precision="no")
    accelerator = make_accelerator(runtime)
    models = {seed: Trained.open(run, data=data) for seed, run in sorted(runs.items())}
    first = next(iter(models.values()))
    _, images = first.load_sets()
    to_input = ToInput(first.preprocessing)

    def error(*seeds: int) -> float:
        network = Averaged(*(models[seed].network for seed in seeds))
        channels_last_(network.to(accelerator.device))
        batches = make_batches(images, BATCH, runtime, accelerator)
        return 100 * (1 - evaluate(network, batches, to_input, accelerator)["accuracy"])

    return {
        "images": len(images),
        "parameters": 2 * sum(p.numel() for p in first.network.parameters()),
        "alone": {str(seed): error(seed) for seed in models},
        "pairs": {f"{a}, {b}": error(a, b) for a, b in itertools.combinations(models, 2)},
    }


def main() -> None:
    """Measure all that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    groups: dict[str, dict[int, Path]] = {}
    for run in args.runs:
        trained = trained_as(run)
        groups.setdefault(json.dumps([trained["recipe"], trained["options"]]), {})[trained["seed"]] = run
    here = {**describe_machine(), "command": f"python benchmarks/averaged.py --data {Path(args.data).name} RUN..."}
    for key, runs in groups.items():
        recipe, options = json.loads(key)
        if len(runs) < 2:
            parser.error(f"{recipe} with one seed has nothing to be averaged with: name a run with another seed")
        keep({"recipe": recipe, "options": options, **measure(runs, args.data), **here}, RESULT)


if __name__ == "__main__":
    main()
