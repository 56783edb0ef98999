"""The ledger: one line of JSON for each finished run, with all that is needed to judge it and to run it again."""

import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from gaternet import files
from gaternet.arrays import EMBEDDED, TORCHVISION
from gaternet.data import load_data
from gaternet.evaluate import evaluate_saved
from gaternet.locks import locked
from gaternet.machine import accelerate_restored, make_accelerator
from gaternet.recipe import Recipe, Runtime, data_name, flat_options, idle_options
from gaternet.recipes import RECIPES
from gaternet.run import CONFIG, RunDirectory

_SIZES = {  # training and test images
    "digits": (1437, 360),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "imagenet": (1_281_167, 50_000),
}
_GATES = ("density", "entropy", "always_on", "always_off", "dependent", "site_density")


def changed_options(recipe: Recipe | Mapping[str, Any]) -> dict[str, Any]:
    """Where a recipe differs from the one of its name, or from the defaults if there is none: option -> value.

    Options that have no effect beside the others are left out, as is where its data lie, if they are the same.
    """
    named = recipe if isinstance(recipe, Mapping) else dataclasses.asdict(recipe)
    base = dataclasses.asdict(RECIPES.get(named["name"], Recipe(named["name"])))
    ignored = set(idle_options(flat_options(named)))
    if data_name(named["data"]) == base["data"]:
        ignored.add("data")
    if named["name"] in RECIPES:  # of each pair one takes the place of the other, see `override`
        ignored.update(name for name in ("model", "backbone") if named[name] is None)
        if named["gating"]["sparsity"]:
            ignored.add("target_density")
        elif named["gating"].get("target_density") is not None:
            ignored.add("sparsity")
    before, now = flat_options(base), flat_options(named)
    found = {name: value for name, value in now.items() if name not in ignored and value != before.get(name)}
    if "target_density" in found and found["target_density"] is None:  # as `override` does where sparsity is given
        del found["target_density"]
        found["sparsity"] = 0.0
    return found


def train_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as words for `gaternet train`; ValueError for one that has no value, or an empty list of them."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value == [] or value == ():
            raise ValueError(f"{flag} cannot be taken back on the command line: use a recipe of your own in Python")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for part in value if isinstance(value, list | tuple) else [value]:
                words += [flag, str(part)]
    return words


@accelerate_restored()
def describe_run(path: Path, runtime: Runtime | None = None) -> dict[str, Any]:
    """The ledger's line for a finished run; it evaluates the run's model to count its MACs, as `runtime` says.

    Raises:
        ValueError: there is no finished run.
    """
    if not (path / CONFIG).exists():
        raise ValueError(f"{path} holds no run: gaternet train makes runs, by default under runs/")
    run = RunDirectory(path)
    config, epochs = run.config(), run.epochs()
    if "network" in config:
        raise ValueError(
            f"{path} trained a {config['network']} that was given to it in Python: no command repeats that, so the "
            "ledger does not take it"
        )
    recipe, done = config["recipe"], epochs[-1]["epoch"] if epochs else 0
    if done != recipe["epochs"]:
        raise ValueError(f"{path} has finished {done} of {recipe['epochs']} epochs: continue it with --resume")
    runtime = runtime or Runtime()  # of today: the run may have begun elsewhere
    last, measured = epochs[-1], evaluate_saved(path, data=recipe["data"], runtime=runtime)
    options, whole = changed_options(recipe), _are_whole(recipe["data"], config.get("images"))
    words = ["gaternet", "train", recipe["name"], *train_flags(options), "--seed", str(config["seed"])]
    return {
        "recipe": recipe["name"],
        "options": options,
        "seed": config["seed"],
        "command": shlex.join(words),
        "as_published": recipe["paper"] is not None and not options and whole,
        "model": recipe["model"] or recipe["backbone"],
        "data": data_name(recipe["data"]),
        **({"images": _told(config["images"])} if "images" in config else {}),
        "epochs": recipe["epochs"],
        "parameters": measured["parameters"],
        "backbone_macs": measured["backbone_macs"],
        "gater_macs": measured.get("gater_macs"),
        "gated_macs": measured.get("gated_macs"),
        "test_error": 100 * (1 - last["test_accuracy"]),
        "test_top5_error": 100 * (1 - last["test_top5_accuracy"]),
        "test_loss": last["test_loss"],
        "train_loss": last["train_loss"],
        "gates": {name: measured[name] for name in _GATES} if "density" in measured else None,
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "started": config.get("started"),
        "precision": config.get("precision") or make_accelerator(runtime).mixed_precision,
        **({"resumed": config["resumed"]} if "resumed" in config else {}),
        **{name: config[name] for name in ("versions", "machine", "commit", "processes")},
    }


def read_ledger(ledger: Path) -> list[dict[str, Any]]:
    """All lines so far.

    Raises:
        ValueError: one of them is no JSON object, say because a full disk cut it short.
        OSError: the file cannot be read.
    """
    found = []
    for number, text in enumerate(ledger.read_text().splitlines() if ledger.exists() else [], 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            raise ValueError(
                f"line {number} of {ledger} is damaged: remove it, and what it stood for is evaluated anew"
            )
        found.append(line)
    return found


def find_line(ledger: Path, path: Path) -> dict[str, Any] | None:
    """The line of the run in `path`; None if there is none."""
    if not (path / CONFIG).exists():
        return None
    config = RunDirectory(path).config()
    found = find_lines(ledger, config["recipe"], config["seed"])
    return next((line for line in found if line.get("started") == config.get("started")), None)


def find_lines(ledger: Path, recipe: Recipe | Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """The lines of all runs of a recipe with a seed, wherever they lie or lay, on images of that name."""
    named = recipe if isinstance(recipe, Mapping) else dataclasses.asdict(recipe)
    wanted = changed_options(named)
    run = {"recipe": named["name"], "seed": seed}
    idle = idle_options(flat_options(named))  # which older versions counted
    found = []
    for line in read_ledger(ledger):
        options = {name: value for name, value in line.get("options", {}).items() if name not in idle}
        by_name = "images" in line  # which say more than where they lay
        if run.items() <= line.items() and _named(options, by_name) == _named(wanted, by_name):
            found.append(line)
    return found


def same_images(line: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a line's run saw the images that the recipe's data name here; an older version's line does not say.

    Raises:
        ValueError: there are no such images.
    """
    seen = line.get("images")
    if seen is None:
        return True
    if recipe.data in (*EMBEDDED, *TORCHVISION) or not Path(recipe.data).exists():
        return _are_whole(recipe.data, seen)
    return seen == _read(recipe.data, recipe.image_size, Path(recipe.data).stat().st_mtime_ns)


@functools.cache
def _read(data: str, image_size: int | None, changed: int) -> dict[str, Any]:
    """What a line would tell of these images, which are read anew where they have `changed`."""
    return _told(load_data(data, image_size=image_size).identity())


def _told(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a line tells of the images: their numbers, and roughly their pixels."""
    numbers = {name: identity[name] for name in ("training_images", "test_images")}
    return numbers | {name: list(identity["preprocessing"][name]) for name in ("mean", "std")}


def _are_whole(data: str, images: Mapping[str, Any] | None) -> bool:
    """Whether these may be the images of a set that is known, all of them; of others nothing is known."""
    sizes = _SIZES.get(data_name(data))
    return images is None or sizes in (None, (images["training_images"], images["test_images"]))


def _named(options: Mapping[str, Any], by_name: bool) -> dict[str, Any]:
    return {name: data_name(value) if by_name and name == "data" else value for name, value in options.items()}


def check_ledger(ledger: Path) -> None:
    """Find out before a training what would keep its line from the ledger afterwards.

    Raises:
        ValueError: the ledger is a folder, or damaged.
        OSError: it cannot be read or written, or its folder cannot be made.
    """
    if ledger.is_dir():
        raise ValueError(f"{ledger} is a folder: name a file for the ledger")
    files.make_folder(ledger.parent)
    read_ledger(ledger)
    if ledger.exists():
        try:
            ledger.open("ab").close()
        except OSError as error:
            raise files.cannot_write(ledger, error) from error


def add_run(ledger: Path, path: Path, runtime: Runtime | None = None) -> dict[str, Any]:
    """Append a finished run's line, unless it is there; the line. See `describe_run`.

    Raises:
        OSError: it cannot be written; the ledger is as it was.
    """
    line = find_line(ledger, path)
    if line is None:
        line = describe_run(path, runtime)  # all processes take part
        if PartialState().is_main_process:
            files.make_folder(ledger.parent)
            with ledger.open("a"), locked(ledger):
                line = find_line(ledger, path) or _append(ledger, line)  # another program may have been faster
    return line


def _append(ledger: Path, line: dict[str, Any]) -> dict[str, Any]:
    before = ledger.read_bytes()
    torn = bool(before) and not before.endswith(b"\n")  # by hand: the line would be glued to the last
    try:
        with ledger.open("a") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(ledger, len(before))  # half a line would keep all others from being read
        raise files.cannot_write(ledger, error) from error
    return line
