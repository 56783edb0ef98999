"""What is measured of trained runs, kept as a JSON list: a run's line stays there until the same is measured anew."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gaternet.files import read_json, write_json
from gaternet.ledger import changed_options
from gaternet.provenance import describe_machine


def measure_runs(runs: Sequence[Path], result: Path, command: str, measure: Callable[[Path], dict[str, Any]]) -> None:
    """Measure each run directory, and write the file after each."""
    here = {**describe_machine(), "command": command}  # before the file changes, and with it what the commit is called
    for run in runs:
        keep({**trained_as(run), **measure(run), **here}, result)


def trained_as(run: Path) -> dict[str, Any]:
    """The recipe, options and seed of a run directory."""
    config = read_json(run / "config.json")
    recipe = config["recipe"]
    return {"recipe": recipe["name"], "options": changed_options(recipe), "seed": config["seed"]}


def keep(line: dict[str, Any], result: Path) -> None:
    """Put a line into the file, in place of that of the same recipe, options and seed, if it is of one seed."""
    lines = [*(json.loads(result.read_text()) if result.exists() else []), line]
    kept = {(line["recipe"], json.dumps(line["options"]), line.get("seed")): line for line in lines}
    write_json(result, [kept[key] for key in sorted(kept)])
