"""Commands that train, and the list of what there is to train."""

import dataclasses
import inspect
import shlex
import sys
import types
import typing
from collections.abc import Mapping, Sequence, Set
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gaternet.cli.common import app, console, escaped, print_json
from gaternet.cli.options import JsonOption
from gaternet.recipe import (
    Augmentation,
    Distillation,
    Gating,
    Optimizer,
    Recipe,
    Runtime,
    flat_options,
    idle_options,
    override,
)
from gaternet.recipes import RECIPES, find_recipe, saved_recipe

_PATHS = ("data", "teacher", "backbone_from", "extractor_from")  # options that name a file or a folder
_PANELS = {
    Recipe: "Recipe",
    Augmentation: "Augmentation",
    Optimizer: "Optimizer",
    Gating: "Gates",
    Distillation: "Distillation",
    Runtime: "Machine",
}


def _train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="name of a recipe; [bold]gaternet recipes[/] lists them; not needed with --resume and --out"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="run directory  [dim]\\[default: runs/RECIPE][/]")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="seed of weights, order, augmentation and noise  [dim]\\[default: 0][/]"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in the run directory")] = False,
    ledger: Annotated[Path | None, typer.Option(help="file to append a line to when the run is finished")] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Train a recipe, with any of its values changed.

    `gaternet recipes NAME` shows its values, which are the defaults of the options below.

    Examples:

      gaternet train digits_resnet20_gated

      gaternet train cifar10_resnet56_gated --data cifar10.npz --target-density 0.5

      gaternet train cifar10_resnet20_gated --epochs 16 --schedule cosine --out runs/short

      gaternet train --resume --out runs/short

      accelerate launch --num_processes 4 -m gaternet train cifar10_resnet56_gated
    """
    if recipe is None and (out is None or not resume):
        raise ValueError("name a recipe to train, or a run to go on with: gaternet train --resume --out RUN")
    path = out or Path("runs") / str(recipe)
    chosen, begun, machine = (find_recipe(recipe), 0, {}) if recipe is not None else _of_run(path)
    seed = begun if seed is None else seed
    changes, runtime = _changes_and_runtime(options, machine)
    changed = override(chosen, changes)
    _refuse_idle(changes.keys(), changed)
    from gaternet.ledger import add_run, check_ledger
    from gaternet.machine import end_with_parent
    from gaternet.train import train

    end_with_parent()
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        if ledger is not None:
            check_ledger(ledger)
        record = train(changed, path, runtime, seed, resume)
        if ledger is not None:
            add_run(ledger, path, runtime)
        from accelerate import PartialState

        if PartialState().is_main_process:
            done = f"trained for {changed.duration}: gaternet evaluate {shlex.quote(str(path))}"
            console.print(escaped(done), highlight=False)
    if as_json and PartialState().is_main_process:
        print_json(record)


def _of_run(path: Path) -> tuple[Recipe, int, dict[str, Any]]:
    """What a run trains, its seed, and the options of the machine that it was started with."""
    from gaternet.run import CONFIG, RunDirectory

    if not (path / CONFIG).exists():
        raise ValueError(f"{path} holds no run to resume: name a recipe to start one")
    config = RunDirectory(path).config()
    return saved_recipe(config["recipe"]), config["seed"], config.get("runtime", {})


def _refuse_idle(given: Set[str], recipe: Recipe) -> None:
    """ValueError for an option that was given, and has nothing to act on."""
    idle = idle_options(flat_options(dataclasses.asdict(recipe)))
    for name in sorted(given & idle.keys()):
        flag, needed = "--" + name.replace("_", "-"), idle[name]
        if needed is None:
            raise ValueError(
                f"{recipe.model} has no gater that {flag} could act on: leave it out, or name a gated recipe"
            )
        raise ValueError(f"{flag} has an effect only with {needed}: add that, or leave it out")


def _refuse_idle_in_all(option: str, recipes: Sequence[Recipe]) -> None:
    """ValueError for an option that acts in none of these."""
    refusals = []
    for recipe in recipes:
        try:
            _refuse_idle({option}, recipe)
        except ValueError as error:
            refusals.append(error)
    if len(refusals) == len(recipes):
        raise refusals[0]


def _sweep(
    recipes: Annotated[list[str], typer.Argument(help="names of recipes")],
    seeds: Annotated[int, typer.Option(min=1, help="runs of each, with seeds 0, 1, ...")] = 3,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="an option and values, such as noise-std=0,0.5: each in a run of its own beside the recipe as it is; "
            "may be repeated, and options are not combined; a path is one value, with its commas"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="number of runs side by side; they may share a GPU")] = 1,
    minutes: Annotated[float | None, typer.Option(min=0, help="save and stop after this many minutes")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run directories")] = Path("runs"),
    ledger: Annotated[
        Path | None, typer.Option(help="file with a line for each finished run  [dim]\\[default: OUT/ledger.jsonl][/]")
    ] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Train several recipes with several seeds, side by side; run the same command again to continue.

    Options of `gaternet train` hold for all of the runs.

    Examples:

      gaternet sweep cifar10_resnet20 cifar10_resnet20_gated --jobs 3

      gaternet sweep short_resnet20_gated --vary noise-std=0,0.5 --vary initial-bias=1,2 --seeds 1

      gaternet sweep short_resnet20 short_resnet20_gated --minutes 9
    """
    changes, runtime = _changes_and_runtime(options)
    chosen = [override(find_recipe(name), changes) for name in recipes]
    varied: dict[str, list[Any]] = {}
    for name, values in map(_varied, vary or []):
        varied.setdefault(name, []).extend(values)
    every = list(chosen)
    for name, values in varied.items():
        variants = [override(recipe, {name: value}) for recipe in chosen for value in values]
        _refuse_idle_in_all(name, variants)
        every += variants
    for name in changes:  # which may act beside what is varied
        _refuse_idle_in_all(name, every)
    from gaternet.jobs import make_jobs
    from gaternet.sweep import sweep as run_sweep

    planned = make_jobs(chosen, range(seeds), out, varied)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        lines = run_sweep(planned, ledger or out / "ledger.jsonl", runtime, jobs, minutes)
    if as_json:
        print_json(lines)


def _varied(text: str) -> tuple[str, list[Any]]:
    """ "noise-std=0,0.5" -> ("noise_std", [0.0, 0.5])."""
    flag, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"--vary takes an option and its values, say noise-std=0,0.5, not {text!r}")
    name = flag.removeprefix("--").replace("-", "_")
    if name == "seed":
        raise ValueError("--vary cannot vary the seed: give the number of seeds, --seeds 3 say")
    fields = {field.name: field for owner in _PANELS if owner is not Runtime for field in dataclasses.fields(owner)}
    kind = _cli_type(fields[name].type) if name in fields else str
    whole = name in _PATHS  # a sweep's own folders have commas in their names
    return name, [values] if whole else [_parsed(flag, kind, value) for value in values.split(",")]


def _parsed(flag: str, kind: Any, value: str) -> Any:
    if kind == list[float]:
        raise ValueError(f"--vary cannot vary {flag}, which is a list itself: train once with each")
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value) if kind in (int, float) else value
    except (KeyError, ValueError) as error:
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"--vary {flag} takes {words[kind]}, not {value!r}") from error


def _changes_and_runtime(
    options: dict[str, Any], machine: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Runtime]:
    """The options that were given, those of the recipe apart from those of the machine; `machine` has defaults."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    names = {field.name for field in dataclasses.fields(Runtime)}
    wanted = {name: value for name, value in (machine or {}).items() if name in names}
    wanted |= {name: given.pop(name) for name in names & given.keys()}
    return given, Runtime(**wanted)


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
    """Typer reads a command's options from its signature: give one all the recipes' options."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *_option_parameters()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


app.command("train")(_with_options(_train))
app.command("sweep")(_with_options(_sweep))


@app.command()
def recipes(
    names: Annotated[list[str] | None, typer.Argument(help="recipes whose values to show; default: list all")] = None,
    as_json: JsonOption = False,
) -> None:
    """The recipes: one for each row of the paper's tables, and those of our own.

    Examples:

      gaternet recipes

      gaternet recipes cifar10_resnet20_guided

      gaternet recipes --json
    """
    chosen = [find_recipe(name) for name in names or RECIPES]
    if as_json:
        print_json([dataclasses.asdict(recipe) for recipe in chosen])
        return
    if names:
        for recipe in chosen:
            console.print(_values(recipe))
        return
    ours, papers = Table(box=None), Table(box=None)
    for table, titles in ((ours, ("epochs",)), (papers, ("epochs", "gates", "paper's size", "paper's error"))):
        table.add_column("recipe", no_wrap=True)
        for title in titles:
            table.add_column(title, justify="right")
    ours.add_column("what it trains")
    for recipe in RECIPES.values():
        name, epochs, paper = recipe.name, str(recipe.epochs), recipe.paper
        if paper is None:
            ours.add_row(name, epochs, recipe.about)
        else:
            papers.add_row(name, epochs, f"{paper.gates or '-'}", paper.params or "", f"{paper.error:.2f} %")
    console.print(ours, "", papers)


def _values(recipe: Recipe) -> Table:
    """A recipe's options, as `gaternet train` takes them."""
    from gaternet.ledger import train_flags

    table = Table(title=recipe.name, box=None, show_header=False, title_justify="left")
    for owner, panel in _PANELS.items():
        holder = recipe if owner is Recipe else getattr(recipe, owner.__name__.lower(), None)
        for field in dataclasses.fields(owner) if holder is not None else ():
            value = getattr(holder, field.name)
            if "help" in field.metadata and value is not None:
                table.add_row(f"[dim]{panel}[/]", escaped(" ".join(train_flags({field.name: value}))))
    return table
