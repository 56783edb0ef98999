"""Fine-tune trained CIFAR-10 ResNets to half of their filters or MACs, and write docs/results/finetune.json.

python benchmarks/finetune.py --data cifar10.npz --out runs WEIGHTS...
python benchmarks/finetune.py --data cifar10.npz --out runs --half macs WEIGHTS...

WEIGHTS are files of Y. Idelbayev's pytorch_resnet_cifar10 (resnet20-12fca82f.th, ...). Each is gated with every gate
open, evaluated beside the plain network, fine-tuned and evaluated again: to density 0.5 over all its filters, or, with
a gater that is small and guided, to half of the dense MACs, gater included.
A run that was cut goes on when the command is given again; a result stays in the file until the same is run anew.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pretrained_cifar_resnet import load
from tables import RESULTS

from gaternet.cost import CostModel, count_dense_macs
from gaternet.data import ToInput, load_data
from gaternet.evaluate import BATCH, evaluate
from gaternet.files import write_json
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.network import gate_as, prepared_for
from gaternet.provenance import describe_machine
from gaternet.recipe import Runtime, override
from gaternet.recipes import find_recipe
from gaternet.run import RunDirectory
from gaternet.train import Stopped, train

RESULT = RESULTS / "finetune.json"
KEYS = ("model", "half", "epochs", "group_size", "final_slope", "seed")
# Guided, with which it was measured; written out, for recipes change.
SMALL_GATER = {"extractor": "resnet8", "shrink": 2, "bottleneck": 32, "auxiliary_weight": 1.0, "anneal_noise": True}
TARGET = {"resnet20": 0.42, "resnet56": 0.47}  # share of the backbone's MACs; with the gater it is half of them


def finetune(
    path: Path, data_path: str, out: Path, half: str, epochs: int, group_size: int, final_slope: float, seed: int
) -> dict[str, Any]:
    """Gate, evaluate, fine-tune and evaluate one network."""
    name = path.name.split("-")[0]
    changes = {"backbone": name, "pretrained": False, "data": data_path, "batch_size": 128, "epochs": epochs}
    changes |= {"lr": 0.05, "gater_lr": 0.5, "noise_std": 0.25, "penalty": "gates", "sparsity_ramp": 1.0}
    changes |= {"group_size": group_size, "final_slope": final_slope}
    if half == "macs":
        changes |= SMALL_GATER | {"target_density": TARGET[name], "penalty": "macs", "sparsity_ramp": 2.0}
    recipe = override(find_recipe("finetune"), changes)
    network = load(path)
    runtime = Runtime(precision="no")
    accelerator = make_accelerator(runtime)
    data = prepared_for(load_data(data_path), network)
    to_input = ToInput(data.preprocessing)
    batches = make_batches(data.test, BATCH, runtime, accelerator)
    plain = evaluate(network, batches, to_input, accelerator)
    torch.manual_seed(seed)
    model = gate_as(recipe.gating, network, torch.zeros(2, 3, 32, 32))
    opened = evaluate(model, batches, to_input, accelerator)
    run = out / f"finetune_{name}_{half}_group{group_size}_slope{final_slope:g}_epochs{epochs}_seed{seed}"
    record = train(recipe, run, Runtime(), seed, resume=(run / "config.json").exists(), network=model)
    trained_in = RunDirectory(run).config()["precision"]  # and tested; the other figures are of full precision
    example = torch.zeros(1, 3, 32, 32, device=accelerator.device)
    cost = CostModel.of(model, example)
    return {
        "model": name,
        "half": half,
        "group_size": group_size,
        "final_slope": final_slope,
        "gates": model.num_gates,
        "sites": len(model.sites),
        "images": plain["images"],
        "plain_correct": round(plain["accuracy"] * plain["images"]),
        "open_correct": round(opened["accuracy"] * opened["images"]),
        "error": 100 * (1 - record["test_accuracy"]),
        "density": record["test_density"],
        "always_on": record["test_always_on"],
        "always_off": record["test_always_off"],
        "dependent": record["test_dependent"],
        "backbone_macs": cost.dense,
        "gater_macs": count_dense_macs(model.gater, example),
        "gated_macs": evaluate(model, batches, to_input, accelerator, cost)["gated_macs"],
        "precision": trained_in,
        "epochs": epochs,
        "minutes": sum(epoch["seconds"] for epoch in RunDirectory(run).epochs()) / 60,
        "seed": seed,
        **describe_machine(),
        "command": f"python benchmarks/finetune.py --data {Path(data_path).name} --half {half} --epochs {epochs} "
        f"--group-size {group_size} --final-slope {final_slope:g} --seed {seed} {path.name}",
    }


def main() -> None:
    """Run all that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--half", choices=("filters", "macs"), default="filters")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--final-slope", type=float, default=1.0, help="of the soft gates; 1 is the paper's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    for path in args.weights:
        try:
            options = args.half, args.epochs, args.group_size, args.final_slope, args.seed
            found = finetune(path, args.data, args.out, *options)
        except Stopped as stopped:
            sys.exit(str(stopped))
        before = json.loads(RESULT.read_text()) if RESULT.exists() else []
        results = {tuple(line[key] for key in KEYS): line for line in [*before, found]}
        write_json(RESULT, [results[key] for key in sorted(results)])
        print(json.dumps(found))


if __name__ == "__main__":
    main()
