"""What the tables of docs/results.md share."""

import dataclasses
import json
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gaternet.ledger import train_flags
from gaternet.recipe import Recipe, override
from gaternet.recipes import RECIPES, find_recipe

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def error_of(lines: list[dict[str, Any]]) -> str:
    """Mean test error in percent, with its standard deviation and the number of runs.

    Raises:
        ValueError: a seed counts twice.
    """
    seeds = [line["seed"] for line in lines]
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        command = next(line["command"] for line in lines if line["seed"] == min(twice))
        raise ValueError(f"{command} was measured twice: keep one of the lines")
    errors = [line["test_error"] for line in lines]
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{spread} (n = {len(errors)})"


def mean_macs(lines: list[dict[str, Any]]) -> float:
    """Multiply-accumulates of an image, in the mean over test images and runs: of open filters and of the gater."""
    if lines[0]["gates"]:
        return statistics.mean(line["gated_macs"] + line["gater_macs"] for line in lines)
    return statistics.mean(line["backbone_macs"] for line in lines)


def trained_recipe(line: dict[str, Any]) -> Recipe | None:
    """The recipe of a run with its options; None where today's code has no such recipe or option."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in line["options"].items()}
    try:
        return override(find_recipe(line["recipe"]), options)
    except ValueError:
        return None


def trains_like(line: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run was one of `recipe`, whatever the recipe's name was."""
    ours = trained_recipe(line)
    return ours is not None and _same(ours, recipe)


def _same(ours: Recipe, other: Recipe) -> bool:
    return dataclasses.replace(ours, name=other.name, paper=other.paper) == other


CHOSEN = (
    "\\* This recipe was chosen among the gated networks that were trained at full length, by their test errors. That "
    "favours the seeds that were used for the choice: only others can confirm it.\n"
)


def marked_error(lines: list[dict[str, Any]], recipe: str) -> str:
    """`error_of`, with a mark that `chosen` explains where runs are older than the recipe: it was made after them."""
    seen = [line for line in lines if line["recipe"] != recipe or line["options"]]
    others = [line for line in lines if line not in seen]
    if not seen:
        return error_of(lines)
    seeds = " and ".join(str(seed) for seed in sorted(line["seed"] for line in seen))
    alone = f"; without seed {seeds} {error_of(others)}" if others else ""
    return error_of(lines) + alone + r" \*"


def chosen(cells: list[str]) -> str:
    """What is said below a table with these errors of its mark, if there is one."""
    return f"\n{CHOSEN}" if any(cell.endswith("*") for cell in cells) else ""


def as_named(line: dict[str, Any]) -> tuple[str, str]:
    """The recipe of a run, and options as flags, as its command has them."""
    return line["recipe"], shlex.join(train_flags(line["options"]))


def as_trained(line: dict[str, Any]) -> tuple[str, str]:
    """The same, but where the options make it another recipe, that one without options."""
    ours = trained_recipe(line) if line["options"] else None
    same = (recipe.name for recipe in RECIPES.values() if ours is not None and _same(ours, recipe))
    return next(((name, "") for name in same), as_named(line))


def by_options(
    lines: list[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[str, str]] = as_trained
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs that differ only in their seed, or in the machine, together: (recipe, options as flags) -> their lines."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def machine_of(line: dict[str, Any]) -> str:
    """The machine in a few words."""
    machine = line["machine"]
    return ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores"


def machines_of(lines: list[dict[str, Any]]) -> str:
    """All machines of several runs, and where they computed in less than full precision."""
    parts = [part for line in lines for part in (line, *line.get("resumed", []))]
    reduced = {"bf16": ", bf16", "fp16": ", fp16"}
    return "; ".join(sorted({machine_of(part) + reduced.get(part.get("precision", ""), "") for part in parts}))


TITLES = ["size", "MACs", "test error %", "train loss", "open", "dependent", "minutes"]


def figures(lines: list[dict[str, Any]]) -> list[str]:
    """What `TITLES` names, in the mean over runs."""

    def mean(get: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(map(get, lines))

    opened = dependent = "-"
    if lines[0]["gates"]:
        opened = f"{100 * mean(lambda line: line['gates']['density']):.1f} %"
        dependent = f"{100 * mean(lambda line: line['gates']['dependent']):.1f} %"
    size = f"{mean(lambda line: line['parameters']) / 1e6:.2f}M"
    train_loss = f"{mean(lambda line: line['train_loss']):.3f}"
    minutes = f"{mean(lambda line: line['seconds']) / 60:.0f}"
    return [size, f"{mean_macs(lines) / 1e6:.1f}M", error_of(lines), train_loss, opened, dependent, minutes]


def as_code(*words: str) -> str:
    """The words, but for empty ones, as Markdown's code."""
    return f"`{' '.join(filter(None, words))}`"


def read_finetuned() -> list[dict[str, Any]]:
    """What benchmarks/finetune.py has recorded, with errors under the name that the ledger has for them."""
    lines = json.loads((RESULTS / "finetune.json").read_text())
    return [{**line, "test_error": line["error"]} for line in lines]
