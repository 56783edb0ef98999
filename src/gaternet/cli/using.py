"""Commands that use and examine networks: trained ones, and those that may be gated."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from gaternet.cli.common import app, console, escaped, print_json, waiting
from gaternet.cli.options import CpuOption, DataOption, DataRootOption, JsonOption, RunArgument, WhichOption
from gaternet.recipe import Runtime


@app.command()
def evaluate(
    run: RunArgument,
    which: WhichOption = "last",
    data: DataOption = None,
    data_root: DataRootOption = None,
    cpu: CpuOption = False,
    precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"], typer.Option(help="no (float32), bf16, fp16, or auto: the run's")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Accuracy on the test images, and what the gates do there.

    Examples:

      gaternet evaluate runs/digits_resnet20_gated

      gaternet evaluate runs/digits_resnet20_gated --which best --json

      gaternet evaluate runs/cifar10_resnet20_gated --data cifar10.npz
    """
    from accelerate import PartialState

    from gaternet.evaluate import evaluate_saved

    metrics = evaluate_saved(run, which, data, Runtime(cpu=cpu, precision=precision, data_root=data_root))
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(metrics)
        return
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{metrics['images']:,}")
    table.add_row("parameters", f"{metrics['parameters'] / 1e6:.2f}M")
    table.add_row("precision", metrics["precision"].replace("no", "full"))
    table.add_row("accuracy", f"{100 * metrics['accuracy']:.2f} %")
    table.add_row("top-5 accuracy", f"{100 * metrics['top5_accuracy']:.2f} %")
    table.add_row("loss", f"{metrics['loss']:.4f}")
    if "density" in metrics:
        table.add_row("open gates", f"{100 * metrics['density']:.1f} % on average")
        shares = [f"{100 * metrics[name]:.1f} % {text}" for name, text in _GATE_SHARES.items()]
        table.add_row("", ", ".join(shares))
        million = {name: f"{metrics[f'{name}_macs'] / 1e6:,.1f}M" for name in ("gated", "gater", "backbone")}
        text = f"{million['gated']} of the backbone on average ({million['backbone']} with all gates open), "
        text += f"{million['gater']} of the gater"
        table.add_row("MACs an image", text)
    else:
        table.add_row("MACs an image", f"{metrics['backbone_macs'] / 1e6:,.1f}M")
    console.print(table)


_GATE_SHARES = {"always_on": "always open", "always_off": "always closed", "dependent": "dependent on the image"}


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="a run directory, a saved model, or an exported .onnx file")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    which: WhichOption = "last",
    top: Annotated[int, typer.Option(min=1, help="classes to show")] = 5,
    as_json: JsonOption = False,
) -> None:
    """The top classes of image files, and how many gates each image opened.

    Examples:

      gaternet predict runs/cifar10_resnet20_gated cat.jpg dog.png

      gaternet predict runs/cifar10_resnet20_gated *.jpg --top 1 --json

      gaternet predict model.onnx cat.jpg
    """
    from gaternet.predict import load
    from gaternet.predict import predict as run_predict

    unread: list[ValueError] = []
    predictions = run_predict(*load(run, which), images, top, note=unread.append)
    table = Table("image", "classes", "open gates")
    for prediction in predictions:
        classes = "  ".join(f"{escaped(name)} {100 * share:.1f} %" for name, share in prediction.classes)
        opened = "not known" if run.is_file() else "all"
        if prediction.num_gates:
            opened = f"{prediction.open_gates} of {prediction.num_gates}"
        table.add_row(escaped(prediction.image), classes, opened)
    if as_json:
        print_json([dataclasses.asdict(prediction) for prediction in predictions])
    elif predictions:
        console.print(table)
    if len(unread) > 1:
        raise ValueError(f"{len(unread)} of {len(images)} files could not be read, the first of them: {unread[0]}")
    if unread:
        raise unread[0]


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or saved models; several are compared")],
    which: WhichOption = "last",
    data: DataOption = None,
    data_root: DataRootOption = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the page  [dim]\\[default: RUN/report; of several, report][/]")
    ] = None,
    samples: Annotated[int, typer.Option(min=10, help="images on the map, drawn at random")] = 2000,
    forced: Annotated[int, typer.Option(min=0, help="images for the part with forced gates; 0 leaves it out")] = 300,
    cpu: CpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """A self-contained HTML page of pictures that shows what the gates do on the test images.

    Examples:

      gaternet report runs/digits_resnet20_gated

      gaternet report runs/cifar10_resnet56_gated --forced 0 --out pages/resnet56

      gaternet report runs/first runs/second --out pages/both
    """
    from gaternet.report.runs import report_runs

    runtime = Runtime(cpu=cpu, data_root=data_root)
    with waiting.status("looking at the gates"):
        pages = report_runs(runs, which, data, out, runtime, samples=samples, forced=forced)
    if as_json:
        print_json([str(path) for path in pages])
        return
    for path in pages:
        console.print(escaped(f"the report is {path}"))


@app.command()
def explore(
    run: RunArgument,
    which: WhichOption = "last",
    data: DataOption = None,
    data_root: DataRootOption = None,
    images: Annotated[int, typer.Option(min=1, help="training images to look for similar gates among")] = 2000,
    host: Annotated[str, typer.Option(help="address to serve; the default is for this machine alone")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: the first free one from 7860 on")] = None,
) -> None:
    """A local web page: drop an image, see its gates layer by layer, flip them by hand.

    Examples:

      gaternet explore runs/cifar10_resnet20_gated

      gaternet explore runs/cifar10_resnet20_gated --data cifar10.npz --port 8000
    """
    from gaternet.explore import Explorer
    from gaternet.explore import explore as serve

    with waiting.status("reading images"):
        explorer = Explorer.of_run(run, which, data, data_root, images)
    serve(explorer, f"Gates of {run.resolve().name}", host, port)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a network of timm's, torchvision's or ours, or a run or saved model")],
    batch_size: Annotated[list[int], typer.Option(min=1, help="images at once; may be repeated")] = [1, 16],  # noqa: B006
    density: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="share of gates drawn open, may be repeated; default: a run's own, else 0.75, 0.5, 0.25",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="dense engine to compare with, may be repeated: eager, channels_last, inductor, onnxruntime, "
            "openvino; default: all that are installed"
        ),
    ] = None,
    select: Annotated[
        Literal["residual", "all"] | None,
        typer.Option("--sites", help="gated filters of a network  [dim]\\[default: all][/]"),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="side of a network's images in pixels  [dim]\\[default: 224][/]")
    ] = None,
    data: Annotated[str | None, typer.Option(help="images for a run, see train --data; default: its own")] = None,
    data_root: DataRootOption = None,
    which: Annotated[
        Literal["last", "best"] | None, typer.Option(help="which model of a run  [dim]\\[default: last][/]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times that each is measured, in turn")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Time plain, masked and skipped computation on the CPU, beside each other: milliseconds and MACs.

    Examples:

      gaternet bench timm:resnet50 --batch-size 1 --density 0.5

      gaternet bench runs/cifar10_resnet56_gated --batch-size 1 --batch-size 64

      gaternet bench resnet56 --image-size 32 --engine onnxruntime --engine openvino --json
    """
    import torch

    from gaternet.skipping.bench import bench as time_batch
    from gaternet.skipping.dense import ENGINES

    with waiting.status("planning"):
        network, images = _model_and_images(model, max(batch_size), select, image_size, data, data_root, which)
    densities = density or ([] if Path(model).exists() else [0.75, 0.5, 0.25])
    timings, notes = [], dict[str, None]()
    for batch in batch_size:
        with waiting.status(f"timing {batch} at a time"):
            chosen = engine or ENGINES
            timings += time_batch(network, images[:batch], densities, chosen, rounds=rounds, note=notes.setdefault)
    if as_json:
        print_json([{**dataclasses.asdict(t), "images_per_second": t.images_per_second} for t in timings])
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
        console.print(table, "")
    threads = torch.get_num_threads()
    console.print(
        f"[dim]medians of a batch on {threads} threads; MMACs an image; x dense: over the fastest dense "
        "engine, in the median of the turns[/]"
    )
    for note in notes:
        console.print(escaped(note))


def _model_and_images(
    model: str,
    count: int,
    select: Literal["residual", "all"] | None,
    image_size: int | None,
    data: str | None,
    data_root: str | None,
    which: Literal["last", "best"] | None,
) -> Any:
    """A GaterNet and a batch for it: of a run with test images, of a network with noise."""
    import torch

    of_runs = {"--data": data, "--data-root": data_root, "--which": which}
    of_networks = {"--sites": select, "--image-size": image_size}
    known = Path(model).exists()
    for flag, value in (of_networks if known else of_runs).items():
        if value is not None:
            raise ValueError(f"{flag} is for {'networks by name' if known else 'runs'}, not for {model}: leave it out")
    if not known:
        from gaternet.gating import gate
        from gaternet.method import GaterNet
        from gaternet.models import create_model

        torch.manual_seed(0)
        images = torch.randn(count, 3, image_size or 224, image_size or 224)
        backbone = create_model(model, 1000).eval()
        if isinstance(backbone, GaterNet):
            if select is not None:
                raise ValueError(f"{model} is gated as published: leave --sites out, or name the plain network")
            return backbone, images
        return gate(backbone, images[:1], sites=select or "all"), images
    from gaternet.trained import Trained

    run = Trained.open_gated(model, which or "last", data)
    _, test = run.load_sets(data_root)
    return run.network, run.preprocessing.normalize(test.take(i % len(test) for i in range(count)))


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="a network of timm's, torchvision's or ours, or a run or saved model")],
    select: Annotated[Literal["residual", "all"], typer.Option("--sites", help="which filters")] = "residual",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="side of the images in pixels; default: 224, of a run its own")
    ] = None,
    in_chans: Annotated[
        int | None, typer.Option(min=1, help="channels of the images; default: 3, of a run its own")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Which filters of a network can be gated, what that saves, and for the others why not.

    Examples:

      gaternet sites timm:resnet50

      gaternet sites torchvision:mobilenet_v3_small --sites all --json

      gaternet sites resnet56 --image-size 32

      gaternet sites runs/cifar10_resnet20 --sites all
    """
    import torch

    from gaternet.cost import CostModel
    from gaternet.graph import read_graph
    from gaternet.sites import examine

    backbone, shape = _backbone_and_shape(model, image_size, in_chans)
    graph = read_graph(backbone, torch.zeros(2, *shape))
    report = examine(graph, select)
    cost = CostModel(graph, report.sites)
    savings, owners = cost.savings(), {site.start: site for site in reversed(report.sites)}
    # Of each site the least and the most that a gate of its own saves
    saved = [
        [int(pick(savings[site.start : site.stop])) for pick in (min, max)] if owners[site.start] is site else None
        for site in report.sites
    ]
    if as_json:
        gated = [{**dataclasses.asdict(site), "saves": saves} for site, saves in zip(report.sites, saved, strict=True)]
        left_out, gateable = report.left_out, cost.gateable()
        print_json({"sites": gated, "left_out": left_out, "macs": cost.dense, "gateable": gateable})
        return
    table = Table(box=None)
    for title in ("gated filters", "gates act behind", "role"):
        table.add_column(title, no_wrap=True)
    for title in ("gates", "MACs each saves"):
        table.add_column(title, justify="right")
    for site, saves in zip(report.sites, saved, strict=True):
        text = " to ".join(f"{macs:,}" for macs in sorted(set(saves))) if saves else "shared"
        table.add_row(site.conv, site.name, site.role, f"{site.channels:,}", text)
    console.print(table)
    gates = max(site.stop for site in report.sites)
    share = f"{100 * cost.gateable():.1f} % of {cost.dense / 1e6:,.1f}M MACs"
    console.print(f"\n{gates:,} gates at {len(report.sites)} sites; with all of them closed, {share} are saved")
    if report.left_out:
        console.print("\nnot gated:")
        reasons: dict[str, list[str]] = {}
        for name, reason in report.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            console.print(escaped(f"  {some}: {reason}"))


def _backbone_and_shape(model: str, image_size: int | None, in_chans: int | None) -> tuple[Any, list[int]]:
    """A plain network, or the one in a run, and what its images are: [channels, height, width]."""
    from gaternet.data import Preprocessing
    from gaternet.method import GaterNet
    from gaternet.models import create_model
    from gaternet.trained import Trained

    seen = Preprocessing(224, 224, (0.0,) * 3, (1.0,) * 3)
    if Path(model).exists():
        run = Trained.open(model)
        network = run.network
        if run.metadata.get("preprocessing"):
            seen = run.preprocessing
            if in_chans not in (None, seen.channels):
                raise ValueError(f"{model} takes images of {seen.channels} channels: leave --in-chans out")
    else:
        network = create_model(model, 1000, in_chans or 3)
        if isinstance(network, GaterNet):
            plain = model.removesuffix("_gated")
            raise ValueError(f"{model} is gated as published: name {plain}, or a run, to see what can be gated")
    shape = [in_chans or seen.channels, image_size or seen.height, image_size or seen.width]
    return network.backbone if isinstance(network, GaterNet) else network, shape
