"""Lines of the ledger are whole, and each run has one, whatever happens beside."""

import dataclasses
import errno
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import CPU

from gaternet.jobs import Job
from gaternet.ledger import add_run, check_ledger, describe_run, find_lines, read_ledger
from gaternet.recipe import PaperRow, Recipe, override
from gaternet.recipes import RECIPES, find_recipe
from gaternet.train import train

LINE = {"recipe": "small", "options": {}, "seed": 0}


def test_a_full_disk_leaves_the_ledger_as_it_was(finished, tmp_path, monkeypatch):
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(json.dumps({"recipe": "other"}) + "\n")
    before = ledger.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gaternet.ledger.describe_run", lambda *_: dict(LINE))
    monkeypatch.setattr("gaternet.ledger.os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*ledger\.jsonl .*No space left.*what was saved is whole"):
        add_run(ledger, finished)
    assert ledger.read_text() == before


def test_two_programs_write_one_line(finished, tmp_path, monkeypatch):
    """Where both found none, and each has evaluated the run meanwhile."""
    ledger, together = tmp_path / "a" / "ledger.jsonl", threading.Barrier(2)

    def describe(*_: object) -> dict:
        together.wait()
        return dict(LINE)

    monkeypatch.setattr("gaternet.ledger.describe_run", describe)
    monkeypatch.setattr("gaternet.ledger.find_line", lambda ledger, path: next(iter(read_ledger(ledger)), None))
    with ThreadPoolExecutor(2) as pool:
        lines = [each.result() for each in [pool.submit(add_run, ledger, finished) for _ in range(2)]]
    assert lines == [LINE, LINE]
    assert read_ledger(ledger) == [LINE]


def test_a_ledger_that_cannot_be_written_is_named_before_a_training(tmp_path, monkeypatch):
    ledger = tmp_path / "ledger.jsonl"
    check_ledger(ledger)
    ledger.write_text(json.dumps(LINE) + "\n")
    check_ledger(ledger)
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *options: Any, **more: Any) -> Any:
        if "a" in mode:
            raise PermissionError(errno.EPERM, "not permitted")
        return opened(path, mode, *options, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"cannot write .*ledger\.jsonl .*not permitted.*mend its permissions"):
        check_ledger(ledger)


def write_noise(path: Path, training: int = 30, test: int = 10) -> str:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(training).integers(0, 255, (training + test, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(training + test) % 10
    images = {"x_train": pixels[:training], "x_test": pixels[training:]}
    save: Any = np.savez
    save(path, **images, y_train=labels[:training], y_test=labels[training:])
    return str(path)


def finish(path: Path, recipe: Recipe) -> Path:
    train(recipe, path, CPU)
    return path


def test_only_the_papers_options_on_all_of_its_images_are_as_published(tmp_path, monkeypatch):
    """Which decides what stands in the paper's tables."""
    row = Recipe("row", "resnet8", data="digits", epochs=1, batch_size=60, paper=PaperRow(1, None, 8.0))
    monkeypatch.setitem(RECIPES, "row", row)
    noise = write_noise(tmp_path / "digits.npz", 60)
    runs = {"digits": row, "part": dataclasses.replace(row, data=noise), "seen": dataclasses.replace(row, epochs=2)}
    lines = {name: describe_run(finish(tmp_path / name, recipe)) for name, recipe in runs.items()}
    assert [lines[name]["as_published"] for name in ("digits", "part", "seen")] == [True, False, False]
    assert lines["digits"]["images"]["training_images"] == 1437
    assert lines["part"]["options"] == {}


def test_other_images_of_the_same_name_are_another_run(tmp_path):
    options = {"epochs": 1, "batch_size": 10, "model": "resnet8"}
    ledger = tmp_path / "ledger.jsonl"
    first = write_noise(tmp_path / "a" / "digits.npz")
    recipe = override(find_recipe("digits_resnet20"), options | {"data": first})
    line = add_run(ledger, finish(tmp_path / "run", recipe))
    assert line["images"]["training_images"] == 30
    job = Job(recipe, 0, tmp_path / "other")
    assert job.line(ledger) == line
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(first, tmp_path / "moved" / "digits.npz")
    assert Job(override(recipe, {"data": str(moved)}), 0, tmp_path / "other").line(ledger) == line
    write_noise(Path(moved), 32)
    assert Job(override(recipe, {"data": str(moved)}), 0, tmp_path / "other").line(ledger) is None
    for data in (write_noise(tmp_path / "b" / "digits.npz", 31), "digits"):
        other = override(recipe, {"data": data})
        assert Job(other, 0, tmp_path / "other").line(ledger) is None
        with pytest.raises(ValueError, match="holds another run"):
            Job(other, 0, tmp_path / "run").line(ledger)


def test_a_set_of_ones_own_is_known_by_its_name_wherever_it_lies_unless_a_line_is_old(tmp_path):
    data = write_noise(tmp_path / "a" / "own.npz")
    recipe = override(find_recipe("digits_resnet20"), {"epochs": 1, "batch_size": 10, "model": "resnet8", "data": data})
    ledger = tmp_path / "ledger.jsonl"
    line = add_run(ledger, finish(tmp_path / "run", recipe))
    (tmp_path / "b").mkdir()
    moved = override(recipe, {"data": str(shutil.copy(data, tmp_path / "b" / "own.npz"))})
    assert find_lines(ledger, moved, 0) == [line]
    ledger.write_text(json.dumps({name: value for name, value in line.items() if name != "images"}) + "\n")
    assert len(find_lines(ledger, recipe, 0)) == 1
    assert find_lines(ledger, moved, 0) == []
