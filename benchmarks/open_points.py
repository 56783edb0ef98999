"""What the paper leaves open, settled by experiment: a short training of a small network, one option changed at a time.

python benchmarks/open_points.py --seeds 2 --jobs 2              # all that is not finished yet
python benchmarks/open_points.py --seeds 2 --jobs 2 --minutes 9  # in pieces

ResNet-8 on CIFAR-10's images at half their size, 8 epochs: minutes each, hours in all. Each finished run is a line in
docs/results/runs.jsonl, from which `python benchmarks/results.py` writes docs/results.md. It can be cut at any time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from gaternet.recipe import Recipe, Runtime, override
from gaternet.recipes import find_recipe
from gaternet.sweep import make_jobs, sweep
from gaternet.train import Stopped

LEDGER = Path(__file__).parents[1] / "docs" / "results" / "runs.jsonl"
PLAIN, WIDER, GATED = "short_resnet8", "short_resnet8_wider", "short_resnet8_gated"
DATA = "cifar10"
TRAINED = "TRAINED"  # stands for the plain network, trained by the same sweep


# Question -> what to change in GATED, one at a time
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "noise": [{"noise_std": 0.0}, {"noise_std": 0.5}, {"anneal_noise": True}],
    "what a target counts": [{"target_density": 0.5, "penalty": kind} for kind in ("gates", "sites", "each", "macs")],
    "soft or hard gates": [{"hard_probability": 0.0}, {"hard_probability": 1.0}],
    "from scratch or pretrained": [{"extractor_from": TRAINED}, {"backbone_from": TRAINED}],
    "initial openness": [{"initial_bias": 1.0}, {"initial_bias": 3.0}],
    "which filters": [{"backbone": "resnet8", "sites": "all"}],
    "BatchNorm in D": [{"batch_norm": False}],
    "width b": [{"bottleneck": 4}, {"bottleneck": 32}],
    "the gater's learning rate": [{"gater_lr": 0.05}, {"gater_lr": 0.8}],
    "lambda": [{"sparsity": 0.1}, {"sparsity": 1.0}, {"sparsity": 1.0, "sparsity_start": 2.0, "sparsity_ramp": 4.0}],
    "target density": [{"target_density": 0.3}, {"target_density": 0.8}],
    "learning from the plain network too": [{"teacher": TRAINED}],
}


def networks(data: str) -> list[Recipe]:
    """The plain network, a wider one with as many parameters as the gated one, and the gated one."""
    return [override(find_recipe(name), {"data": data}) for name in (PLAIN, WIDER, GATED)]


def variants(data: str, out: Path) -> dict[str, list[Recipe]]:
    """Question -> the gated network's variants that answer it."""
    trained = str(out / PLAIN / "seed0")

    def variant(change: dict[str, Any]) -> Recipe:
        values = {name: trained if value == TRAINED else value for name, value in change.items()}
        return override(find_recipe(GATED), {"data": data, **values})

    return {question: [variant(change) for change in changes] for question, changes in VARIANTS.items()}


def main() -> None:
    """Train what is not in the ledger yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA, help="default: %(default)s, which is downloaded")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    args = parser.parse_args()
    changed = [recipe for recipes in variants(args.data, args.out).values() for recipe in recipes]
    jobs = make_jobs([*networks(args.data), *changed], range(args.seeds), args.out)
    try:
        sweep(jobs, LEDGER, Runtime(), args.jobs, args.minutes)
    except Stopped as stopped:
        sys.exit(str(stopped))


if __name__ == "__main__":
    main()
