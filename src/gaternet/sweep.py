"""Many runs, each in a process of its own, some side by side; what was cut goes on, what is finished is kept."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gaternet.data import check_source
from gaternet.errors import Stopped, TrainingError
from gaternet.files import make_folder
from gaternet.ledger import changed_options, check_ledger, find_line, find_lines, same_images, train_flags
from gaternet.machine import PARENT, collect_signals, shared_gpu
from gaternet.models.create import create_backbone, create_extractor, create_model
from gaternet.progress import summary
from gaternet.recipe import Recipe, Runtime, override
from gaternet.recipes import find_recipe
from gaternet.run import CONFIG, METRICS, STATE, RunDirectory
from gaternet.trained import find_model

_FRAME = " │╭╮╰╯─"  # which errors in options come in
_LONGEST = 200  # bytes of a folder's name; most disks take 255
_PATIENCE = 300  # seconds in which stopped runs must have saved what they have


class Job:
    """One run of a sweep, and the process that trains it.

    Attributes:
        state: "waiting", "running", "finished", "stopped" or "failed".
        needed: whether another job, which is not finished, learns from what this one makes.
    """

    def __init__(self, recipe: Recipe, seed: int, path: Path) -> None:
        self.recipe, self.seed, self.path = recipe, seed, path
        self.name = "/".join(path.parts[-2:])
        self.state = "waiting"
        self.needed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = 0  # the signal that ended it without its leave
        self._printed = 0  # bytes of log.txt from before
        self._refusal = ""  # why it could not begin
        self._epochs: list[dict[str, Any]] = []
        self._read: tuple[int, int] | None = None  # when its metrics were changed, and their size, when they were read

    def start(self, runtime: Runtime, ledger: Path, environment: Mapping[str, str]) -> None:
        """Begin or resume the run, unless it is in the ledger; what it prints goes to log.txt in its directory.

        One that cannot begin has failed, and the others of the sweep go on.
        """
        try:
            self._start(runtime, ledger, environment)
        except (ValueError, OSError) as error:
            self.state, self._refusal = "failed", str(error)

    def _start(self, runtime: Runtime, ledger: Path, environment: Mapping[str, str]) -> None:
        if self.finished(ledger):
            self.state = "finished"
            return
        machine = {name: value for name, value in asdict(runtime).items() if value != getattr(Runtime(), name)}
        flags = train_flags({**changed_options(self.recipe), "data": self.recipe.data, **machine})
        flags += ["--out", str(self.path), "--seed", str(self.seed)]
        if self.line(ledger) is None:  # else it is trained again for those that need it
            flags += ["--ledger", str(ledger)]
        if (self.path / CONFIG).exists():
            flags.append("--resume")
        make_folder(self.path)
        with (self.path / "log.txt").open("ab") as log:  # behind what the run printed before
            self._printed = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gaternet", "train", self.recipe.name, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment, PARENT: str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
            )
        self.state = "running"

    def line(self, ledger: Path) -> dict[str, Any] | None:
        """The ledger's line of this run, or of one like it that lay elsewhere; None if there is none."""
        if (own := find_line(ledger, self.path)) is not None:
            self._check_own(own)
        found = [line for line in find_lines(ledger, self.recipe, self.seed) if same_images(line, self.recipe)]
        return own or (found[0] if found else None)

    def finished(self, ledger: Path) -> bool:
        """Whether nothing is left to do: it is in the ledger, and also here where others need it."""
        there = len(self._finished_epochs()) == self.recipe.epochs
        return self.line(ledger) is not None and (there or not self.needed)

    def _check_own(self, line: Mapping[str, Any]) -> None:
        """That a finished run in this directory is this job's; of one that goes on `train` finds it out."""
        config = RunDirectory(self.path).config()
        found = config["recipe"]["name"], changed_options(config["recipe"]), config["seed"]
        wanted = self.recipe.name, changed_options(self.recipe), self.seed
        if found != wanted or not same_images(line, self.recipe):
            raise ValueError(f"{self.path} holds another run ({line['command']}): move it, or name another --out")

    def watch(self) -> None:
        """Bring `state` up to date."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            self._killed = max(0, -code)
            self.state = "finished" if code == 0 else "stopped" if code > 128 or code < 0 else "failed"

    def stop(self) -> None:
        """Ask the process to save and end."""
        if self._process is not None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for the process to end; one that does not is killed, and resumes from its last checkpoint."""
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self.watch()

    def last_words(self) -> str:
        """The last line that the process printed, or why there was none."""
        if self._refusal:
            return self._refusal
        if self._killed:
            return f"it was killed by signal {self._killed}, as when memory is full: the same command goes on"
        lines = (self.path / "log.txt").read_bytes()[self._printed :].decode(errors="replace").splitlines()
        words = (line.strip(_FRAME) for line in reversed(lines))
        return next(filter(None, words), "it printed nothing")

    def row(self) -> list[str]:
        """For the overview: name, state, epochs, and what the last of them gave, or why it failed."""
        epochs = self._finished_epochs()
        done = f"{len(epochs)}/{self.recipe.epochs}"
        names = ("loss", "accuracy", "density")
        tested = {name: epochs[-1][f"test_{name}"] for name in names if f"test_{name}" in epochs[-1]} if epochs else {}
        gave = self.last_words() if self.state == "failed" else summary(tested) if tested else ""
        return [self.name, self.state, done, gave]

    def _finished_epochs(self) -> list[dict[str, Any]]:
        """Their metrics; the file, which may be long, is read when it has changed."""
        try:
            found = (self.path / METRICS).stat()
        except OSError:  # not begun yet
            return []
        if self._read != (now := (found.st_mtime_ns, found.st_size)):
            self._read, self._epochs = now, RunDirectory(self.path).epochs()
        return self._epochs


def make_jobs(
    recipes: Sequence[Recipe], seeds: Sequence[int], out: Path, vary: Mapping[str, Sequence[Any]] | None = None
) -> list[Job]:
    """One job for each recipe and seed; and, one option at a time, for each value of an option in `vary`.

    Each has its directory, out/RECIPE,OPTION=VALUE/seedN, shortened where that is too long. The seeds go one after
    another, so that a sweep that is cut has whole ones.

    Raises:
        ValueError: two of them would have one directory, and are not the same.
    """
    variants: dict[str, Recipe] = {}
    for recipe in recipes:
        changes = [{}, *({name: value} for name, values in (vary or {}).items() for value in values)]
        for variant in (override(recipe, change) for change in changes):
            options = changed_options(variant)
            name = _folder([recipe.name, *(f"{name}={value}".replace("/", "_") for name, value in options.items())])
            first = changed_options(variants.setdefault(name, variant))
            if first != options:  # else it has a value that the recipe has anyway, and is no other variant
                option = next(option for option in options if first.get(option) != options[option])
                raise ValueError(
                    f"{option} {first.get(option)} and {options[option]} would both be trained in {out / name}: "
                    "rename one, or train them in sweeps of their own"
                )
    return [Job(recipe, seed, out / name / f"seed{seed}") for seed in seeds for name, recipe in variants.items()]


def _folder(words: Sequence[str]) -> str:
    """A name of these words; one that is too long for a disk ends with a number that stands for the rest."""
    name = ",".join(words)
    if len(encoded := os.fsencode(name)) <= _LONGEST:
        return name
    return f"{encoded[:_LONGEST].decode(errors='ignore')},{hashlib.blake2b(encoded, digest_size=4).hexdigest()}"


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
