"""Commands that train, and the list of what there is to train."""

import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gaternet.cli.common import JsonOption, app, console
from gaternet.recipe import Augmentation, Gating, Optimizer, Recipe, Runtime, override
from gaternet.recipes import RECIPES, find_recipe

_PANELS = {Recipe: "Recipe", Augmentation: "Augmentation", Optimizer: "Optimizer", Gating: "Gates", Runtime: "Machine"}


def _train(
    recipe: Annotated[str, typer.Argument(help="name of a recipe; [bold]gaternet recipes[/] lists them")],
    out: Annotated[Path | None, typer.Option(help="run directory  [dim]\\[default: runs/RECIPE][/]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights, order, augmentation and noise")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in the run directory")] = False,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Train a recipe, with any of its values changed.

    Examples:

      gaternet train digits_resnet20_gated

      gaternet train cifar10_resnet56_gated --data cifar10.npz --target-density 0.5

      gaternet train cifar10_resnet20_gated --epochs 16 --schedule cosine --out runs/short

      gaternet train cifar10_resnet20_gated --resume

      accelerate launch --num_processes 4 -m gaternet train cifar10_resnet56_gated
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    machine = {field.name for field in dataclasses.fields(Runtime)}
    runtime = Runtime(**{name: given.pop(name) for name in machine & given.keys()})
    changed = override(find_recipe(recipe), given)
    from gaternet.train import train

    record = train(changed, out or Path("runs") / recipe, runtime, seed, resume)
    if as_json:
        print(json.dumps(record))


def _option_parameters() -> list[inspect.Parameter]:
    """One command-line option for each field of the options' dataclasses that has a help text."""
    parameters = []
    for owner, panel in _PANELS.items():
        for field in dataclasses.fields(owner):
            if "help" not in field.metadata:
                continue
            text = field.metadata["help"]
            if owner is Runtime and field.default not in (None, False):
                text += f"  [dim]\\[default: {field.default}][/]"
            flag = "--" + field.name.replace("_", "-")
            names = [f"{flag}/--no-{flag[2:]}"] if field.type is bool else [flag]
            kind = Annotated[
                _cli_type(field.type) | None, typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)
            ]
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            )
    return parameters


def _cli_type(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # an optional value
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return list[float] if typing.get_origin(kind) is tuple else kind  # an option that may be repeated


def _with_options(command: Any) -> Any:
    """Typer reads a command's options from its signature: give `train` one with all the recipes' options."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *_option_parameters()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


app.command("train")(_with_options(_train))


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """The recipes: one for each row of the paper's tables, and those of our own.

    Examples:

      gaternet recipes

      gaternet recipes --json
    """
    if as_json:
        print(json.dumps([dataclasses.asdict(recipe) for recipe in RECIPES.values()]))
        return
    table = Table(box=None)
    table.add_column("recipe", no_wrap=True)
    for title in ("epochs", "gates", "paper's size", "paper's error"):
        table.add_column(title, justify="right")
    for recipe in RECIPES.values():
        paper = recipe.paper
        facts = (f"{paper.gates or '-'}", paper.params or "", f"{paper.error:.2f} %") if paper else ("", "", "")
        table.add_row(recipe.name, str(recipe.epochs), *facts)
    console.print(table)
