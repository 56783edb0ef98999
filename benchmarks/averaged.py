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
from torch import Tensor

from gaternet.checkpoint import read_json
from gaternet.data import Preprocessing
from gaternet.evaluate import BATCH, ToInput, load_test_set
from gaternet.ledger import changed_options
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.recipe import Runtime
from gaternet.run import describe_machine, load_trained

RESULT = Path(__file__).parents[1] / "docs" / "results" / "averaged.json"


def probabilities(run: Path, data: str) -> tuple[Tensor, Tensor, int]:
    """Of the test images: probabilities (N, K) of the classes, labels (N,); and the network's number of parameters."""
    runtime = Runtime(precision="no")
    accelerator = make_accelerator(runtime)
    network, metadata = load_trained(run)
    network.eval().to(accelerator.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    to_input, found, known = ToInput(Preprocessing.from_metadata(metadata)), [], []
    with torch.inference_mode():
        for images, labels in make_batches(load_test_set(data, metadata), BATCH, runtime, accelerator).epoch():
            found.append(network(to_input(images)).softmax(1).cpu())
            known.append(labels.cpu())
    return torch.cat(found), torch.cat(known), sum(p.numel() for p in network.parameters())


def error(guesses: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (guesses.argmax(1) != labels).double().mean().item()


def measure(runs: dict[int, Path], data: str) -> dict[str, Any]:
    """Seed -> run: errors of each network and of each pair, in percent."""
    found = {seed: probabilities(run, data) for seed, run in sorted(runs.items())}
    labels, parameters = next(iter(found.values()))[1:]
    alone = {str(seed): error(guesses, labels) for seed, (guesses, _, _) in found.items()}
    pairs = {f"{a}, {b}": error((found[a][0] + found[b][0]) / 2, labels) for a, b in itertools.combinations(found, 2)}
    return {"images": len(labels), "parameters": 2 * parameters, "alone": alone, "pairs": pairs}


def main() -> None:
    """Measure all that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    groups: dict[str, tuple[str, dict[str, Any], dict[int, Path]]] = {}
    for run in args.runs:
        config = read_json(run / "config.json")
        name, options = config["recipe"]["name"], changed_options(config["recipe"])
        groups.setdefault(json.dumps([name, options]), (name, options, {}))[2][config["seed"]] = run
    before = json.loads(RESULT.read_text()) if RESULT.exists() else []
    lines = {json.dumps([line["recipe"], line["options"]]): line for line in before}
    here = {**describe_machine(), "command": f"python benchmarks/averaged.py --data {Path(args.data).name} RUN..."}
    for key, (name, options, runs) in groups.items():
        if len(runs) < 2:
            parser.error(f"{name} with one seed has nothing to be averaged with: name a run with another seed")
        lines[key] = {"recipe": name, "options": options, **measure(runs, args.data), **here}
    RESULT.write_text(json.dumps([lines[key] for key in sorted(lines)], indent=2) + "\n")


if __name__ == "__main__":
    main()
