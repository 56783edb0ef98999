"""The report: one HTML file that opens from a disk without a network, and gates.json with the numbers behind it."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.offline import get_plotlyjs

from gaternet import files
from gaternet.findings import GateAnalysis
from gaternet.forcing import CLOSED, OPEN, Forced
from gaternet.report import figures
from gaternet.report.numbers import numbers
from gaternet.report.reading import Probe, embed, probe

GATES_SHOWN = 60  # whose images are on the page

Section = tuple[str, str, str]  # heading, text, HTML

_LABELS = {  # of figures that share a heading
    "class-costs": "MACs of each class",
    "class-densities": "Share of the gates that each class opens",
    "costs": "MACs of single images",
    "forced-sites": "Accuracy with all gates of a layer forced",
    "forced-site-classes": "What each class loses where a layer is closed",
    "forced-classes": "Accuracy with the gates of a class forced",
    "exchanged-gates": "Predictions under the gates of other images",
}


def write_report(
    analysis: GateAnalysis, directory: Path, *, forced: Forced | None = None, title: str = "Gates", subtitle: str = ""
) -> Path:
    """Write index.html and gates.json into a directory; the path of index.html.

    Args:
        analysis: what to show.
        directory: made if it is not there; files of these names are replaced.
        forced: what forcing gates did, for this page's last part.
        title, subtitle: heading of the page, and a line below it.

    Raises:
        OSError: the files cannot be written.
    """
    files.make_folder(directory)
    found, page = numbers(analysis, forced), report_page(analysis, forced, title, subtitle)
    files.write_json(directory / "gates.json", found)
    files.write_atomically(directory / "index.html", lambda path: path.write_text(page, "utf-8", "backslashreplace"))
    return directory / "index.html"


def report_page(analysis: GateAnalysis, forced: Forced | None, title: str, subtitle: str) -> str:
    """The HTML of one model's report."""
    tested, points = probe(analysis), embed(analysis)
    drawn: dict[str, go.Figure] = {
        "units": figures.units(analysis),
        "per-sample": figures.gates_per_sample(analysis),
        "class-costs": figures.class_costs(analysis),
        "class-densities": figures.class_densities(analysis),
        "costs": figures.costs_per_sample(analysis),
    }
    some, several = bool(analysis.dependent.any()), int((analysis.counts > 0).sum()) > 1
    if some:
        drawn["per-gate"] = figures.samples_per_gate(analysis)
    if points is not None:
        drawn["map"] = figures.map_of_samples(analysis, points)
    if some and several:
        drawn |= {"class-map": figures.class_map(analysis), "information": figures.information(analysis)}
        drawn["selectivity"] = figures.selectivity(analysis)
    if forced is not None:
        drawn["forced-sites"] = figures.forced_sites(analysis, forced)
        drawn["forced-site-classes"] = figures.forced_site_classes(analysis, forced)
        if len(forced.classes):
            drawn["forced-classes"] = figures.forced_classes(analysis, forced)
        drawn["exchanged-gates"] = figures.exchanged_gates(forced)
    gates = _shown(analysis, forced) if some else []
    places = {place for gate in gates for place in (*gate["surest"], *gate["least"]) if place >= 0}
    groups = (analysis.samples, analysis.cheapest, analysis.dearest)
    places |= {int(place) for group in groups for place in group.index}
    data = {
        "figures": {name: figure.to_plotly_json() for name, figure in drawn.items()},
        "classes": figures.distinct_names(analysis.classes),
        "images": {place: analysis.facts[place] for place in sorted(places)},
        "gates": gates,
        "gateFigure": _gate_figure(analysis).to_plotly_json(),
        "strips": {
            "cheapest": analysis.cheapest.index.tolist(),
            "dearest": analysis.dearest.index.tolist(),
        },
    }
    sprite, data["sprite"] = _sprite(analysis, sorted(places))
    body = [_tiles(analysis, tested), *_notices(analysis)]
    body += [_section(*section) for section in _sections(analysis, drawn, gates, tested, forced)]
    return page(title, subtitle, body, data, sprite)


def page(title: str, subtitle: str, body: Sequence[str], data: Mapping[str, Any], sprite: str) -> str:
    """A whole page: everything that it needs is inside."""
    from plotly.utils import PlotlyJSONEncoder

    style, script = (
        (resources.files("gaternet.report") / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    written = json.dumps(data, cls=PlotlyJSONEncoder, separators=(",", ":")).replace("<", "\\u003c")
    image = f'<img id="sprite" alt="" hidden src="{sprite}">' if sprite else '<img id="sprite" alt="" hidden>'
    name, below = html.escape(title), html.escape(subtitle)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>{name}</h1>
<p class="soft">{below}</p>
<noscript>
<p class="notice">JavaScript, which draws the figures, is off here: gates.json has their numbers.</p>
</noscript>
{"".join(body)}
<div id="tip" role="status"></div>
{image}
<script type="application/json" id="report-data">{written}</script>
<script>
{script}</script>
</body>
</html>
"""


def figure_place(name: str, label: str) -> str:
    """Where the script draws a figure; the label is for those who do not see it, as gates.json is for its numbers."""
    return f'<div class="figure" id="{name}" role="img" aria-label="{html.escape(label)}"></div>'


def _tiles(analysis: GateAnalysis, tested: Probe | None) -> str:
    lows = np.flatnonzero(analysis.histogram)
    mean = analysis.open_counts.sum() / analysis.images
    share = analysis.gated_macs / analysis.backbone_macs
    tiles = [
        (f"{analysis.images:,}", "images"),
        *([(f"{100 * analysis.accuracy:.2f} %", "accuracy")] if analysis.accuracy is not None else []),
        (f"{analysis.num_gates:,}", f"gates at {len(analysis.sites)} layers"),
        (f"{100 * analysis.rates.mean():.1f} %", "of them open on average"),
        (f"{100 * analysis.dependent.mean():.1f} %", "dependent on the image"),
        (f"{mean:,.1f}", f"open for an image; {lows[0]:,} to {lows[-1]:,}"),
        (f"{analysis.gated_macs / 1e6:,.1f}M", f"MACs of the open filters, {100 * share:.0f} % of the backbone's"),
        (f"{analysis.gater_macs / 1e6:,.1f}M", "MACs of the gater"),
    ]
    if tested is not None:
        tiles.append((f"{100 * tested.accuracy:.1f} %", "predicted from the gates alone, by a linear probe"))
    return (
        '<div class="tiles">'
        + "".join(f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _notices(analysis: GateAnalysis) -> list[str]:
    notices = []
    if not analysis.dependent.any():
        notices.append(
            "No gate depends on the image: every one is open for all of the images or closed for all of them. The "
            "gater is untrained, or has collapsed; figures that need gates which differ are left out."
        )
    if not analysis.labeled:
        notices.append("The data has no labels: wherever this page speaks of classes, it means predicted ones.")
    if (analysis.counts > 0).sum() < 2:
        notices.append("All images are of one class: what compares classes is left out.")
    return [f'<p class="notice">{text}</p>' for text in notices]


def _sections(
    analysis: GateAnalysis,
    drawn: Mapping[str, go.Figure],
    gates: Sequence[Mapping[str, Any]],
    tested: Probe | None,
    forced: Forced | None,
) -> list[Section]:
    def place(name: str) -> str:
        return figure_place(name, labels[name])

    said = ""
    if tested is not None:
        said = (
            f" A linear probe that sees nothing but the gates is right for {100 * tested.accuracy:.1f} % of "
            f"{tested.images:,} images; the model for {100 * tested.model:.1f} % of them, the most frequent class "
            f"for {100 * tested.chance:.1f}\u00a0%."
        )
    texts = {  # figure -> heading and text
        "units": ("Layer by layer", "Gates that are closed for every image, open for every image, or neither."),
        "per-sample": ("Open gates for each image", "How many of all gates an image opens."),
        "per-gate": ("Images for each gate", "Of the dependent gates: how many images open each of them."),
        "map": (
            "Images with similar gates",
            f"{len(analysis.samples.index):,} images, drawn at random; those whose gates are alike lie together "
            f"(PCA, then t-SNE of the dependent gates). Point at one to see it.{said}",
        ),
        "class-map": (
            "Which class opens which gates",
            "The dependent gates that tell most about the class, at most 300; alike ones stand together.",
        ),
        "information": (
            "What a gate tells about the class",
            "Mutual information of each dependent gate with the class, beside the same with the labels shuffled: "
            "what lies in the grey could be chance.",
        ),
        "selectivity": (
            "How much a gate is one class's",
            "Selectivity: 1 if a single class opens the gate, 0 if all open it equally often. Gates that few "
            "images open are selective by chance; the grey shows how much.",
        ),
    }
    labels = _LABELS | {name: heading for name, (heading, _) in texts.items()}
    sections = [(heading, text, place(name)) for name, (heading, text) in texts.items() if name in drawn]
    if gates:
        sections.append(_gate_section(gates, analysis.surest is not None))
    costs = "".join(place(name) for name in ("class-costs", "class-densities", "costs"))
    strips = (
        '<h3>Fewest MACs</h3><div class="strip" id="cheapest"></div>'
        '<h3>Most MACs</h3><div class="strip" id="dearest"></div>'
    )
    text = (
        "Multiply-accumulates (MACs) of the backbone's open filters, in millions (MMACs): the mean of each class, and "
        f"the share of gates that its images open; then of {len(analysis.samples.index):,} images drawn at random."
    )
    sections.append(("What an image costs", text, costs + strips))
    if forced is not None:
        text = (
            f"{forced.images:,} images with gates forced, so one image is {100 / forced.images:.1f} points. First all "
            f"gates of one layer (dashed: as they are, {100 * forced.accuracy:.1f} %), and which classes suffer "
            f"when it is closed. Then, of each class, at most {forced.taken:,} dependent gates that it opens more "
            "often than others do. Each is beside as many gates at random."
        )
        names = [name for name in ("forced-sites", "forced-site-classes", "forced-classes") if name in drawn]
        sections.append(("What gates are for", text, "".join(map(place, names))))
        text = (
            "The same images under gates that are not their own. Under those of an image of another class, a backbone "
            "that looks at the image predicts the image's class; one that reads the class from its gates predicts that "
            "of the gates' image. As usual: each gate as it is for most images."
        )
        sections.append(("Image or gates", text, place("exchanged-gates")))
    return sections


def _gate_section(gates: Sequence[Mapping[str, Any]], has_logits: bool) -> Section:
    options = "".join(
        f'<option value="{number}">gate {gate["gate"]}, {html.escape(gate["conv"])}</option>'
        for number, gate in enumerate(gates)
    )
    controls = (
        '<div class="controls"><button id="gate-before" type="button">Previous</button>'
        f'<select id="gate" aria-label="gate">{options}</select>'
        '<button id="gate-next" type="button">Next</button></div>'
    )
    strips = (
        '<h3>Images that open it most surely</h3><div class="strip" id="gate-surest"></div>'
        '<h3>Images that close it most surely</h3><div class="strip" id="gate-least"></div>'
    )
    inside = (
        f'{controls}<p id="gate-facts"></p><p id="gate-forced"></p>{strips if has_logits else ""}'
        f"<h3>How often each class opens it</h3>{figure_place('gate-classes', 'How often each class opens the gate')}"
    )
    return ("Gate by gate", f"The {len(gates)} gates that tell most about the class.", inside)


def _section(heading: str, text: str, inside: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{inside}</section>\n"


def _shown(analysis: GateAnalysis, forced: Forced | None) -> list[dict[str, Any]]:
    chosen, sayings = analysis.telling_gates(GATES_SHOWN), {} if forced is None else _forced_sayings(analysis, forced)
    bits, selectivity, rates = analysis.information(), analysis.selectivity(), 100 * analysis.class_rates
    chance, rows = analysis.information_by_chance().max(0), np.flatnonzero(analysis.counts)
    shown = []
    for gate in chosen.tolist():
        site = next(site for site in analysis.sites if site["start"] <= gate < site["stop"])
        surest, least = ([], []) if analysis.surest is None else analysis.surest[:, :, gate].tolist()
        facts = {"gate": gate, "conv": site["conv"], "rate": float(analysis.rates[gate]), "bits": float(bits[gate])}
        facts |= {"chance": float(chance[gate]), "selectivity": float(selectivity[gate])}
        facts["forced"] = sayings.get(gate, "")
        shown.append(facts | {"surest": surest, "least": least, "classRates": rates[rows, gate].round(2).tolist()})
    return shown


def _forced_sayings(analysis: GateAnalysis, forced: Forced) -> dict[int, str]:
    """A sentence for each gate that was forced by itself."""
    sayings, names = {}, figures.distinct_names(analysis.classes)
    for row, gate in enumerate(forced.gates.tolist()):
        parts = []
        for word, value in (("closed", CLOSED), ("open", OPEN)):
            shares, chance = forced.single.forced[value, row], forced.single.by_chance[value, row]
            lost = np.nan_to_num(forced.before - shares)
            worst = int(lost.argmax())
            hurt = f"{names[worst]} loses most, {100 * lost[worst]:.1f} points"
            parts.append(
                f"Forced {word}, {100 * forced.overall(shares):.1f}\u00a0% are right (another such gate at random: "
                f"{100 * forced.overall(chance):.1f}\u00a0%); {hurt if lost[worst] > 0 else 'no class loses'}."
            )
        sayings[gate] = " ".join([f"As it is, {100 * forced.accuracy:.1f}\u00a0% are right.", *parts])
    return sayings


def _gate_figure(analysis: GateAnalysis) -> go.Figure:
    names = figures.plotly_names(analysis.classes)
    shown = [names[row] for row in np.flatnonzero(analysis.counts)]
    bars = go.Bar(x=shown, y=[], marker_color=figures.ON, hovertemplate="%{x}: open for %{y:.1f} %<extra></extra>")
    drawn = figures.figure([bars], "", "% of its images", height=240)
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(range=[0, 100])
    return drawn


def _sprite(analysis: GateAnalysis, places: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """All small images in one, as a data URL, and where each of them lies."""
    shown = {place: analysis.thumbnails[place] for place in places if place in analysis.thumbnails}
    tile = max((max(image.shape[:2]) for image in shown.values()), default=1)
    columns = max(1, math.ceil(math.sqrt(len(shown))))
    rows = max(1, math.ceil(len(shown) / columns))
    sheet = np.full((rows * tile, columns * tile, 3), 128, np.uint8)
    for slot, image in enumerate(shown.values()):
        top, left = slot // columns * tile, slot % columns * tile
        top, left = top + (tile - image.shape[0]) // 2, left + (tile - image.shape[1]) // 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "JPEG", quality=88)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    slots = {place: slot for slot, place in enumerate(shown)}
    return url, {"columns": columns, "rows": rows, "tile": tile, "slots": slots}
