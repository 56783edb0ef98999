"""Many runs, each in a process of its own, some side by side; what was cut goes on, what is finished is kept."""

import os
import signal
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gaternet.data import check_source
from gaternet.errors import Stopped, TrainingError
from gaternet.jobs import Job
from gaternet.ledger import changed_options, check_ledger, train_flags
from gaternet.machine import collect_signals, shared_gpu
from gaternet.models.create import create_backbone, create_extractor, create_model
from gaternet.recipe import Recipe, Runtime
from gaternet.recipes import find_recipe
from gaternet.run import STATE
from gaternet.trained import find_model

_PATIENCE = 300  # seconds in which stopped runs must have saved what they have


def sweep(
    jobs: Sequence[Job],
    ledger: Path,
    runtime: Runtime | None = None,
    at_once: int = 1,
    minutes: float | None = None,
) -> list[dict[str, Any]]:
    """Run jobs to their end; each appends a line to the ledger when it is finished.

    Args:
        jobs: see `make_jobs`. Those in the ledger are not run again, but where another learns from them and they are
            gone; those that were cut go on.
        ledger: a file, see `gaternet.ledger`.
        runtime: how each uses this machine.
        at_once: number of runs side by side: they share one GPU, or take turns at several, or share the cores.
        minutes: stop after so many, with all saved.

    Returns:
        The ledger's lines of the jobs, in their order.

    Raises:
        ValueError: an argument is out of range, the ledger is damaged, or see `check_jobs`; no run was begun.
        Stopped: time was up, or a signal came; the same call goes on.
        TrainingError: some runs failed; the others are finished.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, not {at_once}")
    if minutes is not None and not minutes >= 0:  # NaN is neither, and no time would ever be up
        raise ValueError(f"minutes must be at least 0, not {minutes}")
    runtime = runtime or Runtime()
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    gpus = [] if runtime.cpu else _visible_gpus()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // at_once)))
    waiting, running = deque(jobs), dict[int, Job]()
    check_ledger(ledger)
    check_jobs(jobs, ledger)
    sharing = shared_gpu() if len(gpus) == 1 and at_once > 1 else nullcontext({})
    with sharing as shared, _Overview(jobs) as overview, collect_signals() as received, _ended(running):
        while waiting or running:
            for slot in range(at_once):
                if slot not in running and (job := _next(waiting, running.values())):
                    running[slot] = job
                    environment = {"OMP_NUM_THREADS": threads, **shared}
                    if len(gpus) > 1:
                        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
                    running[slot].start(runtime, ledger, environment)
            for job in running.values():
                job.watch()
            for slot in [slot for slot, job in running.items() if job.state != "running"]:
                del running[slot]
            if (waiting or running) and (received or time.monotonic() > deadline):
                _stop_all(running.values())
                count = f"{sum(job.state == 'finished' for job in jobs)} of {len(jobs)} runs are finished"
                why = "stopped" if received else f"stopped after {minutes:g} minutes"
                signum = received[0] if received else signal.SIGTERM
                raise Stopped(f"{why}, with all saved; {count}: the same command goes on", signum)
            overview.show()
            time.sleep(0.2)
    if bad := [job for job in jobs if job.state != "finished"]:
        raise TrainingError(f"{len(bad)} of {len(jobs)} runs failed, {bad[0].name} with: {bad[0].last_words()}")
    lines = [job.line(ledger) for job in jobs]
    return [line for line in lines if line is not None]


def check_jobs(jobs: Sequence[Job], ledger: Path) -> None:
    """Find out what would keep jobs from being trained, as far as that takes no time; those in the ledger are not.

    Raises:
        ValueError: a model cannot be built, or there are no such data, teacher or weights, and no earlier job makes
            them.
    """
    built, made, unfinished = list[Recipe](), list[Path](), list[Job]()
    for job in reversed(jobs):  # what learns from others comes after them
        job.needed = any(_lies_in(source, [job.path.resolve()]) for other in unfinished for source in _sources(other))
        with suppress(ValueError, OSError):  # its directory is damaged, which keeps no other from being trained
            unfinished += [] if job.finished(ledger) else [job]
    for job in jobs:
        try:
            if job in unfinished:
                if job.recipe not in built:
                    _check_model(job.recipe)
                    built.append(job.recipe)
                check_source(job.recipe.data)
                _check_starts(job, made)
        except ValueError as error:
            raise ValueError(f"{job.name} cannot be trained: {error}") from error
        made.append(job.path.resolve())


def _check_model(recipe: Recipe) -> None:
    """Builds it without its numbers, where PyTorch can; the data decide how many classes it has, and where gates lie.

    How it is named to the process that trains it is checked as well.
    """
    find_recipe(recipe.name)
    train_flags(changed_options(recipe))
    gating = recipe.gating
    with torch.device("meta"), suppress(RuntimeError, TypeError):
        if recipe.model is not None:
            create_model(recipe.model, **recipe.gater_options())
        else:
            create_backbone(str(recipe.backbone))
            create_extractor("resnet20" if gating.extractor == "auto" else gating.extractor, shrink=gating.shrink or 1)


def _check_starts(job: Job, made: Collection[Path]) -> None:
    """That what a run learns from is there, or in one of the directories that are `made` before."""
    for source in _sources(job):
        if not _lies_in(source, made) and (source == job.recipe.distillation.teacher or not Path(source).is_file()):
            find_model(Path(source))


def _sources(job: Job) -> list[str]:
    """The teacher and the weights, from which a run that goes on does not start, that are read when it begins."""
    recipe, sources = job.recipe, [job.recipe.distillation.teacher]
    begun = False
    with suppress(OSError):  # it may not be read
        begun = (job.path / STATE).exists()
    if not begun:
        sources += [recipe.gating.backbone_from, recipe.gating.extractor_from if recipe.gated else None]
    return [source for source in sources if source]


def _lies_in(source: str, directories: Collection[Path]) -> bool:
    return any(Path(source).resolve().is_relative_to(path) for path in directories)


def _next(waiting: deque[Job], running: Collection[Job]) -> Job | None:
    """Takes the first that reads nothing of what others are still to make."""
    unfinished = [job.path.resolve() for job in running]
    for job in waiting:
        if not any(_lies_in(source, unfinished) for source in _sources(job)):
            waiting.remove(job)
            return job
        unfinished.append(job.path.resolve())
    return None


def _visible_gpus() -> list[str]:
    """Those that this process was given, by the names that CUDA_VISIBLE_DEVICES has for them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _ended(running: Mapping[int, Job]) -> Iterator[None]:
    """No run goes on when the sweep does not."""
    try:
        yield
    finally:
        _stop_all(running.values())


def _stop_all(jobs: Collection[Job]) -> None:
    for job in jobs:
        job.stop()
    deadline = time.monotonic() + _PATIENCE
    for job in jobs:
        job.wait(max(0.0, deadline - time.monotonic()))


class _Overview:
    """A table of all jobs: live on a terminal, elsewhere a line for each change."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.shown = jobs, dict[str, list[str]]()
        self.console = Console(soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False)
        self.due = 0.0

    def __enter__(self) -> "_Overview":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.show(at_once=True)
        finally:
            self.live.stop()

    def show(self, at_once: bool = False) -> None:
        """Show what has changed, at most once a second."""
        if time.monotonic() < self.due and not at_once:
            return
        self.due = time.monotonic() + 1
        rows = [job.row() for job in self.jobs]
        if self.console.is_terminal:
            table = Table("run", "state", "epochs", "test", box=None)
            for row in rows:
                table.add_row(*map(Text, row), style="dim" if row[1] == "waiting" else None)
            self.live.update(table, refresh=True)
            return
        for row in rows:
            if row != self.shown.get(row[0]) and row[1] != "waiting":
                self.console.print("  ".join(row), highlight=False, markup=False)
            self.shown[row[0]] = row
