"""What is measured of trained runs, kept as a JSON list: a run's line stays there until the same is measured anew."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gaternet.checkpoint import read_json
from gaternet.ledger import changed_options
from gaternet.run import describe_machine


def measure_runs(runs: Sequence[Path], result: Path, command: str, measure: Callable[[Path], dict[str, Any]]) -> None:
    """Measure each run directory, and write the file after each."""
    before = json.loads(result.read_text()) if result.exists() else []
    lines = {(line["recipe"], json.dumps(line["options"]), line["seed"]): line for line in before}
    here = describe_machine()  # before the file changes, and with it what the commit is called
    for run in runs:
        config = read_json(run / "config.json")
        line = {
            "recipe": config["recipe"]["name"],
            "options": changed_options(config["recipe"]),
            "seed": config["seed"],
            **measure(run),
            **here,
            "command": command,
        }
        lines[line["recipe"], json.dumps(line["options"]), line["seed"]] = line
        result.write_text(json.dumps([lines[key] for key in sorted(lines)], indent=2) + "\n")
