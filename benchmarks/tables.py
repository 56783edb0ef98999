"""What the tables of docs/results.md share."""

import json
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def error_of(lines: list[dict[str, Any]]) -> str:
    """Mean test error in percent, with its standard deviation and the number of runs."""
    errors = [line["test_error"] for line in lines]
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{spread} (n = {len(errors)})"


def machine_of(line: dict[str, Any]) -> str:
    """The machine in a few words."""
    machine = line["machine"]
    return ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores"


def machines_of(lines: list[dict[str, Any]]) -> str:
    """All machines of several runs."""
    return "; ".join(sorted({machine_of(line) for line in lines}))


def read_finetuned() -> list[dict[str, Any]]:
    """What benchmarks/finetune.py has recorded."""
    return json.loads((DOCS / "results" / "finetune.json").read_text())
