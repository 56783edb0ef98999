"""What training shows while it runs: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL = 30.0  # seconds between lines where the output is no terminal


class TrainingDisplay:
    """Shows epoch, step, loss, accuracy, density, images/s and the time left.

    Args:
        epochs: epochs of the whole run.
        steps_per_epoch: steps of each.
        done: steps already done, in a run that is resumed.
        quiet: show nothing (the processes besides the main one).
    """

    def __init__(self, epochs: int, steps_per_epoch: int, done: int = 0, quiet: bool = False) -> None:
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.console = Console(quiet=quiet)
        self.live = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            expand=True,
        )
        total = epochs * steps_per_epoch
        self.task = self.live.add_task("train", total=total, completed=done, epoch=f"-/{epochs}", status="")
        self.last_line = time.monotonic()

    def __enter__(self) -> "TrainingDisplay":
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def step(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Show the state after `step` steps of the whole run; `epoch` counts from 0."""
        status = summary(metrics)
        self.live.update(self.task, completed=step, epoch=f"{epoch + 1}/{self.epochs}", status=status)
        if not self.console.is_terminal and time.monotonic() - self.last_line > _PLAIN_INTERVAL:
            within = step - epoch * self.steps_per_epoch
            self.line(f"epoch {epoch + 1}/{self.epochs}  step {within}/{self.steps_per_epoch}  {status}")

    def epoch(self, epoch: int, train: Mapping[str, float], test: Mapping[str, float]) -> None:
        """One line that stays, for a finished epoch."""
        shown = {name: value for name, value in train.items() if name in ("loss", "accuracy")}
        self.line(f"epoch {epoch + 1}/{self.epochs}  train {summary(shown)}  test {summary(test)}")

    def line(self, text: str) -> None:
        """A line that stays, above the live display."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.last_line = time.monotonic()


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics that people watch, in one short line."""
    shown = [f"loss {metrics['loss']:.4f} acc {100 * metrics['accuracy']:.2f}%"]
    if "density" in metrics:
        shown.append(f"open {100 * metrics['density']:.1f}%")
    if "images_per_second" in metrics:
        shown.append(f"{metrics['images_per_second']:.0f} img/s")
    return "  ".join(shown)
