"""A run directory: what one training run leaves behind.

    config.json     recipe, runtime, seed, preprocessing, versions, machine, command; where else the run went on
    metrics.jsonl   one line every few steps and one an epoch
    last/, best/    the model after the last epoch, and after the one with the highest test accuracy
    training.pt     what `--resume` continues from

The checkpoint in training.pt stands for everything before it: on resuming, later lines of metrics.jsonl are dropped.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from gaternet import checkpoint, files
from gaternet.locks import lock_folder, unlock_folder
from gaternet.provenance import describe_machine, now
from gaternet.recipe import TOLD, Recipe, data_name

CONFIG, METRICS, STATE = "config.json", "metrics.jsonl", "training.pt"


class RunDirectory:
    """Reads and writes one run directory; see the module's text for what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def check(self, resume: bool) -> None:
        """ValueError if there is a run to overwrite, or none to resume."""
        there = (self.path / CONFIG).exists()
        if there and not resume:
            raise ValueError(f"{self.path} holds a run already: continue it with --resume, or name another --out")
        if resume and not there:
            raise ValueError(f"{self.path} holds no run to resume: leave --resume out to start one")

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin a new run here; ValueError if one is here already, so that nothing is overwritten."""
        files.make_folder(self.path)
        with self._holding():  # first of all: of two that start at the same time one is refused
            self.check(resume=False)
            files.write_json(self.path / CONFIG, {**config, "started": now(), **describe_machine()})

    def resume(self, config: Mapping[str, Any], main: bool = True) -> dict[str, Any] | None:
        """The training state to continue from, None where none was saved yet.

        The images may lie elsewhere now, in a file or folder of the same name.

        Raises:
            ValueError: there is no run here, it has other options or images, or another process is training it.
        """
        self.check(resume=True)
        self._check_same(config)
        with self._holding() if main else nullcontext():
            if main:
                self._remove_leftovers()
            state = self._load_state()
            if main:
                step = state["step"] if state else 0
                kept = [line for line in self._lines() if line["step"] <= step and state]
                text = "".join(json.dumps(line) + "\n" for line in kept)
                files.write_atomically(self.path / METRICS, lambda temporary: temporary.write_text(text))
            return state

    def config(self) -> dict[str, Any]:
        """What the run was started with, and how.

        Raises:
            ValueError: it is damaged, or of another program.
            FileNotFoundError: there is no run here.
        """
        found = files.read_json(self.path / CONFIG)
        if not isinstance(found.get("recipe"), dict):
            raise ValueError(f"{self.path / CONFIG} is of no run, but of another program: name another folder")
        return found

    def preprocessing(self) -> dict[str, Any] | None:
        """How images became inputs in a run that has a state to go on from; None for others, and an older version's."""
        if not (self.path / CONFIG).exists() or not (self.path / STATE).exists():
            return None
        return self.config().get("preprocessing")

    def note_data(self, data: str) -> None:
        """Say in the config where the images lie now."""
        config = self.config()
        if config["recipe"]["data"] != data:
            files.write_json(self.path / CONFIG, {**config, "recipe": {**config["recipe"], "data": data}})

    def note_place(self, epoch: int, step: int, way: Mapping[str, Any]) -> None:
        """Say in the config that the run goes on here, in `epoch` after `step` steps, if anything is another now.

        That is: machine, software or `way`. A place that saved no step since it took the run up is forgotten.

        `way` has "precision" and "processes".
        """
        config = self.config()
        found = {"epoch": epoch, "step": step, **way, "started": now(), **describe_machine()}
        earlier = [place for place in config.get("resumed", []) if place.get("step", -1) < step]
        before = {**found, **config, **(earlier or [{}])[-1]}  # an older version's config has less
        facts = ("machine", "versions", "commit", "precision", "processes")
        changed = any(_but_threads(before[name]) != _but_threads(found[name]) for name in facts)
        places = [*earlier, found] if changed else earlier
        if places != config.get("resumed", []):
            files.write_json(self.path / CONFIG, {**config, "resumed": places})

    def close(self) -> None:
        """Let other processes resume the run, which `start` and `resume` forbid; so does the end of this one."""
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.path / METRICS
        try:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
                if record["kind"] == "epoch":  # as training.pt is, which counts it
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise files.cannot_write(path, error) from error

    def epochs(self) -> list[dict[str, Any]]:
        """The metrics of each finished epoch."""
        return [line for line in self._lines() if line["kind"] == "epoch"]

    def save_state(self, state: Mapping[str, Any], main: bool = True) -> None:
        """Write what `resume` gives back; one process of several is the main one, and writes."""
        if main:
            files.save_state(self.path / STATE, state)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        """ValueError if the run was started otherwise; the images may lie elsewhere now."""
        before = self.config()
        now, defaults = (json.loads(json.dumps(c)) for c in (config, {"recipe": dataclasses.asdict(Recipe(""))}))
        for each in (before, now):
            for name in TOLD:  # the same options may have been given otherwise
                each["recipe"].pop(name, None)
        if (given := before.get("network")) and "network" not in now:
            raise ValueError(
                f"{self.path} trains a {given} that it was given in Python: resume it there with network=..., or name "
                "another --out"
            )
        if images := before.get("images"):  # an older version's run has none: its data must lie where they lay
            if changed := _first_difference(images, now["images"], {}):
                raise ValueError(
                    f"{self.path} was started on other images ({changed}): resume on the same, or name another --out"
                )
            if data_name(before["recipe"]["data"]) == data_name(now["recipe"]["data"]):
                before["recipe"]["data"] = now["recipe"]["data"]
        if changed := _first_difference(before, {**now, "images": images}, defaults):
            raise ValueError(
                f"{self.path} was started with other options ({changed}): resume with the same, or name another --out"
            )

    def _load_state(self) -> dict[str, Any] | None:
        """The training state, None where none was saved yet; ValueError where metrics that go with it are lost."""
        state = files.load_tensors(self.path / STATE) if (self.path / STATE).exists() else None
        finished = len(self.epochs())
        if state is not None and finished < state.get("epoch", 0):  # a machine that died may lose lines
            raise ValueError(
                f"{self.path / METRICS} has {finished} of the {state['epoch']} epochs that were finished: restore it "
                "from a copy, or name another --out"
            )
        if state is None and finished > 1:
            raise ValueError(f"{self.path / STATE} is missing, without which the run cannot go on: name another --out")
        return state

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Keep other processes away, to the end of the run; where what is within fails they may come again."""
        try:
            self._lock = lock_folder(self.path, wait=False)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {self.path}: wait for it or stop it first") from error
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _remove_leftovers(self) -> None:
        """What a killed run was about to write."""
        saved = (f"{model}/{name}" for model in ("last", "best") for name in (checkpoint.CONFIG, checkpoint.WEIGHTS))
        for path in map(self.path.joinpath, (CONFIG, METRICS, STATE, *saved)):
            for temporary in path.parent.glob(f".{path.name}.*.tmp"):
                with suppress(OSError):
                    temporary.unlink()

    def _lines(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run
                break
            if not isinstance(found, dict):
                break
            lines.append(found)
        return lines


def _but_threads(value: Any) -> Any:
    return {**value, "threads": None} if isinstance(value, Mapping) else value


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
    """ "lr was 0.1, now it is 0.2" for the first value of `after` that differs from `before`.

    An option that `before` lacks came in a later version, and was at its default.
    """
    for name, value in after.items():
        old = before.get(name, defaults.get(name))
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if found := _first_difference(old, value, defaults.get(name) or {}):
                return found
        elif value != old:
            return f"{name} was {old}, now it is {value}"
    return None
