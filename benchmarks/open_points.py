"""What the paper leaves open, settled by experiment: short trainings of small networks, one option changed at a time.

python benchmarks/open_points.py --seeds 2 --jobs 2                   # all that is not finished yet
python benchmarks/open_points.py --seeds 2 --jobs 2 --minutes 9       # in pieces
python benchmarks/open_points.py --seeds 1 --network resnet20         # one of the networks

ResNet-8 answers what each option does, ResNet-20 what closes the distance to its plain twin: both on CIFAR-10's images
at half their size, 8 epochs, minutes each, hours in all. Each finished run is a line in docs/results/runs.jsonl, from
which `python benchmarks/results.py` writes docs/results.md. It can be cut at any time.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import RESULTS

from gaternet.jobs import make_jobs
from gaternet.recipe import Recipe, Runtime, override
from gaternet.recipes import GUIDED, OPEN_SAMPLES, find_recipe
from gaternet.sweep import sweep
from gaternet.train import Stopped

LEDGER = RESULTS / "runs.jsonl"
DATA = "cifar10"
TRAINED = "TRAINED"  # stands for the plain network, trained by the same sweep


@dataclass(frozen=True)
class Study:
    """A network, and what is changed in its gated form.

    Attributes:
        backbone: the recipes are short_BACKBONE, short_BACKBONE_wider and short_BACKBONE_gated.
        common: options of all of them.
        variants: question -> changes of the gated one, each by itself.
    """

    backbone: str
    common: dict[str, Any]
    variants: dict[str, list[dict[str, Any]]]

    @property
    def names(self) -> tuple[str, str, str]:
        """Recipes of the plain network, of a wider one with as many parameters as the gated one, of the gated one."""
        plain = f"short_{self.backbone}"
        return plain, f"{plain}_wider", f"{plain}_gated"

    def networks(self, data: str) -> list[Recipe]:
        """The three of `names`, on `data`."""
        return [override(find_recipe(name), {"data": data, **self.common}) for name in self.names]

    def variants_of(self, data: str, out: Path) -> dict[str, list[Recipe]]:
        """Question -> the gated network's variants that answer it; `out` is where the runs are."""
        plain, _, gated = self.networks(data)
        trained = str(make_jobs([plain], [0], out)[0].path)

        def variant(change: dict[str, Any]) -> Recipe:
            return override(gated, {name: trained if value == TRAINED else value for name, value in change.items()})

        return {question: [variant(change) for change in changes] for question, changes in self.variants.items()}


EACH_OPTION = Study(
    "resnet8",
    {},
    {
        "noise": [{"noise_std": 0.0}, {"noise_std": 0.5}, {"anneal_noise": True}],
        "what a target counts": [
            {"target_density": 0.5, "penalty": kind} for kind in ("gates", "sites", "each", "macs")
        ],
        "soft or hard gates": [{"hard_probability": 0.0}, {"hard_probability": 1.0}],
        "from scratch or pretrained": [{"extractor_from": TRAINED}, {"backbone_from": TRAINED}],
        "initial openness": [{"initial_bias": 1.0}, {"initial_bias": 3.0}],
        "which filters": [{"backbone": "resnet8", "sites": "all"}],
        "BatchNorm in D": [{"batch_norm": False}],
        "width b": [{"bottleneck": 4}, {"bottleneck": 32}],
        "the gater's learning rate": [{"gater_lr": 0.05}, {"gater_lr": 0.8}],
        "lambda": [
            {"sparsity": 0.1},
            {"sparsity": 1.0},
            {"sparsity": 1.0, "sparsity_start": 2.0, "sparsity_ramp": 4.0},
        ],
        "target density": [{"target_density": 0.3}, {"target_density": 0.8}],
        "learning from the plain network too": [{"teacher": TRAINED}],
        "a guided gater, then open samples too": [GUIDED, OPEN_SAMPLES],
    },
)

GAP = Study(
    "resnet20",
    {"image_size": 16},
    {
        "noise": [{"noise_std": 0.0}],
        "initial openness": [{"initial_bias": 2.0}],
        "from scratch or pretrained": [
            {"extractor_from": TRAINED},
            {"extractor_from": TRAINED, "anneal_noise": True},
            {"extractor_from": TRAINED, "backbone_from": TRAINED},
        ],
        "an auxiliary classifier on E": [
            {"auxiliary_weight": 1.0},
            {"auxiliary_weight": 1.0, "anneal_noise": True},
            GUIDED,
        ],
        "open samples, with all of these": [OPEN_SAMPLES],
    },
)

STUDIES = {study.backbone: study for study in (EACH_OPTION, GAP)}


def main() -> None:
    """Train what is not in the ledger yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=STUDIES, help="default: all")
    parser.add_argument("--data", default=DATA, help="default: %(default)s, which is downloaded")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    args = parser.parse_args()
    recipes = []
    for study in [STUDIES[args.network]] if args.network else STUDIES.values():
        recipes += study.networks(args.data)
        recipes += [recipe for changed in study.variants_of(args.data, args.out).values() for recipe in changed]
    jobs = make_jobs(recipes, range(args.seeds), args.out)
    try:
        sweep(jobs, LEDGER, Runtime(), args.jobs, args.minutes)
    except Stopped as stopped:
        sys.exit(str(stopped))


if __name__ == "__main__":
    main()
