"""Errors of training, which the command line knows without loading that; of full memory; and words for messages."""

from collections.abc import Sequence
from typing import Any


class TrainingError(RuntimeError):
    """Training cannot go on, and the program is not to blame; the message names the mend."""


class Stopped(TrainingError):  # noqa: N818 (it is no failure)
    """A signal (Ctrl-C, SIGTERM) ended training; its state is saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def first_line(error: BaseException) -> str:
    """What an error says, without what is below it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_misfit(error: BaseException) -> str:
    """The first of the keys and shapes that do not fit, of which PyTorch lists all; or what else the error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1:2] or lines or [type(error).__name__])[0]


def fills_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full, the processor's or a GPU's."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # PyTorch's
    return full or "allocate memory" in first_line(error)


def some(classes: Sequence[Any]) -> str:
    """Names of classes on one line, the first ten of many; what is no UTF-8, as in names of folders, in ASCII."""
    words = (" ".join(str(name).split()).encode(errors="backslashreplace").decode() for name in classes[:10])
    return ", ".join(words) + (" ..." if len(classes) > 10 else "")
