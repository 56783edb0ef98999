"""What the tables of docs/results.md share."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from gaternet.recipe import Recipe, override
from gaternet.recipes import find_recipe

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


def mean_macs(lines: list[dict[str, Any]]) -> float:
    """Multiply-accumulates of an image, in the mean over test images and runs: of open filters and of the gater."""
    if lines[0]["gates"]:
        return statistics.mean(line["gated_macs"] + line["gater_macs"] for line in lines)
    return statistics.mean(line["backbone_macs"] for line in lines)


def trains_like(line: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run was one of `recipe`, whatever the recipe's name was."""
    ours = override(find_recipe(line["recipe"]), line["options"])
    return dataclasses.replace(ours, name=recipe.name, paper=recipe.paper) == recipe


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
