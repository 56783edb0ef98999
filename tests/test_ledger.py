"""Lines of the ledger are whole, and each run has one, whatever happens beside."""

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gaternet.ledger import add_run, check_ledger, read_ledger

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
