"""Errors of training, which the command line knows without loading that; words of errors that others raise."""


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
