"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

RunArgument = Annotated[Path, typer.Argument(help="a run directory, or a saved model")]
WhichOption = Annotated[
    Literal["last", "best"], typer.Option(help="which model of a run: of the last or the best epoch")
]
DataOption = Annotated[str | None, typer.Option(help="another set than it was trained on, see train --data")]
DataRootOption = Annotated[str | None, typer.Option(help="folder of torchvision's data sets")]
CpuOption = Annotated[bool, typer.Option("--cpu", help="run on the CPU even if there is a GPU")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
