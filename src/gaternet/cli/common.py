"""What the commands share: the app, the console, and what becomes of errors."""

import io
import json
import math
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from gaternet import __version__
from gaternet.errors import Stopped, TrainingError, fills_memory, first_line

app = typer.Typer(
    help="GaterNet: a network that looks at an image first and decides which filters of a CNN run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(soft_wrap=True)
waiting = Console(stderr=True)  # shows what is being done; its output is not the command's


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point: errors that a user can mend become one sentence and an exit code, not a traceback."""
    _share_cores()
    for stream in (sys.stdout, sys.stderr):  # a character that a terminal cannot show ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        code = _exit_code(error)
        if code is None:
            raise
        prefix = "" if code > 128 else "[bold red]error:[/] "  # a run that was told to stop has not failed
        text = str(error)
        if fills_memory(error):
            text = f"memory is full ({first_line(error)}): take smaller batches or images, or close other programs"
        Console(stderr=True, soft_wrap=True).print(prefix + escaped(text), highlight=False)
        sys.exit(code)


def _share_cores() -> None:
    """Let threads that wait for each other give their cores to other programs, before PyTorch is loaded.

    By default they hold them for milliseconds, at each of the many short waits of a training step: beside another busy
    program on two cores, small networks then hardly train at all.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _exit_code(error: Exception) -> int | None:
    if isinstance(error, ValueError):
        return 2
    if isinstance(error, OSError):
        return 1
    if isinstance(error, Stopped):
        return 128 + error.signum
    return 1 if isinstance(error, TrainingError) or fills_memory(error) else None


def print_json(data: Any) -> None:
    """Print plain data for a program; what is no finite number is null, for JSON knows none."""
    print(json.dumps(_finite(data), allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def escaped(text: str) -> str:
    """Text that rich prints as it is, brackets too."""
    from rich.markup import escape

    return escape(text)
