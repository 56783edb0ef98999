"""The runs of a sweep: what is trained with which seed, where it lies, and the process that trains it."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gaternet.files import make_folder
from gaternet.ledger import changed_options, find_line, find_lines, same_images, train_flags
from gaternet.machine import PARENT
from gaternet.progress import summary
from gaternet.recipe import Recipe, Runtime, override
from gaternet.run import CONFIG, METRICS, RunDirectory

_FRAME = " │╭╮╰╯─"  # which errors in options come in
_LONGEST = 200  # bytes of a folder's name; most disks take 255


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
        self._words: str | None = None  # the last line that it printed, once it has ended
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
            self._words = self._last_line()  # now, for another sweep's run may write there

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
        return self._last_line() if self._words is None else self._words

    def _last_line(self) -> str:
        try:
            printed = (self.path / "log.txt").read_bytes()[self._printed :]
        except OSError as error:  # somebody removed it
            return f"what it printed cannot be read ({error})"
        lines = (line.strip(_FRAME) for line in reversed(printed.decode(errors="replace").splitlines()))
        return next(filter(None, lines), "it printed nothing")

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
