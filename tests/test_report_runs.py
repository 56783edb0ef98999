"""Reports of runs: what is wrong with one is found before the work on others, and what is known of each is told."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from analyzed_model import MODEL

from gaternet.checkpoint import save_model
from gaternet.data import DataError
from gaternet.report import figures, runs


def test_missing_data_of_one_run_are_found_before_the_work_on_others(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_report_run", lambda *_, **__: pytest.fail("worked in vain"))
    for name, source in (("good", "digits"), ("bad", str(tmp_path / "missing.npz"))):
        save_model(MODEL, tmp_path / name, {**MODEL.metadata, "trained": {"data": source}})
    with pytest.raises(DataError, match=r"no file .*missing.npz"):
        runs.report_runs([tmp_path / "good", tmp_path / "bad"], out=tmp_path)


def test_no_numbers_are_written_where_the_page_fails(analysis, tmp_path, monkeypatch):
    monkeypatch.setattr("gaternet.report.page.report_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analysis.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_folder_of_any_name_has_a_report(analysis, tmp_path):
    """A disk takes bytes that are no text, as of a name in an old encoding."""
    page = analysis.save(tmp_path, title="caf\udce9")
    assert "caf\\udce9" in page.read_text()


def test_what_is_known_of_a_training_is_told():
    assert runs.training_of({"recipe": "x", "seed": 3}) == ["recipe x", "seed 3"]
    assert runs.training_of({"recipe": "x"}) == ["recipe x"]
    assert runs.training_of({}) == []


def test_a_bar_of_several_numbers_of_gates_names_all_of_them(analysis):
    one: Any = figures.gates_per_sample(analysis).data[0]
    assert list(one.customdata) == [str(round(x)) for x in one.x]
    many: Any = figures.gates_per_sample(dataclasses.replace(analysis, histogram=np.ones(200, np.int64))).data[0]
    assert list(many.customdata[:2]) == ["0 to 3", "4 to 7"]
