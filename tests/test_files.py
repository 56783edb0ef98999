"""Files are whole or as they were; training state comes back, and no pickle from a stranger runs."""

import argparse
import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_models import contents

from gaternet.files import load_tensors, save_state, write_atomically
from gaternet.official import load_official_checkpoint


def test_training_state_comes_back_the_same(tmp_path):
    state = {"step": 3, "rate": 0.1, "names": ["a"], "nested": {"momentum": [torch.arange(3.0), None]}}
    save_state(tmp_path / "state.pt", state)
    loaded = load_tensors(tmp_path / "state.pt")
    assert torch.equal(loaded["nested"]["momentum"].pop(0), state["nested"]["momentum"].pop(0))
    assert loaded == state


def test_a_checkpoint_of_timms_with_its_arguments_is_read(tmp_path):
    weights = {"fc.weight": torch.ones(2, 3)}
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    found = load_tensors(tmp_path / "last.pth.tar")
    assert torch.equal(found["state_dict"]["fc.weight"], weights["fc.weight"])


class Bomb:
    """Unpickling it makes a folder: what an attacker's file would do is worse."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, zipped):
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.is_dir()  # the bomb is live
    target, file = tmp_path / "target", tmp_path / "model.pth"
    state = {"backbone_state_dict": {"fc.weight": torch.ones(1), "x": Bomb(target)}, "gater_state_dict": {}}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    for load in (load_official_checkpoint, load_tensors):
        with pytest.raises(ValueError, match="holds Python objects, which are refused because they could run code"):
            load(file)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html>Not found</html>",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"hello world",
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pth is (damaged|truncated)"):
        load_tensors(path)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_failing_write_keeps_the_old_file_and_nothing_else(tmp_path, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*file .*No space left"):
        write_atomically(path, write)
    assert contents(tmp_path) == ({"file": b"old"} if old else {})


def test_an_error_that_is_not_of_writing_stays_what_it_is(tmp_path):
    def write(temporary: Path) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        write_atomically(tmp_path / "file", write)
    assert contents(tmp_path) == {}


def test_a_full_disk_is_said_by_torch_save_in_its_own_way(tmp_path, monkeypatch):
    def fail(state: object, path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*training.pt \(PytorchStreamWriter failed.*free some space"):
        save_state(tmp_path / "training.pt", {})
    assert contents(tmp_path) == {}


def test_a_write_during_another_has_a_file_of_its_own(tmp_path):
    def write(temporary: Path) -> None:
        temporary.write_text("first")
        write_atomically(tmp_path / "file", lambda other: other.write_text("second"))

    write_atomically(tmp_path / "file", write)
    assert contents(tmp_path) == {"file": b"first"}


def test_a_write_is_on_the_disk_before_it_takes_the_old_files_place(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    path.parent.mkdir()
    path.write_text("old")
    at_flush = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: at_flush.append(path.read_text()))
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert at_flush == ["old"]
    assert contents(tmp_path) == {"new folder/file": b"new"}
