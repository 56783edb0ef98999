"""The figures of the report, as Plotly figures: what `GateAnalysis` and `Forced` hold, drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from gaternet.analysis import GateAnalysis
from gaternet.forcing import Forced
from gaternet.report.reading import arrange, shown_gates

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


def units(analysis: GateAnalysis) -> go.Figure:
    """Paper, figure 3: of each gated layer the share of gates that are always off, always on, dependent."""
    names, shares = [site["conv"] for site in analysis.sites], site_shares(analysis)
    numbers = list(range(1, len(names) + 1))
    kinds = (("always off", OFF), ("always on", ON), ("dependent on the image", DEPENDENT))
    bars = [
        go.Bar(x=numbers, y=100 * share, name=kind, marker_color=colour, customdata=names, hovertemplate=_hover(kind))
        for (kind, colour), share in zip(kinds, shares, strict=True)
    ]
    return figure(bars, "gated layer, first to last", "% of its gates", barmode="stack", bargap=0.1)


def _hover(kind: str) -> str:
    return f"layer %{{x}}, %{{customdata}}<br>{kind}: %{{y:.1f}} %<extra></extra>"


def site_shares(analysis: GateAnalysis) -> NDArray[np.float64]:
    """Shares of gates always off, always on and dependent, of each site, in [0, 1], (3, S)."""
    counts, images = analysis.open_counts, analysis.images
    kinds = np.stack([counts == 0, counts == images, analysis.dependent])
    return np.stack([kinds[:, site["start"] : site["stop"]].mean(1) for site in analysis.sites], 1)


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
    bars = go.Bar(x=starts + (step - 1) / 2, y=heights, width=step, marker_color=ON)
    bars.hovertemplate = "%{x:.0f} gates: %{y} images<extra></extra>"
    return figure([bars], "open gates", "images", bargap=0)


def map_of_samples(analysis: GateAnalysis, points: NDArray[np.float32]) -> go.Figure:
    """Paper, figure 6: gate vectors of images, laid out in the plane; hovering shows the image (see page.js)."""
    samples = analysis.samples
    chosen = samples.label if analysis.labeled else samples.prediction
    dots = []
    for label in np.unique(chosen):
        rows = np.flatnonzero(chosen == label)
        dots.append(
            go.Scatter(
                x=points[rows, 0],
                y=points[rows, 1],
                mode="markers",
                name=analysis.classes[label],
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
    gates = shown_gates(analysis, 300)
    rows = np.flatnonzero(analysis.counts)
    rates = analysis.class_rates[np.ix_(rows, gates)]
    rows_order, columns_order = arrange(rates), arrange(rates.T)
    heat = go.Heatmap(
        z=100 * rates[np.ix_(rows_order, columns_order)],
        y=[analysis.classes[row] for row in rows[rows_order]],
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
    dependent = analysis.dependent
    found, chance = analysis.information()[dependent], analysis.information_by_chance()[:, dependent]
    edges = np.linspace(0, max(found.max(), chance.max(), 1e-6), 61)
    middle = (edges[1:] + edges[:-1]) / 2
    heights, by_chance = np.histogram(found, edges)[0], np.histogram(chance, edges)[0] / len(chance)
    bars = [
        go.Bar(x=middle, y=values, width=np.diff(edges), name=name, marker_color=colour, opacity=0.75)
        for name, values, colour in (("labels shuffled", by_chance, OFF), ("measured", heights, ON))
    ]
    for bar in bars:
        bar.hovertemplate = "%{x:.4f} bits: %{y:.1f} gates"
    drawn = figure(bars, "bits about the class", "gates", barmode="overlay", bargap=0)
    drawn.update_yaxes(type="log")
    return drawn


def class_costs(analysis: GateAnalysis) -> go.Figure:
    """MACs of the backbone by class."""
    rows = np.flatnonzero(analysis.counts)
    rows = rows[np.argsort(analysis.class_macs[rows])]
    dots = go.Scatter(
        x=analysis.class_macs[rows] / 1e6,
        y=[analysis.classes[row] for row in rows],
        mode="markers",
        marker={"color": ON, "size": 11},
        hovertemplate="%{y}: %{x:.2f} MMACs<extra></extra>",
    )
    drawn = figure([dots], "MMACs an image, of the open filters", height=min(1600, 120 + 22 * len(rows)))
    drawn.update_yaxes(type="category")
    return drawn


def forced_sites(analysis: GateAnalysis, forced: Forced) -> go.Figure:
    """Accuracy with all gates of a layer shut or open."""
    numbers, names = list(range(1, len(analysis.sites) + 1)), [site["conv"] for site in analysis.sites]
    lines = [
        go.Scatter(
            x=numbers,
            y=100 * values,
            name=name,
            mode="lines+markers",
            marker={"color": colour, "symbol": symbol},
            line={"color": colour},
            customdata=names,
            hovertemplate="layer %{x}, %{customdata}: %{y:.1f} %",
        )
        for name, values, colour, symbol in (
            ("layer's gates all shut", forced.site_shut, PALETTE[1], "circle"),
            ("layer's gates all open", forced.site_open, PALETTE[0], "diamond"),
        )
    ]
    drawn = figure(lines, "gated layer, first to last", "% right")
    drawn.add_hline(y=100 * forced.accuracy, line_dash="dot", line_color="#7F7F7F", annotation_text="as they are")
    return drawn


def forced_classes(analysis: GateAnalysis, forced: Forced) -> go.Figure:
    """Accuracy of each class with its own gates shut, and with as many others shut."""
    rows = np.flatnonzero(np.isfinite(forced.class_own))
    kinds = (
        ("as they are", forced.class_before, OFF),
        ("others shut, at random", forced.class_random, PALETTE[0]),
        ("its own shut", forced.class_own, PALETTE[1]),
    )
    names = [analysis.classes[row] for row in rows]
    bars = [
        go.Bar(x=names, y=100 * values[rows], name=name, marker_color=colour, hovertemplate="%{x}: %{y:.1f} %")
        for name, values, colour in kinds
    ]
    drawn = figure(bars, "", "% right", barmode="group")
    drawn.update_xaxes(type="category")
    return drawn


def comparison(runs: Mapping[str, GateAnalysis], row: int) -> go.Figure:
    """One of `site_shares`' rows, of several runs, along the depth of their networks."""
    lines = []
    for number, (name, analysis) in enumerate(runs.items()):
        share = site_shares(analysis)[row]
        depth = (np.arange(len(share)) + 0.5) / len(share)
        colour = PALETTE[number % len(PALETTE)]
        lines.append(
            go.Scatter(x=100 * depth, y=100 * share, name=name, mode="lines+markers", marker={"color": colour})
        )
    return figure(lines, "depth of the gated layer, %", "% of its gates")
