"""The page that sets several models side by side: its table, and what it draws of like and of unlike data."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from analyzed_model import IMAGES, LABELS, MODEL, PIXELS

from gaternet import analyze
from gaternet.checkpoint import save_model
from gaternet.data import load_data
from gaternet.models import create_model
from gaternet.recipe import Runtime
from gaternet.report.comparison import write_comparison
from gaternet.report.page import report_page
from gaternet.report.runs import report_runs


def analysis_of(number: int = 90, classes: Sequence[str] | None = None, labels: Any = LABELS) -> Any:
    batch = IMAGES[:number] if labels is None else (IMAGES[:number], labels[:number])
    return analyze(MODEL, [batch], preprocessing=PIXELS, samples=20, extremes=1, classes=classes)


def figures_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', path.read_text())
    assert found
    return json.loads(found[1])["figures"]


def rows_of(path: Path) -> list[list[str]]:
    """Text of the table's cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", path.read_text())
    return [re.findall(r"<t[dh][^>]*>(?:<a[^>]*>)?(.*?)(?:</a>)?</t[dh]>", row) for row in rows]


OTHERS = {
    "data": ({}, "b"),
    "classes": ({"classes": "abcdefg"}, "a"),
    "number": ({"number": 60}, "a"),
    "labels": ({"labels": torch.ones_like(LABELS)}, "a"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_on_other_data_are_not_compared_by_class(analysis, tmp_path, case):
    options, data = OTHERS[case]
    path = write_comparison({"one": analysis, "two": analysis_of(**options)}, tmp_path, ["x", "y"], ["a", data])
    assert figures_of(path).keys() == {"off", "on", "dependent"}
    assert "not run on the same images" in path.read_text()


def test_models_on_the_same_images_are_compared_by_class(analysis, tmp_path):
    path = write_comparison({"one": analysis, "two": analysis_of()}, tmp_path, ["x", "y"], ["a", "a"])
    assert figures_of(path).keys() == {"off", "on", "dependent", "classes"}
    assert "not run on the same images" not in path.read_text()


def test_without_labels_classes_are_what_a_model_predicts_and_are_not_compared(tmp_path):
    unlabeled = analysis_of(labels=None)
    flipped = {name: getattr(unlabeled, name)[::-1].copy() for name in ("counts", "class_open", "class_macs")}
    other = dataclasses.replace(unlabeled, **flipped)
    path = write_comparison({"one": unlabeled, "two": other}, tmp_path, ["x", "y"], ["a", "a"])
    assert figures_of(path).keys() == {"off", "on", "dependent"}
    assert "not run on the same images" not in path.read_text()


def test_the_table_says_which_images(analysis, tmp_path):
    few = analysis_of(60)
    path = write_comparison({"one": analysis, "two": few}, tmp_path, ["x", "y"], ["sets/<a>.npz", "digits"])
    titles, first, second = rows_of(path)
    assert titles[:4] == ["run", "data", "images", "accuracy"]
    assert first[1:3] == ["&lt;a&gt;", "90"]
    assert second[1:3] == ["digits", "60"]
    path = write_comparison({"one": analysis, "two": few}, tmp_path, ["x", "y"], ["old/a.npz", "new/a.npz"])
    assert [row[1] for row in rows_of(path)[1:]] == ["old/a.npz", "new/a.npz"]


LONG = [
    f"/experiments/sweep/cifar10_resnet20_gated-sparsity_weight=0.{number}-learning_rate=0.1" for number in range(12)
]


@pytest.fixture(scope="module")
def twelve(analysis, tmp_path_factory) -> Path:
    links = [f"run{number}" for number in range(1, 13)]
    return write_comparison(
        dict(zip(LONG, [analysis] * 12, strict=True)), tmp_path_factory.mktemp("page"), links, ["a"] * 12
    )


def test_figures_number_the_models_that_the_table_names(twelve):
    for figure in figures_of(twelve).values():
        assert [trace["name"] for trace in figure["data"]] == [str(number) for number in range(1, 13)]
        assert figure["layout"]["height"] == 340 + 6 * 20
    names = [row[0] for row in rows_of(twelve)[1:]]
    assert names[11].startswith("12: ")
    assert "run12/index.html" in names[11]
    assert "12 models in /experiments/sweep/" in twelve.read_text()


def test_long_names_leave_room_for_the_numbers_and_the_figures(twelve, browser):
    page = browser.new_context(offline=True, viewport={"width": 1100, "height": 900}).new_page()
    page.goto(twelve.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    sizes = page.eval_on_selector(".scroll", "box => [box.scrollWidth, box.clientWidth]")
    assert sizes[0] <= sizes[1]
    assert page.evaluate("document.getElementById('off')._fullLayout._size.h") > 300


def test_names_are_shortened_by_whole_folders(analysis, tmp_path):
    pair = {"runs/one": analysis, "runs/one (1)": analysis}
    page = write_comparison(pair, tmp_path, ["x", "y"], ["a", "a"]).read_text()
    assert ">one</a>" in page
    assert ">one (1)</a>" in page
    page = write_comparison({"one": analysis, "other": analysis}, tmp_path, ["x", "y"], ["a", "a"]).read_text()
    assert ">one</a>" in page
    assert "2 models</p>" in page


def test_gates_without_logits_have_no_images_that_open_them_most_surely(analysis):
    page = report_page(analysis, None, "", "")
    assert "Images that open it most surely" in page
    without = report_page(dataclasses.replace(analysis, surest=None), None, "", "")
    assert "most surely" not in without
    assert "How often each class opens it" in without


def test_the_best_models_report_stands_beside_the_lasts(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model: Any = create_model("resnet8_gated", 10, 1)
    about = {**model.metadata, **load_data("digits").metadata()}
    for name, epochs in (("last", 3), ("best", 2)):
        save_model(model, tmp_path / "run" / name, about | {"trained": {"data": "digits", "epochs": epochs}})
    options: Any = {"runtime": Runtime(cpu=True), "samples": 20, "forced": 0}
    (last,) = report_runs([tmp_path / "run"], "last", **options)
    (best,) = report_runs([tmp_path / "run"], "best", **options)
    assert (last.parent.name, best.parent.name) == ("report", "report-best")
    assert "after epoch 3" in last.read_text()
    assert "after epoch 2" in best.read_text()
