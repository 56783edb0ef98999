"""That the report's figures draw what was found, and not its neighbour."""

import dataclasses
from typing import Any, cast

import numpy as np
import pytest
from analyzed_model import IMAGES, LABELS, MODEL, PIXELS

from gaternet import analyze
from gaternet.forcing import force_gates
from gaternet.report import figures


@pytest.fixture(scope="module")
def found() -> Any:
    analysis = analyze(MODEL, [(IMAGES, LABELS)], preprocessing=PIXELS, samples=20, extremes=1)
    return analysis, force_gates(MODEL, [(IMAGES, LABELS)], analysis, preprocessing=PIXELS, images=30, gates=3, draws=1)


def test_layers_that_are_closed_chance_and_open_are_told_apart(found):
    analysis, forced = found
    lines: Any = figures.forced_sites(analysis, forced).data
    closed, by_chance, opened, _ = lines
    drawn = [(closed, forced.sites.forced[0]), (by_chance, forced.sites.by_chance[0]), (opened, forced.sites.forced[1])]
    for line, shares in drawn:
        assert list(line.y) == pytest.approx(list(100 * forced.overall(shares)))


def test_each_class_has_its_own_bar(found):
    analysis, forced = found
    drawn: Any = figures.forced_classes(analysis, forced).data
    bars = {bar.name: bar.y for bar in drawn}
    rows = forced.classes
    own = forced.own.forced[0, np.arange(len(rows)), rows]
    assert list(bars["its own closed"]) == pytest.approx(list(100 * own))


def test_costs_accuracies_and_shares_are_the_analysis(found):
    analysis, _ = found
    present = analysis.counts > 0
    costs: Any = figures.class_costs(analysis).data
    assert sorted(costs[0].x) == pytest.approx(sorted(analysis.class_macs[present] / 1e6))
    for row in range(3):
        shares: Any = figures.comparison({"one": analysis}, row).data
        assert list(shares[0].y) == pytest.approx(list(100 * analysis.site_shares[row]))
    accuracies: Any = figures.class_accuracies({"one": analysis}).data
    assert list(accuracies[0].y) == pytest.approx(list(100 * analysis.class_right[present] / analysis.counts[present]))


@pytest.mark.parametrize(("most", "last"), [(336, "336"), (119, "118 to 119"), (30, "30")])
def test_no_bar_stands_for_more_gates_than_there_are(found, most, last):
    analysis = dataclasses.replace(found[0], histogram=np.bincount([0, most], minlength=most + 1))
    (bars,) = cast(Any, figures.gates_per_sample(analysis).data)
    assert bars.customdata[-1] == last
    assert bars.x[-1] + bars.width[-1] / 2 == most + 0.5
    assert list(bars.x - bars.width / 2)[1:] == list(bars.x + bars.width / 2)[:-1]  # without gaps
