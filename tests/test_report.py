"""The report: its numbers, its page in a real browser, and data that makes figures impossible."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analyzed_model import IMAGES, LABELS, MODEL, PIXELS, make_model
from torch import nn

from gaternet import Gater, GaterNet, analyze, create_model
from gaternet.checkpoint import save_model
from gaternet.data import Preprocessing, load_data
from gaternet.forcing import Exchanged, force_gates
from gaternet.recipe import Runtime
from gaternet.report import figures, runs, write_report
from gaternet.report.comparison import write_comparison
from gaternet.report.numbers import numbers
from gaternet.report.reading import arrange, embed, probe
from gaternet.trained import class_names

NAMES = ["ape", "bee", "cat & <dog>", "eel", "fox", "gnu", "hen"]


def analysis_of(model: Any = MODEL, images: Any = IMAGES, labels: Any = LABELS, **options: Any) -> Any:
    loader = [images] if labels is None else [(images, labels)]
    return analyze(model, loader, **{"preprocessing": PIXELS, "samples": 80, "extremes": 3} | options)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    analysis = analysis_of(classes=NAMES)
    forced = force_gates(MODEL, [(IMAGES, LABELS)], analysis, preprocessing=PIXELS, images=60)
    write_report(analysis, folder, forced=forced, title="Gates of <x>", subtitle="a test")
    return folder


def test_numbers_are_those_of_the_analysis(pages):
    found, analysis = json.loads((pages / "gates.json").read_text()), analysis_of(classes=NAMES)
    summary = found["summary"]
    assert summary["images"] == 90
    assert summary["accuracy"] == analysis.accuracy
    assert summary["density"] == pytest.approx(analysis.rates.mean())
    assert summary["always_on"] + summary["always_off"] + summary["dependent"] == pytest.approx(1)
    assert sum(int(n) * images for n, images in found["open_gates_histogram"].items()) == analysis.open_counts.sum()
    assert found["gates"]["open_images"] == analysis.open_counts.tolist()
    assert found["gates"]["information_bits"] == pytest.approx(analysis.information().tolist(), abs=1e-6)
    assert [row["class"] for row in found["classes"]] == NAMES
    assert sum(row["images"] for row in found["classes"]) == 90
    assert [row["right"] for row in found["classes"]] == analysis.class_right.tolist()
    assert found["classes"][6]["macs"] is None  # it has no images
    dependent = [site["dependent"] * site["channels"] for site in found["sites"]]
    assert sum(dependent) == pytest.approx(analysis.dependent.sum())
    assert found["classes"][6]["density"] is None
    density = [row["density"] * row["images"] for row in found["classes"] if row["images"]]
    assert sum(density) / 90 == pytest.approx(summary["density"], abs=1e-5)
    assert found["gates"]["selectivity"] == pytest.approx(analysis.selectivity().tolist(), abs=1e-6)
    assert len(found["gates"]["selectivity_by_chance"]) == 336
    assert "NaN" not in (pages / "gates.json").read_text()
    assert "accuracy</span>" in (pages / "index.html").read_text()


def test_without_labels_nothing_is_said_to_be_right(tmp_path):
    analysis_of(labels=None).save(tmp_path)
    found = json.loads((tmp_path / "gates.json").read_text())
    assert not found["summary"]["labeled"]
    assert found["summary"]["accuracy"] is None
    assert [row["right"] for row in found["classes"]] == [None] * 7
    assert sum(row["images"] for row in found["classes"]) == 90
    page = (tmp_path / "index.html").read_text()
    assert "accuracy</" not in page
    assert "accuracy (%)" not in page


def test_numbers_of_forced_gates(pages):
    analysis = analysis_of(classes=NAMES)
    forced = force_gates(MODEL, [(IMAGES, LABELS)], analysis, preprocessing=PIXELS, images=60)
    found = json.loads((pages / "gates.json").read_text())["forced"]
    assert (found["images"], found["accuracy"]) == (60, forced.accuracy)
    assert found["gates"]["gate"] == analysis.telling_gates(60).tolist()
    assert found["sites"]["closed"] == pytest.approx(forced.overall(forced.sites.forced[0]).tolist(), abs=1e-6)
    assert found["gates"]["open_by_class"][7] == pytest.approx(
        forced.single.forced[1, 7, :5].round(6).tolist() + [None] * 2
    )
    assert found["exchanged"] == pytest.approx(dataclasses.asdict(forced.exchanged), abs=1e-6)


def traces(figure: Any) -> Any:
    return figure.data


def test_exchanged_gates_are_drawn_as_far_as_there_are_any():
    analysis = analysis_of()
    forced = force_gates(MODEL, [(IMAGES, LABELS)], analysis, preprocessing=PIXELS, images=60, gates=5)
    found = Exchanged(own=0.875, usual=0.5, same=0.75, image=0.125, gates=0.625)
    image, gates = traces(figures.exchanged_gates(dataclasses.replace(forced, exchanged=found)))
    assert list(image.y) == [87.5, 50, 75, 12.5]
    assert (image.name, gates.y[3]) == ("the image's class", 62.5)
    found = Exchanged(own=0.875, usual=0.5, same=0.75, image=math.nan, gates=math.nan)
    image, gates = traces(figures.exchanged_gates(dataclasses.replace(forced, exchanged=found)))
    assert len(image.x) == len(image.y) == 3
    assert np.isnan(gates.y).all()


def test_figures_show_the_analysis():
    analysis = analysis_of()
    off, on, dependent = (bar.y for bar in traces(figures.units(analysis)))
    assert np.allclose(np.add(np.add(off, on), dependent), 100)
    first = analysis.open_counts[:16]
    assert (off[0], on[0]) == (100 * (first == 0).mean(), 100 * (first == 90).mean())
    assert sum(traces(figures.samples_per_gate(analysis))[0].y) == analysis.dependent.sum()
    assert sum(traces(figures.gates_per_sample(analysis))[0].y) == 90
    points = embed(analysis)
    assert points is not None
    shown = traces(figures.map_of_samples(analysis, points))
    assert sum(len(dots.x) for dots in shown) == 80
    assert {int(place) for dots in shown for place in dots.customdata} == set(analysis.samples.index.tolist())
    heat = traces(figures.class_map(analysis))[0]
    column, row = 3, list(heat.y).index("2")
    assert heat.z[row][column] == pytest.approx(100 * analysis.class_rates[2, heat.customdata[row][column]])
    measured = traces(figures.information(analysis))[1]
    assert sum(measured.y) == analysis.dependent.sum()


def test_equal_names_get_numbers():
    assert figures.distinct_names(["crane", "crane", "crane (2)"]) == ["crane", "crane (2)", "crane (2) (2)"]
    assert figures.plotly_names(["<b>", "<b>", "'"]) == ["&lt;b&gt;", "&lt;b&gt; (2)", "'"]


def test_clusters_stand_together():
    rows = np.array([[0.0, 0], [1, 1], [0, 0.1], [1, 0.9], [0.1, 0]])
    order = arrange(rows).tolist()
    assert {frozenset(order[:3]), frozenset(order[-3:])} & {frozenset({0, 2, 4})}
    assert arrange(rows[:2]).tolist() == [0, 1]


def test_shown_gates_tell_most():
    analysis = analysis_of()
    chosen, told = analysis.telling_gates(20), analysis.information()
    assert np.array_equal(told[chosen], np.sort(told[analysis.dependent])[::-1][:20])


def test_a_probe_finds_what_is_there():
    analysis = analysis_of(samples=90)
    samples = analysis.samples
    samples.gates[:, analysis.dependent] = False  # gates that are the class, and nothing else
    columns = np.flatnonzero(analysis.dependent)[samples.label]
    samples.gates[np.arange(90), columns] = True
    found = probe(analysis)
    assert found is not None
    assert found.accuracy == 1
    assert found.images == 45
    assert found.chance == np.bincount(samples.label[45:]).max() / 45
    assert found.model == (samples.prediction[45:] == samples.label[45:]).mean()


def test_known_sets_have_names():
    assert class_names("somewhere/cifar10.npz", [str(i) for i in range(10)])[3] == "cat"
    assert class_names("cifar10.npz", ["a", "b"]) == ["a", "b"]
    assert class_names("other.npz", ["0", "1"]) == ["0", "1"]


# --- In a browser


class Shown:
    """A page that is open, and what its console said."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_context(offline=True, **options).new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def figures(self) -> set[str]:
        """Those that are really drawn."""
        return set(self.page.eval_on_selector_all(".figure:has(svg.main-svg)", "all => all.map(one => one.id)"))


COSTS = {"class-costs", "class-densities", "costs"}
ABOUT_CLASSES = {"class-map", "information", "selectivity"}
EVERY = {"units", "per-sample", "per-gate", "map", "gate-classes"} | COSTS | ABOUT_CLASSES
FORCED = {"forced-sites", "forced-site-classes", "forced-classes", "exchanged-gates"}


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 800}}])
def test_every_figure_is_drawn_and_nothing_overflows(pages, browser, options):
    shown = Shown(browser, pages / "index.html", **options)
    assert shown.figures() == EVERY | FORCED
    assert shown.said == []
    unnamed = shown.page.locator(".figure:not([role=img][aria-label])")
    assert unnamed.count() == 0
    width = shown.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    assert shown.page.inner_text("h1") == "Gates of <x>"
    colour = shown.page.evaluate("getComputedStyle(document.querySelector('#units .xtick text')).fill")
    assert (colour == "rgb(232, 234, 237)") == ("color_scheme" in options)


def test_without_javascript_the_page_says_where_the_numbers_are(pages, browser):
    page = browser.new_context(offline=True, java_script_enabled=False).new_page()
    page.goto((pages / "index.html").as_uri())
    assert (
        page.inner_text("noscript") == "JavaScript, which draws the figures, is off here: gates.json has their numbers."
    )
    assert page.locator(".tile").first.is_visible()


def test_a_finger_on_a_figure_scrolls_the_page(pages, browser):
    page = Shown(browser, pages / "index.html", has_touch=True, is_mobile=True).page
    page.locator("#units").scroll_into_view_if_needed()
    box, before = page.locator("#units").bounding_box(), page.evaluate("window.scrollY")
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *points: dict[str, float]) -> None:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch("touchStart", {"x": x, "y": y})
    for moved in range(20, 201, 20):
        touch("touchMove", {"x": x, "y": y - moved})
    touch("touchEnd")
    page.wait_for_function(f"window.scrollY > {before} + 50")
    assert page.locator(".modebar-btn").count() == 0  # they would lie over the legends


def test_nothing_on_the_page_sends_it_away(pages, browser):
    page = Shown(browser, pages / "index.html").page
    titles = page.eval_on_selector_all(".modebar-btn", "all => all.map(one => one.dataset.title)")
    assert "Zoom" in titles
    assert not [title for title in titles if "share" in title.lower() or "cloud" in title.lower()]


def test_pointing_at_a_sample_shows_its_image(pages, browser):
    page = Shown(browser, pages / "index.html").page
    assert page.eval_on_selector("#tip", "tip => getComputedStyle(tip).display") == "none"
    place = page.evaluate("document.getElementById('map')._fullData[0].customdata[0]")
    point = page.locator("#map .scatterlayer .trace").first.locator("path").first
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    page.wait_for_function("getComputedStyle(document.getElementById('tip')).display === 'block'")
    label, _, opened, _ = analysis_of(classes=NAMES).facts[place]
    text = page.inner_text("#tip").split("\n")
    assert text[0] == NAMES[label]
    assert f"{opened} gates open" in text
    assert page.eval_on_selector("#tip .thumb", "t => getComputedStyle(t).backgroundImage").startswith(
        'url("data:image'
    )


def test_gates_can_be_chosen(pages, browser):
    page = Shown(browser, pages / "index.html").page
    analysis = analysis_of(classes=NAMES)
    gates = analysis.telling_gates(60)
    for step, expected in (("#gate-next", 1), ("#gate-before", 0), ("#gate-before", len(gates) - 1)):
        page.click(step)
        assert page.inner_text("#gate-facts").startswith(f"Gate {gates[expected]} of layer")
    page.select_option("#gate", "2")
    rates = page.evaluate("document.getElementById('gate-classes').data[0].y")
    assert rates == pytest.approx((100 * analysis.class_rates[:5, gates[2]]).round(2).tolist())
    said = page.inner_text("#gate-forced")
    assert said.startswith("As it is, ")
    assert "Forced closed, " in said
    assert page.locator("#gate-surest .thumb").count() == 3
    assert page.locator("#cheapest .thumb").count() == 12


STRANGE = ["crane", "crane", "<i>x</i><br>y", "a &lt; b", "<a href='https://example.org'>z</a>", "crane (2)", "g"]


def test_names_of_classes_are_shown_as_they_are_and_kept_apart(tmp_path, browser):
    analysis = analysis_of(classes=STRANGE)
    forced = force_gates(MODEL, [(IMAGES, LABELS)], analysis, preprocessing=PIXELS, images=60, gates=5)
    page = Shown(browser, analysis.save(tmp_path, forced=forced)).page

    def texts(where: str) -> set[str]:
        return set(page.eval_on_selector_all(where, "all => all.map(one => one.textContent)"))

    wanted = {"crane", "crane (2)", *STRANGE[2:5]}  # the others have no images
    for y in ("class-map", "class-costs", "class-densities", "forced-site-classes"):
        assert texts(f"#{y} .ytick text") == wanted
    for x in ("forced-classes", "gate-classes"):
        assert texts(f"#{x} .xtick text") == wanted
    assert texts("#map .legendtext") == wanted
    assert page.locator(".figure a[href*=example]").count() == 0
    pair = {"<b>one</b>": analysis, "R&amp;D": analysis}
    page = Shown(browser, write_comparison(pair, tmp_path, ["one", "two"], ["a", "a"])).page
    assert texts("#classes .xtick text") == wanted
    for figure in ("off", "classes"):
        assert texts(f"#{figure} .legendtext") == {"1", "2"}
    assert texts("tbody td:first-child") == {"1: <b>one</b>", "2: R&amp;D"}


# --- Data that makes figures impossible


def collapsed() -> Any:
    model = make_model()
    assert isinstance(model.gater, Gater)
    nn.init.zeros_(model.gater.fc2.weight)
    return model


BY_LAYER = FORCED - {"forced-classes"}
CONSTANT = {"units", "per-sample"} | COSTS | BY_LAYER
CASES = {
    "collapsed": ({"model": collapsed}, CONSTANT, "No gate depends on the image"),
    "no labels": ({"labels": None}, EVERY, "The data has no labels"),
    "one class": ({"labels": torch.zeros(90, dtype=torch.long)}, EVERY - ABOUT_CLASSES | BY_LAYER, "one class"),
    "one image": ({"images": IMAGES[:1], "labels": LABELS[:1]}, CONSTANT, "one class"),
    "1,000 classes": ({"model": lambda: make_model(1000), "labels": torch.arange(90) * 11}, EVERY | FORCED, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_pages_of_odd_data(case, tmp_path, browser):
    options, expected, notice = CASES[case]
    given = {"model": lambda: MODEL, "images": IMAGES, "labels": LABELS} | options
    model, images, labels = given["model"](), given["images"], given["labels"]
    analysis, forced = analysis_of(model, images, labels), None
    if labels is not None:
        forced = force_gates(model, [(images, labels)], analysis, preprocessing=PIXELS, images=30, gates=5)
    path = analysis.save(tmp_path, forced=forced)
    assert "NaN" not in (tmp_path / "gates.json").read_text()
    shown = Shown(browser, path)
    assert shown.figures() == expected
    assert shown.said == []
    assert notice in shown.page.inner_text("body")
    assert "NaN" not in shown.page.inner_text("body")


def test_grey_images(tmp_path, browser):
    pixels = Preprocessing(16, 16, (0.5,), (0.25,))
    model = create_model("resnet20_gated", 7, 1)
    assert isinstance(model, GaterNet)
    analysis = analyze(model, [(IMAGES[:, :1], LABELS)], preprocessing=pixels, samples=20)
    shown = Shown(browser, analysis.save(tmp_path))
    assert shown.said == []
    assert shown.page.locator("#cheapest .thumb").count() == 12
    assert numbers(analysis)["forced"] is None


# --- The command


def test_reports_of_runs_and_their_comparison(tmp_path, gaternet_command, browser):
    train = ["train", "digits_resnet20_gated", "--epochs", "1", "--cpu", "--out", tmp_path / "run"]
    subprocess.run([*gaternet_command, *train], check=True, stdout=subprocess.DEVNULL)
    report = [*gaternet_command, "report", tmp_path / "run", "--cpu"]
    done = subprocess.run([*report, "--samples", "50", "--forced", "30"], check=True, capture_output=True, text=True)
    page = tmp_path / "run" / "report" / "index.html"
    assert done.stdout.split() == ["the", "report", "is", str(page)]
    assert Shown(browser, page).said == []
    pair = [*report, tmp_path / "run", "--out", tmp_path / "both", "--forced", "0", "--samples", "20", "--json"]
    done = subprocess.run(pair, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)[-1] == str(tmp_path / "both" / "index.html")
    shown = Shown(browser, tmp_path / "both" / "index.html")
    assert shown.figures() == {"off", "on", "dependent", "classes"}
    assert shown.said == []
    shown.page.click("tbody tr:nth-child(2) a")
    shown.page.wait_for_selector("html[data-drawn] #units", state="attached")


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    model = make_model()
    save_model(model, tmp_path, model.metadata | load_data("digits").metadata() | {"trained": {"data": "digits"}})
    monkeypatch.setattr(runs, "analyze", lambda *_, **__: pytest.fail("worked in vain"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file is a file, not a folder: name another"):
        runs.report_runs([tmp_path], out=tmp_path / "file", runtime=Runtime(cpu=True))


def test_a_wrong_run_among_several_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "analyze", lambda *_, **__: pytest.fail("worked in vain"))
    MODEL.save_pretrained(tmp_path / "good")
    backbone = {"name": "resnet8", "num_classes": 10, "in_chans": 3}
    save_model(create_model("resnet8"), tmp_path / "plain", {"backbone": backbone})
    for name, message in (("missing", "no run or saved model .*missing"), ("plain", "plain is a plain network")):
        with pytest.raises(ValueError, match=message):
            runs.report_runs([tmp_path / "good", tmp_path / name], data="digits", out=tmp_path / "page")
    with pytest.raises(ValueError, match="good does not say what it was trained on: name the data with --data"):
        runs.report_runs([tmp_path / "good"], out=tmp_path / "page")
