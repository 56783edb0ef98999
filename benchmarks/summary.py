"""The figures in README.md: a few of those of docs/results.md."""

from collections.abc import Sequence
from typing import Any

from tables import DOCS, chosen, machine_of, machines_of, marked_error, mean_macs, table, trains_like

from gaternet.checkpoint import read_json
from gaternet.recipes import find_recipe

README = DOCS.parent / "README.md"
_BEGIN, _END = "<!-- benchmarks/results.py writes this -->\n", "<!-- to here -->\n"
_NETWORKS = {
    "cifar10_resnet20": "plain",
    "cifar10_resnet20_wider": "Wider: plain, with as many parameters as the gated one",
    "cifar10_resnet20_gated": "gated, by what is known of the paper's training",
    "cifar10_resnet20_guided": "gated, trained our way",
}


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


def speed() -> str:
    """What skipping saves on ResNet-50, one image at a time and several."""
    found = read_json(DOCS / "results" / "skipping.json")
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
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}{accuracy(ledger)}\n{speed()}{_END}{after}"
