"""The figures of the report, as Plotly figures: what `GateAnalysis` and `Forced` hold, drawn."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from gaternet.findings import GateAnalysis
from gaternet.forcing import CLOSED, OPEN, Forced
from gaternet.report.reading import arrange

# Okabe and Ito's palette, which colour-blind people can tell apart; dark colours first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#7F7F7F", "#B2A200", "#6A3D9A")
OFF, ON, DEPENDENT = "#B8B8B8", "#0072B2", "#E69F00"
_HEIGHT = 340


def figure(traces: Sequence[Any], x: str = "", y: str = "", height: int = _HEIGHT, **layout: Any) -> go.Figure:
    """A figure without a title of its own, which fills the width of the page."""
    drawn = go.Figure(list(traces))
    drawn.update_layout(
        height=height,
        margin={"l": 56, "r": 12, "t": 12, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=PALETTE,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1},
        **layout,
    )
    drawn.update_xaxes(title=x, automargin=True)
    drawn.update_yaxes(title=y, automargin=True)
    return drawn


def distinct_names(names: Iterable[str]) -> list[str]:
    """Names of which no two are equal: ImageNet has two classes "crane", the second becomes "crane (2)"."""
    found: dict[str, None] = {}
    for name in names:
        distinct, number = name, 1
        while distinct in found:
            number += 1
            distinct = f"{name} ({number})"
        found[distinct] = None
    return list(found)


def plotly_names(names: Iterable[str]) -> list[str]:
    """Names as Plotly wants them: it reads text as markup, and takes equal names for one category."""
    return [html.escape(name, quote=False) for name in distinct_names(names)]


def units(analysis: GateAnalysis) -> go.Figure:
    """Paper, figure 3: of each gated layer the share of gates that are always off, always on, dependent."""
    names, shares = plotly_names(site["conv"] for site in analysis.sites), analysis.site_shares
    numbers = list(range(1, len(names) + 1))
    kinds = (("always off", OFF), ("always on", ON), ("dependent on the image", DEPENDENT))
    bars = [
        go.Bar(x=numbers, y=100 * share, name=kind, marker_color=colour, customdata=names, hovertemplate=_hover(kind))
        for (kind, colour), share in zip(kinds, shares, strict=True)
    ]
    return figure(bars, "gated layer, first to last", "% of its gates", barmode="stack", bargap=0.1)


def _hover(kind: str) -> str:
    return f"layer %{{x}}, %{{customdata}}<br>{kind}: %{{y:.1f}} %<extra></extra>"


def samples_per_gate(analysis: GateAnalysis) -> go.Figure:
    """Paper, figure 4: how many images open each dependent gate."""
    counts = analysis.open_counts[analysis.dependent]
    edges = np.linspace(0, analysis.images, 51)
    heights, _ = np.histogram(counts, edges)
    bars = go.Bar(x=(edges[1:] + edges[:-1]) / 2, y=heights, width=np.diff(edges), marker_color=DEPENDENT)
    bars.hovertemplate = "about %{x:.0f} images: %{y} gates<extra></extra>"
    return figure([bars], "images that open the gate", "gates", bargap=0)


def gates_per_sample(analysis: GateAnalysis) -> go.Figure:
    """Paper, figure 5: how many gates each image opens."""
    present = np.flatnonzero(analysis.histogram)
    low, high = int(present[0]), int(present[-1])
    step = max(1, -(-(high - low + 1) // 60))
    starts = np.arange(low, high + 1, step)
    heights = np.add.reduceat(analysis.histogram[low : high + 1], starts - low)
    stops = np.minimum(starts + step - 1, high)
    bars = go.Bar(x=(starts + stops) / 2, y=heights, width=stops - starts + 1, marker_color=ON)
    spans = [f"{start}" if start == stop else f"{start} to {stop}" for start, stop in zip(starts, stops, strict=True)]
    bars.customdata, bars.hovertemplate = spans, "%{customdata} gates: %{y} images<extra></extra>"
    return figure([bars], "open gates", "images", bargap=0)


def map_of_samples(analysis: GateAnalysis, points: NDArray[np.float32]) -> go.Figure:
    """Paper, figure 6: gate vectors of images, laid out in the plane; hovering shows the image (see page.js)."""
    samples = analysis.samples
    chosen = samples.label if analysis.labeled else samples.prediction
    names, dots = plotly_names(analysis.classes), []
    for label in np.unique(chosen):
        rows = np.flatnonzero(chosen == label)
        dots.append(
            go.Scatter(
                x=points[rows, 0],
                y=points[rows, 1],
                mode="markers",
                name=names[label],
                marker={"size": 6, "color": PALETTE[label % len(PALETTE)], "symbol": int(label) % 8},
                customdata=samples.index[rows],
                hoverinfo="none",
            )
        )
    drawn = figure(dots, height=560)
    drawn.update_xaxes(visible=False)
    drawn.update_yaxes(visible=False)
    drawn.update_layout(showlegend=len(dots) <= 30, margin={"l": 8, "r": 8, "t": 8, "b": 8})
    return drawn


def class_map(analysis: GateAnalysis) -> go.Figure:
    """How often each class opens each gate; gates and classes that are alike stand together."""
    gates = analysis.telling_gates(300)
    rows = np.flatnonzero(analysis.counts)
    rates = analysis.class_rates[np.ix_(rows, gates)]
    names = plotly_names(analysis.classes)
    rows_order, columns_order = arrange(rates), arrange(rates.T)
    heat = go.Heatmap(
        z=100 * rates[np.ix_(rows_order, columns_order)],
        y=[names[row] for row in rows[rows_order]],
        customdata=np.broadcast_to(gates[columns_order], rates.shape),
        colorscale="Cividis",
        zmin=0,
        zmax=100,
        colorbar={"title": {"text": "% open", "side": "right"}, "thickness": 12},
        hovertemplate="%{y}, gate %{customdata}: open for %{z:.0f} %<extra></extra>",
    )
    drawn = figure([heat], "gates", height=min(900, 160 + 24 * len(rows)))
    drawn.update_xaxes(showticklabels=False)
    drawn.update_yaxes(type="category")
    return drawn


def information(analysis: GateAnalysis) -> go.Figure:
    """What each dependent gate tells about the class, beside what it would with the labels shuffled."""
    return _beside_chance(analysis, analysis.information(), analysis.information_by_chance(), "bits about the class")


def selectivity(analysis: GateAnalysis) -> go.Figure:
    """How much each dependent gate is one class', beside what it would be with the labels shuffled."""
    return _beside_chance(analysis, analysis.selectivity(), analysis.selectivity_by_chance(), "selectivity")


def _beside_chance(
    analysis: GateAnalysis, measured: NDArray[np.float64], by_chance: NDArray[np.float64], unit: str
) -> go.Figure:
    found, chance = measured[analysis.dependent], by_chance[:, analysis.dependent]
    edges = np.linspace(0, max(found.max(), chance.max(), 1e-6), 61)
    middle = (edges[1:] + edges[:-1]) / 2
    heights, expected = np.histogram(found, edges)[0], np.histogram(chance, edges)[0] / len(chance)
    bars = [
        go.Bar(x=middle, y=values, width=np.diff(edges), name=name, marker_color=colour, opacity=0.75)
        for name, values, colour in (("labels shuffled", expected, OFF), ("measured", heights, ON))
    ]
    for bar in bars:
        bar.hovertemplate = "about %{x:.3f}: %{y:.1f} gates"
    drawn = figure(bars, unit, "gates", barmode="overlay", bargap=0)
    drawn.update_yaxes(type="log", dtick=1)
    return drawn


def class_costs(analysis: GateAnalysis) -> go.Figure:
    """MACs of the backbone, and open gates, by class."""
    rows = np.flatnonzero(analysis.counts)
    rows = rows[np.argsort(analysis.class_macs[rows])]
    names = plotly_names(analysis.classes)
    dots = go.Scatter(
        x=analysis.class_macs[rows] / 1e6,
        y=[names[row] for row in rows],
        mode="markers",
        marker={"color": ON, "size": 11},
        customdata=100 * analysis.class_densities[rows],
        hovertemplate="%{y}: %{x:.2f} MMACs, %{customdata:.1f} % of the gates open<extra></extra>",
    )
    drawn = figure([dots], "MMACs an image, mean of the class", height=min(1600, 120 + 22 * len(rows)))
    drawn.update_yaxes(type="category")
    return drawn


def class_densities(analysis: GateAnalysis) -> go.Figure:
    """Share of open gates by class, in the same order."""
    drawn = class_costs(analysis)
    dots: Any = drawn.data[0]
    dots.x, dots.customdata = dots.customdata, dots.x
    dots.hovertemplate = "%{y}: %{x:.1f} % of the gates open, %{customdata:.2f} MMACs<extra></extra>"
    drawn.update_xaxes(title="% of the gates open, mean of the class")
    return drawn


def costs_per_sample(analysis: GateAnalysis) -> go.Figure:
    """MACs of the backbone under the gates of images drawn at random."""
    macs = analysis.samples.macs / 1e6
    low, high = macs.min(), macs.max()
    edges = np.linspace(low, high if high > low else low + 1e-6, 51)
    heights = np.histogram(macs, edges)[0]
    bars = go.Bar(x=(edges[1:] + edges[:-1]) / 2, y=heights, width=np.diff(edges), marker_color=ON)
    bars.hovertemplate = "about %{x:.3f} MMACs: %{y} images<extra></extra>"
    return figure([bars], "MMACs an image", "images", bargap=0)


def forced_sites(analysis: GateAnalysis, forced: Forced) -> go.Figure:
    """Accuracy with all gates of a layer closed or open, beside as many gates at random."""
    numbers, names = list(range(1, len(analysis.sites) + 1)), plotly_names(site["conv"] for site in analysis.sites)
    kinds = (
        ("layer closed", forced.sites.forced[CLOSED], PALETTE[1], "circle", "solid"),
        ("as many gates closed, at random", forced.sites.by_chance[CLOSED], PALETTE[1], "circle-open", "dot"),
        ("layer open", forced.sites.forced[OPEN], PALETTE[0], "diamond", "solid"),
        ("as many gates opened, at random", forced.sites.by_chance[OPEN], PALETTE[0], "diamond-open", "dot"),
    )
    lines = [
        go.Scatter(
            x=numbers,
            y=100 * forced.overall(shares),
            name=name,
            mode="lines+markers",
            marker={"color": colour, "symbol": symbol},
            line={"color": colour, "dash": dash},
            customdata=names,
            hovertemplate="layer %{x}, %{customdata}: %{y:.1f} %",
        )
        for name, shares, colour, symbol, dash in kinds
    ]
    drawn = figure(lines, "gated layer, first to last", "accuracy (%)")
    drawn.add_hline(y=100 * forced.accuracy, line_dash="dash", line_color="#7F7F7F")
    return drawn


def forced_site_classes(analysis: GateAnalysis, forced: Forced) -> go.Figure:
    """Which classes suffer when a layer's gates are closed: at most 30, those that lose most."""
    change = 100 * (forced.sites.forced[CLOSED] - forced.before)  # (S, K)
    present = np.flatnonzero(forced.counts)
    rows = present[np.argsort(change[:, present].min(0), kind="stable")[:30]]
    names = plotly_names(analysis.classes)
    heat = go.Heatmap(
        z=change[:, rows].T,
        x=list(range(1, len(analysis.sites) + 1)),
        y=[names[row] for row in rows],
        colorscale=[[0, PALETTE[1]], [0.5, "#F2F2F2"], [1, PALETTE[0]]],
        zmid=0,
        colorbar={"title": {"text": "points of accuracy", "side": "right"}, "thickness": 12},
        hovertemplate="%{y}, layer %{x} closed: %{z:+.1f} points<extra></extra>",
    )
    drawn = figure([heat], "gated layer that is closed", height=160 + 20 * len(rows))
    drawn.update_yaxes(type="category", autorange="reversed")
    return drawn


def forced_classes(analysis: GateAnalysis, forced: Forced) -> go.Figure:
    """Accuracy of each class with its own gates forced, and with as many others."""
    places, rows = np.arange(len(forced.classes)), forced.classes
    kinds = (
        ("as they are", forced.before[rows], OFF),
        ("its own closed", forced.own.forced[CLOSED, places, rows], PALETTE[1]),
        ("as many closed, at random", forced.own.by_chance[CLOSED, places, rows], "rgba(213, 94, 0, 0.4)"),
        ("its own open", forced.own.forced[OPEN, places, rows], PALETTE[0]),
        ("as many opened, at random", forced.own.by_chance[OPEN, places, rows], "rgba(0, 114, 178, 0.4)"),
    )
    names = plotly_names(analysis.classes)
    shown = [names[row] for row in rows]
    bars = [go.Bar(x=shown, y=100 * shares, name=name, marker_color=colour) for name, shares, colour in kinds]
    for bar in bars:
        bar.hovertemplate = "%{x}: %{y:.1f} %"
    drawn = figure(bars, "", "accuracy (%)", barmode="group")
    drawn.update_xaxes(type="category")
    return drawn


def exchanged_gates(forced: Forced) -> go.Figure:
    """What is predicted under gates of other images: the image's class, or that of the image they were made for."""
    found = forced.exchanged
    kinds = [
        ("its own", found.own, math.nan),
        ("each as usual", found.usual, math.nan),
        ("another image's,<br>same class", found.same, math.nan),
        ("another image's,<br>another class", found.image, found.gates),
    ]
    names, image, gates = zip(*(kind for kind in kinds if not math.isnan(kind[1])), strict=True)
    told = (("the image's class", image, PALETTE[0]), ("the class of the gates' image", gates, PALETTE[1]))
    bars = [
        go.Bar(x=names, y=100 * np.array(shares), name=name, marker_color=colour, hovertemplate="%{y:.1f} %")
        for name, shares, colour in told
    ]
    drawn = figure(bars, "gates", "% predicted as", barmode="stack")
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(range=[0, 100])
    return drawn


def comparison(runs: Mapping[str, GateAnalysis], row: int) -> go.Figure:
    """One row of `GateAnalysis.site_shares`, of several runs, along the depth of their networks."""
    lines, symbols = [], ("circle", "diamond", "square", "x", "triangle-up", "cross")
    for number, analysis in enumerate(runs.values()):
        share = analysis.site_shares[row]
        depth = (np.arange(len(share)) + 0.5) / len(share)
        marker = {"color": PALETTE[number % len(PALETTE)], "symbol": symbols[number % len(symbols)], "size": 8}
        lines.append(go.Scatter(x=100 * depth, y=100 * share, mode="lines+markers", marker=marker))
    drawn = side_by_side(lines, runs, "depth of the gated layer, %", "% of its gates")
    drawn.update_yaxes(range=[-3, 103])
    return drawn


def class_accuracies(runs: Mapping[str, GateAnalysis]) -> go.Figure:
    """Of several runs on the same images, the share of each class that is predicted rightly."""
    bars = []
    for analysis in runs.values():
        present, names = np.flatnonzero(analysis.counts), plotly_names(analysis.classes)
        share = 100 * analysis.class_right[present] / analysis.counts[present]
        bars.append(go.Bar(x=[names[row] for row in present], y=share))
    drawn = side_by_side(bars, runs, "", "accuracy (%)", barmode="group")
    drawn.update_xaxes(type="category")
    return drawn


def side_by_side(traces: Sequence[Any], runs: Iterable[str], x: str, y: str, **layout: Any) -> go.Figure:
    """One trace of each run: the legend has their numbers, for names can be long; pointing at one shows its name."""
    for number, (trace, name) in enumerate(zip(traces, plotly_names(runs), strict=True), start=1):
        trace.name, trace.hovertext = str(number), name
        trace.hovertemplate = f"{number}: %{{hovertext}}<br>%{{y:.1f}} %<extra></extra>"
    return figure(traces, x, y, _HEIGHT + min(600, 20 * max(0, len(traces) - 6)), **layout)
