"""The command line: it parses, calls, prints. Heavy imports wait until a command needs them."""

import dataclasses
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from gaternet.recipe import Augmentation, Gating, Optimizer, Recipe, Runtime, override
from gaternet.recipes import RECIPES, find_recipe

app = typer.Typer(
    help="GaterNet: a network that looks at an image first and decides which filters of a CNN run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_console = Console(soft_wrap=True)
_Run = Annotated[Path, typer.Argument(help="a run directory, or a saved model")]
_Which = Annotated[Literal["last", "best"], typer.Option(help="which model of a run: of the last or the best epoch")]
_Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
_PANELS = {Recipe: "Recipe", Augmentation: "Augmentation", Optimizer: "Optimizer", Gating: "Gates", Runtime: "Machine"}


def main() -> None:
    """Entry point: errors that a user can mend become one sentence and an exit code, not a traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        code = _exit_code(error)
        if code is None:
            raise
        prefix = "" if code > 128 else "[bold red]error:[/] "  # a run that was told to stop has not failed
        Console(stderr=True, soft_wrap=True).print(prefix + _escape(str(error)), highlight=False)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    if isinstance(error, ValueError):
        return 2
    if isinstance(error, OSError):
        return 1
    from gaternet.train import Stopped, TrainingError

    if isinstance(error, Stopped):
        return 128 + error.signum
    return 1 if isinstance(error, TrainingError) else None


def _train(
    recipe: Annotated[str, typer.Argument(help="name of a recipe; [bold]gaternet recipes[/] lists them")],
    out: Annotated[Path | None, typer.Option(help="run directory  [dim]\\[default: runs/RECIPE][/]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights, order, augmentation and noise")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in the run directory")] = False,
    as_json: _Json = False,
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
def evaluate(
    run: _Run,
    which: _Which = "last",
    data: Annotated[str | None, typer.Option(help="another set than it was trained on, see train --data")] = None,
    data_root: Annotated[str | None, typer.Option(help="where torchvision's data sets lie")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="use the processor even where there is a GPU")] = False,
    as_json: _Json = False,
) -> None:
    """Accuracy on the test images, and what the gates do there.

    Examples:

      gaternet evaluate runs/digits_resnet20_gated

      gaternet evaluate runs/digits_resnet20_gated --which best --json

      gaternet evaluate runs/cifar10_resnet20_gated --data cifar10.npz
    """
    from gaternet.evaluate import evaluate_saved

    metrics = evaluate_saved(run, which, data, data_root, cpu)
    if as_json:
        print(json.dumps(metrics))
        return
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{metrics['images']:,}")
    table.add_row("accuracy", f"{100 * metrics['accuracy']:.2f} %")
    table.add_row("top-5 accuracy", f"{100 * metrics['top5_accuracy']:.2f} %")
    table.add_row("loss", f"{metrics['loss']:.4f}")
    if "density" in metrics:
        table.add_row("open gates", f"{100 * metrics['density']:.1f} % on average")
        shares = [f"{100 * metrics[name]:.1f} % {text}" for name, text in _GATE_SHARES.items()]
        table.add_row("", ", ".join(shares))
    _console.print(table)


_GATE_SHARES = {"always_on": "always open", "always_off": "always closed", "dependent": "dependent on the image"}


@app.command()
def predict(
    run: _Run,
    images: Annotated[list[Path], typer.Argument(help="image files")],
    which: _Which = "last",
    top: Annotated[int, typer.Option(min=1, help="classes to show")] = 5,
    as_json: _Json = False,
) -> None:
    """The likeliest classes of image files, and how many filters each image opened.

    Examples:

      gaternet predict runs/cifar10_resnet20_gated cat.jpg dog.png

      gaternet predict runs/cifar10_resnet20_gated *.jpg --top 1 --json
    """
    from gaternet.checkpoint import load_model
    from gaternet.predict import predict as run_predict
    from gaternet.run import find_model

    network, metadata = load_model(find_model(run, which))
    predictions = run_predict(network, metadata, images, top)
    if as_json:
        print(json.dumps([dataclasses.asdict(prediction) for prediction in predictions]))
        return
    table = Table("image", "classes", "open filters")
    for prediction in predictions:
        classes = "  ".join(f"{_escape(name)} {100 * share:.1f} %" for name, share in prediction.classes)
        opened = f"{prediction.open_filters} of {prediction.gated_filters}" if prediction.gated_filters else "all"
        table.add_row(_escape(prediction.image), classes, opened)
    _console.print(table)


@app.command()
def recipes(as_json: _Json = False) -> None:
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
    _console.print(table)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a network of timm's, torchvision's or ours, or a run or saved model")],
    batch_size: Annotated[list[int], typer.Option(min=1, help="images at once; may be repeated")] = [1, 16],  # noqa: B006
    density: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="share of open gates, drawn at random; default: those of the run"),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="dense engine to compare with; default: all that are installed")
    ] = None,
    select: Annotated[Literal["residual", "all"], typer.Option("--sites", help="gated filters of a network")] = "all",
    image_size: Annotated[int, typer.Option(min=1, help="side of a network's images in pixels")] = 224,
    data: Annotated[str | None, typer.Option(help="images for a run, see train --data; default: its own")] = None,
    which: _Which = "last",
    rounds: Annotated[int, typer.Option(min=1, help="turns that each takes")] = 5,
    as_json: _Json = False,
) -> None:
    """Time plain, masked and skipped computation beside each other: milliseconds, images a second, MACs.

    Examples:

      gaternet bench timm:resnet50 --batch-size 1 --density 0.5

      gaternet bench runs/cifar10_resnet56_gated --batch-size 1 --batch-size 64

      gaternet bench resnet56 --image-size 32 --engine onnxruntime --engine openvino --json
    """
    import torch

    from gaternet.skipping.bench import bench as time_batch
    from gaternet.skipping.dense import ENGINES

    with _console.status("planning"):
        network, images = _model_and_images(model, max(batch_size), select, image_size, data, which)
    densities = density or ([] if Path(model).exists() else [0.75, 0.5, 0.25])
    timings, notes = [], dict[str, None]()
    for batch in batch_size:
        with _console.status(f"timing {batch} at a time"):
            chosen = engine or ENGINES
            timings += time_batch(network, images[:batch], densities, chosen, rounds=rounds, note=notes.setdefault)
    if as_json:
        print(json.dumps([{**dataclasses.asdict(t), "images_per_second": t.images_per_second} for t in timings]))
        return
    for batch in batch_size:
        rows = [timing for timing in timings if timing.batch == batch]
        table = Table(box=None)
        for title in (f"{batch} at a time", "open", "MMACs", "ms", "p10", "p90", "images/s", "x dense"):
            table.add_column(title, justify="left" if "time" in title else "right", no_wrap=True)
        for row in rows:
            opened = "" if row.density is None else f"{100 * row.density:.0f} %"
            times = [f"{milliseconds:.2f}" for milliseconds in (row.median, row.p10, row.p90)]
            share = "" if row.over_dense is None else f"{row.over_dense:.2f}"
            table.add_row(row.name, opened, f"{row.macs / 1e6:,.1f}", *times, f"{row.images_per_second:,.0f}", share)
        _console.print(table, "")
    threads = torch.get_num_threads()
    _console.print(
        f"[dim]medians of a batch on {threads} threads; MMACs an image; x dense: over the fastest dense "
        "engine, in the median of the turns[/]"
    )
    for note in notes:
        _console.print(_escape(note))


def _model_and_images(model: str, count: int, select: Any, image_size: int, data: str | None, which: Any) -> Any:
    """A GaterNet and a batch for it: of a run with test images, of a network with noise."""
    import torch

    if not Path(model).exists():
        from gaternet.gating import gate
        from gaternet.models import create_model

        torch.manual_seed(0)
        images = torch.randn(count, 3, image_size, image_size)
        return gate(create_model(model.removesuffix("_gated"), 1000).eval(), images[:1], sites=select), images
    from gaternet.checkpoint import load_model
    from gaternet.data import Preprocessing
    from gaternet.evaluate import load_test_set
    from gaternet.method import GaterNet
    from gaternet.run import find_model

    network, metadata = load_model(find_model(Path(model), which))
    if not isinstance(network, GaterNet):
        raise ValueError(f"{model} has no gates: name a network to gate it, or a gated run")
    source = data or metadata.get("trained", {}).get("data")
    if source is None:
        raise ValueError(f"{model} does not say what it was trained on: name the data with --data")
    test = load_test_set(source, metadata)
    pixels = torch.stack([torch.as_tensor(test[i % len(test)][0]) for i in range(count)])
    return network, Preprocessing.from_metadata(metadata).normalize(pixels)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="a network of timm's, torchvision's or ours, or a run or saved model")],
    select: Annotated[Literal["residual", "all"], typer.Option("--sites", help="which filters")] = "residual",
    image_size: Annotated[int, typer.Option(min=1, help="side of the images in pixels")] = 224,
    in_chans: Annotated[int, typer.Option(min=1, help="channels of the images")] = 3,
    as_json: _Json = False,
) -> None:
    """Which filters of a network can be gated, what that saves, and for the others why not.

    Examples:

      gaternet sites timm:resnet50

      gaternet sites torchvision:mobilenet_v3_small --sites all --json

      gaternet sites resnet56 --image-size 32
    """
    import torch

    from gaternet.cost import CostModel
    from gaternet.graph import read_graph
    from gaternet.models import create_model
    from gaternet.sites import examine

    backbone = create_model(model.removesuffix("_gated"), 1000, in_chans)
    graph = read_graph(backbone, torch.zeros(2, in_chans, image_size, image_size))
    report = examine(graph, select)
    cost = CostModel(graph, report.sites)
    savings = cost.savings()
    if as_json:
        gated = [{**dataclasses.asdict(site), "saves": int(savings[site.start])} for site in report.sites]
        print(
            json.dumps({"sites": gated, "left_out": report.left_out, "macs": cost.dense, "gateable": cost.gateable()})
        )
        return
    table = Table(box=None)
    for title in ("gated filters", "gates act behind", "role"):
        table.add_column(title, no_wrap=True)
    for title in ("gates", "MACs each saves"):
        table.add_column(title, justify="right")
    for site in report.sites:
        saves = "shared" if site.role == "depthwise" else f"{int(savings[site.start]):,}"
        table.add_row(site.conv, site.name, site.role, f"{site.channels:,}", saves)
    _console.print(table)
    gates = max(site.stop for site in report.sites)
    share = f"{100 * cost.gateable():.1f} % of {cost.dense / 1e6:,.1f}M MACs"
    _console.print(f"\n{gates:,} gates at {len(report.sites)} sites; with all of them closed, {share} are saved")
    if report.left_out:
        _console.print("\nnot gated:")
        reasons: dict[str, list[str]] = {}
        for name, reason in report.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            _console.print(_escape(f"  {some}: {reason}"))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
