"""The figures in README.md and docs/method.md: a few of those of docs/results.md."""

import shlex
from collections.abc import Sequence
from typing import Any

from tables import (
    DOCS,
    RESULTS,
    TITLES,
    as_code,
    chosen,
    figures,
    machine_of,
    machines_of,
    marked_error,
    mean_macs,
    table,
    trains_like,
)

from gaternet.files import read_json
from gaternet.ledger import train_flags
from gaternet.recipe import override
from gaternet.recipes import find_recipe

README, METHOD = DOCS.parent / "README.md", DOCS / "method.md"
_BEGIN, _END = "<!-- benchmarks/results.py writes this -->\n", "<!-- to here -->\n"
_NETWORKS = {
    "cifar10_resnet20": "plain",
    "cifar10_resnet20_wider": "Wider: plain, with as many parameters as the gated one",
    "cifar10_resnet20_gated": "gated, by what is known of the paper's training",
    "cifar10_resnet20_guided": "gated, trained our way",
}
_LATE = {"sparsity_start": 6.0, "sparsity_ramp": 6.0}
_TAUGHT = {"teacher": "runs/short_resnet20,epochs=16/seed0"}
_SHORT: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "short_resnet20", {}),
    ("Wider", "short_resnet20_wider", {}),
    ("gated", "short_resnet20_gated", {}),
    ("gated, guided", "short_resnet20_guided", {"open_probability": 0.0}),
    ("gated, guided, open samples", "short_resnet20_guided", {}),
    ("narrow", "short_resnet20_narrow", {}),
    ("gated to half of the MACs", "short_resnet20_half", _LATE),
    ("narrow, with a teacher", "short_resnet20_narrow", _TAUGHT),
    ("gated to half of the MACs, with a teacher", "short_resnet20_half", {**_LATE, **_TAUGHT}),
]


def accuracy(ledger: list[dict[str, Any]]) -> str:
    """ResNet-20 on CIFAR-10, beside the paper's figures."""
    rows, measured = [], []
    for name, what in _NETWORKS.items():
        recipe = find_recipe(name)
        runs = [line for line in ledger if trains_like(line, recipe)]
        measured += runs
        size, macs, error = "", "", "not measured"
        if runs:
            size, macs = f"{runs[0]['parameters'] / 1e6:.2f}M", f"{mean_macs(runs) / 1e6:.1f}M"
            error = marked_error(runs, name)
        paper = f"{recipe.paper.error:.2f}" if recipe.paper else ""
        rows.append([what, f"`{name}`", size, macs, paper, error])
    text = f"ResNet-20 on CIFAR-10, 160 epochs ({machines_of(measured) or 'not measured'}):\n\n"
    titles = ["network", "recipe", "parameters", "MACs", "paper's error %", "ours"]
    return text + table(titles, rows) + chosen([row[-1] for row in rows])


def in_sixteen_epochs(ledger: list[dict[str, Any]]) -> str:
    """What a CPU can find out about ResNet-20 on CIFAR-10."""
    rows, measured = [], []
    for what, name, options in _SHORT:
        recipe = override(find_recipe(name), {"epochs": 16, **options})
        runs = [line for line in ledger if trains_like(line, recipe)]
        measured += runs
        command = as_code("gaternet train", name, shlex.join(train_flags(options)))
        rows.append([what, *(figures(runs)[1:-1] if runs else ["", "not measured", "", "", ""]), command])
    text = f"ResNet-20 on CIFAR-10, 16 epochs ({machines_of(measured) or 'not measured'}); all with `--epochs 16`:\n\n"
    return text + table(["network", *TITLES[1:-1], "command"], rows)


def speed() -> str:
    """What skipping saves on ResNet-50, one image at a time and several."""
    found = read_json(RESULTS / "skipping.json")
    timings: dict[int, list[dict[str, Any]]] = {}
    for row in found["resnet50"]:
        timings.setdefault(row["batch"], []).append(row)
    dense = {batch: [row for row in rows if row["name"].startswith("dense: ")] for batch, rows in timings.items()}
    rows = [_cells("dense", [min(of_batch, key=lambda row: row["median"]) for of_batch in dense.values()])]
    for kind in ("skipped", "gater"):
        for same in zip(*([r for r in rows if r["name"] == kind] for rows in timings.values()), strict=True):
            share = same[0]["density"]  # of other batches about the same
            rows.append(_cells(kind if share is None else f"{100 * share:.0f} % open", same))
    *engines, last = [row["name"].removeprefix("dense: ") for row in next(iter(dense.values()))]
    text = "ResNet-50 at 224 pixels, all filters gated, gates drawn at random for each image of a batch "
    text += (
        f"({machine_of(found)}, float32). *Dense* is the fastest of {', '.join(engines)} and {last}; the gater's time "
    )
    text += (
        f"comes on top. Medians of {found['rounds']} turns, at batch 1 of {3 * found['rounds']}; *x* is that of the "
    )
    text += "ratios to dense in the same turn.\n\n"
    titles = [f"{what}, batch {batch}" for batch in timings for what in ("MACs", "ms")]
    return text + table(["", *titles], rows)


def _cells(name: str, of_batches: Sequence[dict[str, Any]]) -> list[str]:
    cells = [name]
    for row in of_batches:
        ratio = "" if name == "dense" else f" ({row['over_dense']:.2f} x)"
        cells += [f"{row['macs'] / 1e9:.2f}G", f"{row['median']:.1f}{ratio}"]
    return cells


def with_summary(text: str, ledger: list[dict[str, Any]]) -> str:
    """README.md's text with the figures as they are now recorded."""
    return _with_part(text, f"{accuracy(ledger)}\n{speed()}")


def with_short(text: str, ledger: list[dict[str, Any]]) -> str:
    """The same of docs/method.md."""
    return _with_part(text, in_sixteen_epochs(ledger))


def _with_part(text: str, part: str) -> str:
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}{part}{_END}{rest.split(_END)[1]}"
