"""One page that compares the gates of several models."""

import html
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from gaternet import files
from gaternet.findings import GateAnalysis
from gaternet.recipe import data_name
from gaternet.report import figures
from gaternet.report.page import figure_place, page

_OTHER_IMAGES = (
    "These models were not run on the same images: how accurate they are, how many gates depend on the image and what "
    "an image costs are not to be compared."
)


def write_comparison(
    runs: Mapping[str, GateAnalysis], directory: Path, links: Sequence[str], data: Sequence[str]
) -> Path:
    """Write index.html, which links to each run's own page; its path.

    Args:
        runs: what was found of each, by name.
        directory: of the page; made if it is not there.
        links: folder of each run's own page, seen from there.
        data: whose test images each was run on. What depends on the images is drawn side by side where all are the
            same.

    Raises:
        OSError: the file cannot be written.
    """
    files.make_folder(directory)
    folders = zip(*(name.split("/")[:-1] for name in runs), strict=False)
    folder = "".join(f"{same[0]}/" for same in itertools.takewhile(lambda same: len(set(same)) == 1, folders))
    runs = {name.removeprefix(folder): analysis for name, analysis in runs.items()}
    drawn = {
        "off": figures.comparison(runs, 0),
        "on": figures.comparison(runs, 1),
        "dependent": figures.comparison(runs, 2),
    }
    same = _same_images(list(runs.values()), data)
    if same and all(analysis.labeled for analysis in runs.values()):
        drawn["classes"] = figures.class_accuracies(runs)
    headings = {
        "off": "Gates that are always closed",
        "on": "Gates that are always open",
        "dependent": "Gates that depend on the image",
        "classes": "Accuracy by class",
    }
    explained = (
        "Figures name the models by their numbers. Open: share of the gates, on average. Dependent: open for some "
        "images, closed for others. Bits: what such a gate tells about the class, on average. MMACs: million "
        "multiply-accumulates that the backbone takes for an image, on average, and their share of what it takes with "
        "all gates open."
    )
    body = [] if same else [f'<p class="notice">{_OTHER_IMAGES}</p>']
    body += [f'<div class="scroll" tabindex="0">{_table(runs, links, data)}</div><p class="soft">{explained}</p>']
    body += [f"<section><h2>{headings[name]}</h2>{figure_place(name, headings[name])}</section>\n" for name in drawn]
    shown = {"figures": {name: figure.to_plotly_json() for name, figure in drawn.items()}, "strips": {}}
    text = page("Gates compared", f"{len(runs)} models" + (f" in {folder}" if folder else ""), body, shown, "")
    files.write_atomically(directory / "index.html", lambda path: path.write_text(text, "utf-8", "backslashreplace"))
    return directory / "index.html"


def _same_images(analyses: Sequence[GateAnalysis], data: Sequence[str]) -> bool:
    """Whether all were run on one set: by its name, its classes and how many images each has."""
    found = {
        (source, analysis.classes, analysis.images, tuple(analysis.counts) if analysis.labeled else None)
        for analysis, source in zip(analyses, data, strict=True)
    }
    return len(found) == 1


def _table(runs: Mapping[str, GateAnalysis], links: Sequence[str], data: Sequence[str]) -> str:
    names = [data_name(source) for source in data]
    names = names if len(set(names)) == len(set(data)) else data  # folders tell those of one name apart
    titles = (
        "run",
        "data",
        "images",
        "accuracy",
        "gates",
        "open",
        "dependent",
        "bits",
        "MMACs",
        "of all open",
        "gater's MMACs",
    )
    rows = []
    for number, (name, link, source) in enumerate(zip(runs, links, names, strict=True), start=1):
        analysis = runs[name]
        told = analysis.information()[analysis.dependent]
        cells = [
            f'{number}: <a href="{html.escape(link)}/index.html">{html.escape(name)}</a>',
            html.escape(source),
            f"{analysis.images:,}",
            "" if analysis.accuracy is None else f"{100 * analysis.accuracy:.2f} %",
            f"{analysis.num_gates:,}",
            f"{100 * analysis.rates.mean():.1f} %",
            f"{100 * analysis.dependent.mean():.1f} %",
            f"{told.mean():.4f}" if len(told) else "",
            f"{analysis.gated_macs / 1e6:,.1f}",
            f"{100 * analysis.gated_macs / analysis.backbone_macs:.0f} %",
            f"{analysis.gater_macs / 1e6:,.1f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
