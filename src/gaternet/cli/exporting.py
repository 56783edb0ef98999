"""The command that writes a trained model to a file for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gaternet.cli.common import app, console, escaped, print_json, waiting
from gaternet.cli.options import DataRootOption, JsonOption, RunArgument, WhichOption


@app.command()
def export(
    run: RunArgument,
    which: WhichOption = "last",
    out: Annotated[Path | None, typer.Option(help="the file  [dim]\\[default: in RUN, such as model.onnx][/]")] = None,
    file_format: Annotated[
        Literal["onnx", "pt2"] | None,
        typer.Option("--format", help="ONNX, or torch.export's  [dim]\\[default: as --out says, or onnx][/]"),
    ] = None,
    form: Annotated[
        Literal["masked", "skipping"], typer.Option(help="compute all filters, or the open ones of one image at a time")
    ] = "masked",
    gates: Annotated[bool, typer.Option(help="output the gates beside the logits")] = True,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="take images of any size")] = False,
    int8: Annotated[
        Literal["backbone", "all"] | None,
        typer.Option(help="quantize to int8: the backbone, with exact gates, or the gater too"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="images to compare on, see train --data; default: its own")] = None,
    data_root: DataRootOption = None,
    images: Annotated[int, typer.Option(min=1, help="test images on which to measure what --int8 changes")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Write a model, its gates and its preprocessing to one file, which is compared with the model first.

    Examples:

      gaternet export runs/cifar10_resnet20_gated

      gaternet export runs/cifar10_resnet20_gated --form skipping --out fast.onnx

      gaternet export runs/cifar10_resnet20_gated --int8 backbone --json
    """
    from gaternet.export.saved import export_saved

    with waiting.status("exporting and comparing"):
        report = export_saved(
            run,
            which,
            out,
            file_format=file_format,
            form=form,
            gates=gates,
            dynamic_size=dynamic_size,
            int8=int8,
            data=data,
            data_root=data_root,
            images=images,
        )
    if as_json:
        print_json(report)
        return
    file, compared, effect = Path(report["file"]), report["compared"], report.get("int8")
    given = " and ".join(report["outputs"])
    console.print(f"{escaped(str(file))}, {file.stat().st_size / 1e6:,.1f} MB: pixels in, {given} out")
    patterns = f" with {compared['patterns']} gate patterns and under {compared['forced']} drawn ones"
    console.print(
        f"{'before quantisation, ' if effect else ''}equal to the model on {compared['images']} {report['on']}"
        f"{patterns if compared['patterns'] else ''}: logits differ by {compared['max_error']:.0e} at most, relatively"
    )
    if effect:
        before, after = (100 * effect[name] for name in ("accuracy", "int8_accuracy"))
        console.print(
            f"8 bits: accuracy {after:.2f} % instead of {before:.2f} %, the same class for "
            f"{100 * effect['same_class']:.1f} % of {effect['images']:,} test images"
        )
        if effect["gates"]:
            console.print(f"{effect['flips']:.2f} of {effect['gates']:,} gates of an image differ")
