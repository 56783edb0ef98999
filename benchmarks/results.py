"""Keep the ledger of finished runs, and write docs/results.md from it.

python benchmarks/results.py add RUN...    # a line in docs/results/runs.jsonl for each finished run, then the page
gaternet sweep RECIPE... --ledger docs/results/runs.jsonl    # or trained so from the start
python benchmarks/results.py               # the page alone

Every figure of docs/results.md comes from docs/results/*: nothing is typed by hand. A row of the paper counts as
measured only by runs of its recipe with no option changed; all others are listed under the command that made them.
"""

import argparse
import json
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_points

from gaternet.checkpoint import read_json
from gaternet.ledger import add_run, changed_options, read_ledger, train_flags
from gaternet.recipes import RECIPES

DOCS = Path(__file__).parents[1] / "docs"
LEDGER = DOCS / "results" / "runs.jsonl"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def error_of(lines: list[dict[str, Any]]) -> str:
    """Mean test error in percent, with its standard deviation and the number of runs."""
    errors = [line["test_error"] for line in lines]
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{spread} (n = {len(errors)})"


def machine_of(line: dict[str, Any]) -> str:
    """The machine in a few words."""
    machine = line["machine"]
    return ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores"


def paper_rows(ledger: list[dict[str, Any]]) -> str:
    """The paper's rows, each beside what was measured; of ImageNet's the errors of one and of five guesses."""
    rows = []
    for recipe in RECIPES.values():
        paper = recipe.paper
        if paper is None:
            continue
        runs = [line for line in ledger if line["as_published"] and line["recipe"] == recipe.name]
        reported, ours, difference = f"{paper.error:.2f}", "not measured", ""
        if runs:
            ours = error_of(runs)
            difference = f"{statistics.mean(r['test_error'] for r in runs) - paper.error:+.2f}"
        if paper.top5_error is not None:
            reported += f" / {paper.top5_error:.2f}"
            if runs:
                ours += f" / {statistics.mean(r['test_top5_error'] for r in runs):.2f}"
        rows.append([f"`{recipe.name}`", paper.params or "", reported, ours, difference])
    return table(["recipe", "size", "paper's error %", "ours", "difference"], rows)


def machines_of(lines: list[dict[str, Any]]) -> str:
    """All machines of several runs."""
    return "; ".join(sorted({machine_of(line) for line in lines}))


def by_options(ledger: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs that differ only in their seed, or in the machine, together: (recipe, options as flags) -> their lines."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in ledger:
        groups.setdefault((line["recipe"], shlex.join(train_flags(line["options"]))), []).append(line)
    return groups


TITLES = ["size", "MACs", "test error %", "train loss", "open", "dependent", "minutes"]


def figures(lines: list[dict[str, Any]]) -> list[str]:
    """What `TITLES` names, in the mean over runs."""

    def mean(get: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(map(get, lines))

    opened = dependent = "-"
    macs = mean(lambda line: line["backbone_macs"])
    if lines[0]["gates"]:
        macs = mean(lambda line: line["gated_macs"] + line["gater_macs"])
        opened = f"{100 * mean(lambda line: line['gates']['density']):.1f} %"
        dependent = f"{100 * mean(lambda line: line['gates']['dependent']):.1f} %"
    size = f"{mean(lambda line: line['parameters']) / 1e6:.2f}M"
    train_loss = f"{mean(lambda line: line['train_loss']):.3f}"
    minutes = f"{mean(lambda line: line['seconds']) / 60:.0f}"
    return [size, f"{macs / 1e6:.1f}M", error_of(lines), train_loss, opened, dependent, minutes]


def other_runs(ledger: list[dict[str, Any]]) -> str:
    """Runs of our own recipes, and of any with options changed."""
    groups = by_options([line for line in ledger if not line["as_published"] and not is_open_point(line)])
    rows = [
        [f"`{' '.join(filter(None, ['gaternet train', recipe, flags]))}`", *figures(lines), machines_of(lines)]
        for (recipe, flags), lines in sorted(groups.items())
    ]
    return table(["command", *TITLES, "machine"], rows) if rows else "None.\n"


def is_open_point(line: dict[str, Any]) -> bool:
    """Whether a run is one of benchmarks/open_points.py."""
    return line["recipe"] in (open_points.PLAIN, open_points.WIDER, open_points.GATED)


def silent_points(ledger: list[dict[str, Any]]) -> str:
    """One question after the other, each with the network that has no option changed above."""
    groups = by_options(list(filter(is_open_point, ledger)))
    if (open_points.GATED, "") not in groups:
        return "Not measured.\n"
    data, out = open_points.DATA, Path("runs")
    rows, planned = [], [("", recipe) for recipe in open_points.networks(data)]
    planned += [(question, r) for question, rs in open_points.variants(data, out).items() for r in rs]
    asked = ""
    for question, recipe in planned:
        flags = shlex.join(train_flags(changed_options(recipe)))
        lines = groups.get((recipe.name, flags))
        cells = figures(lines) if lines else ["", "", "not measured", "", "", "", ""]
        rows.append([question if question != asked else "", f"`{flags or recipe.name}`", *cells])
        asked = question
    base = RECIPES[open_points.GATED]
    text = f"`python benchmarks/open_points.py`, ResNet-8 on CIFAR-10 at {base.image_size} pixels, {base.epochs} epochs"
    text += f" ({machines_of(groups[open_points.GATED, ''])}). One option at a time is changed in "
    text += f"`{open_points.GATED}`; its defaults are the paper's where that is known.\n\n"
    return text + table(["question", "recipe, or its change", *TITLES], rows)


def read_finetuned() -> list[dict[str, Any]]:
    """What benchmarks/finetune.py has recorded."""
    return json.loads((DOCS / "results" / "finetune.json").read_text())


def finetuned() -> str:
    """Networks trained by others, before and after; runs that differ only in their seed on one line."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in read_finetuned():
        groups.setdefault((line["model"], line["epochs"], line["group_size"]), []).append(line)
    rows, commands = [], []
    for (model, epochs, group_size), lines in groups.items():
        images = lines[0]["images"]

        def mean(key: str, lines: list[dict[str, Any]] = lines) -> float:
            return statistics.mean(line[key] for line in lines)

        rows.append(
            [
                model,
                str(group_size),
                str(epochs),
                f"{100 * (1 - mean('plain_correct') / images):.2f}",
                f"{mean('open_correct') - mean('plain_correct'):+g} of {images:,}",
                error_of([{"test_error": line["error"]} for line in lines]),
                f"{100 * mean('density'):.1f} %",
                f"{100 * mean('dependent'):.1f} %",
                f"{mean('gated_macs') / mean('backbone_macs'):.2f}",
                f"{(mean('gated_macs') + mean('gater_macs')) / mean('backbone_macs'):.2f}",
                f"{mean('minutes'):.0f}",
            ]
        )
        threads = lines[0]["machine"]["threads"]
        commands += [f"`{line['command']}` ({machine_of(line)}, {threads} threads)" for line in lines]
    titles = ["network", "group_size", "epochs", "test error %", "images right, gated and open", "error % fine-tuned"]
    titles += ["open gates", "dependent", "backbone's MACs", "with the gater", "minutes"]
    return table(titles, rows) + "\n" + "\n".join(f"- {command}" for command in commands) + "\n"


def skipping() -> str:
    """What skipping saves on the clock."""
    path = DOCS / "results" / "skipping.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    rounds = found["rounds"]
    text = f"`{found['command']}`, {machine_of(found)}, {found['machine']['threads']} threads, float32. Medians of "
    text += f"{rounds} turns (one image at a time: {3 * rounds}) of all engines in one process. *x dense* is the time "
    text += "over that of the fastest dense engine within the same turn, its median over the turns.\n\n"
    text += "### ResNet-50, 224 pixels, all sites, random gates for each image\n\n"
    text += timing_table(found["resnet50"], TARGETS)
    planning = found["planning"]
    text += (
        f"\nPlanning takes {planning['plan_seconds']:.2f} s, loading a saved plan {planning['load_seconds']:.2f} s. "
    )
    share = (planning["weight_bytes"] + planning["arena_bytes"]) / planning["dense_bytes"]
    text += f"The engine holds {planning['weight_bytes'] / 2**20:.1f} MiB of weights and "
    text += f"{planning['arena_bytes'] / 2**20:.1f} MiB to work in, together {share:.2f} x the dense weights "
    text += (
        "(target: at most 1.3).\n\nNeighbours that share a gate: ResNet-50, batch 1, half of the gates open; beside it "
    )
    text += (
        "the error of CIFAR-10's ResNet-20, fine-tuned for two epochs to half of its filters. Its first stage has 16 "
    )
    text += "filters, so 16 is a whole layer there.\n\n"
    tuned = [line for line in read_finetuned() if (line["model"], line["epochs"]) == ("resnet20", 2)]
    rows = []
    for size, timings in found["groups"].items():
        (row,) = [row for row in timings if row["name"] == "skipped"]
        errors = [{"test_error": line["error"]} for line in tuned if line["group_size"] == int(size)]
        cells = [size, f"{row['macs'] / 1e6:,.0f}", f"{row['median']:.1f}", f"{row['over_dense']:.2f}"]
        rows.append([*cells, error_of(errors) if errors else "not measured"])
    text += table(["group_size", "MMACs", "ms", "x dense", "ResNet-20's error %"], rows)
    text += "\nWhere the time goes, one image at a time, as shares of the time under open gates: *alone* are the same "
    text += "filters as a network that has no others, with no weights to be copied together. What skipping takes above "
    text += (
        "that is the copying; what that takes above its share of the MACs is what smaller convolutions lose, and the "
    )
    text += "dense residual stream.\n\n"
    columns = ("macs", "alone", "skipped")
    shares = [[f"{100 * row['density']:.0f} %", *(f"{row[name]:.2f}" for name in columns)] for row in found["bounds"]]
    text += table(["open", "MACs", "alone", "skipped"], shares)
    for model in found.get("trained", []):
        images, right = model["images"], model["right"]
        text += f"\n### {model['model']} on {model['data']}, trained, under its own gates\n\n"
        kept = ", ".join(f"{100 * share:.0f}" for share in model["kept"])
        text += f"{100 * model['density']:.1f} % of the gates are open. Of {images:,} test images "
        ways = ("plain", "masked", "skipped", "specialised")
        text += ", ".join(f"{right[way]:,} ({100 * right[way] / images:.2f} %) are right {way}" for way in ways) + ". "
        text += f"{len(model['kept'])} subnetworks keep {kept} % of the "
        text += f"filters; one of them fits {100 * model['fitting']:.0f} % of the test images.\n\n"
        text += f"`{model['command']}`, medians of {model['rounds']} turns:\n\n"
        text += timing_table(model["timings"], {})
    return text + "\n### On a GPU\n\nNot measured.\n"


def generalisation() -> str:
    """Training and test errors and those under corruptions, means over seeds."""
    path = DOCS / "results" / "generalisation.json"
    if not path.exists():
        return "Not measured.\n"
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in json.loads(path.read_text()):
        words = [line["recipe"], *train_flags(line["options"])]
        groups.setdefault(f"`{' '.join(words)}`", []).append(line)
    kinds = ("noise", "blur", "contrast", "jpeg")
    rows = []
    for name, lines in groups.items():

        def mean(kind: str, lines: list[dict[str, Any]] = lines) -> float:
            found = [e for line in lines for k, e in line["errors"].items() if k.split()[0] == kind]
            return statistics.mean(found)

        corrupted = [mean(kind) for kind in kinds]
        figures = [mean("train"), mean("test"), mean("test") - mean("train"), *corrupted, statistics.mean(corrupted)]
        size = f"{lines[0]['parameters'] / 1e6:.2f}M"
        rows.append([name, size, str(len(lines)), *(f"{figure:.1f}" for figure in figures)])
    text = "`python benchmarks/generalisation.py`: errors in %, of each corruption the mean of three strengths.\n\n"
    titles = ["recipe", "size", "n", "train", "test", "gap", *kinds, "corrupted"]
    return text + table(titles, rows)


# Batch and density -> the target for the time over that of the best dense engine
TARGETS = {(1, 1.0): 1.05, (1, 0.75): 0.95, (1, 0.5): 0.7, (1, 0.25): 0.45}
TARGETS |= {(16, 1.0): 1.05, (16, 0.75): 1.0, (16, 0.5): 0.75, (16, 0.25): 0.5}


def timing_table(timings: list[dict[str, Any]], targets: dict[tuple[int, float], float]) -> str:
    """A row for each batch and engine."""
    rows = []
    for row in timings:
        density = row["density"]
        opened = "" if density is None else f"{100 * density:.0f} %"
        near = [t for (batch, d), t in targets.items() if batch == row["batch"] and abs(d - (density or 0)) < 0.02]
        target = f"{near[0]:.2f}" if near and row["name"] == "skipped" else ""
        cells = [row["name"], str(row["batch"]), opened, f"{row['macs'] / 1e6:,.1f}", f"{row['median']:.2f}"]
        cells += [f"{row['p10']:.2f} to {row['p90']:.2f}", f"{1000 * row['batch'] / row['median']:,.0f}"]
        rows.append([*cells, f"{row['over_dense']:.2f}", *([target] if targets else [])])
    titles = ["engine", "batch", "open", "MMACs an image", "ms", "p10 to p90", "images/s", "x dense"]
    return table([*titles, *(["target"] if targets else [])], rows)


def exported() -> str:
    """How fast exported models are, and what 8 bits change."""
    path = DOCS / "results" / "export_speed.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    titles = ["file", "batch", "open", "ms", "p10 to p90", "images/s", "x plain", "MB"]

    def rows(timings: list[dict[str, Any]]) -> list[list[str]]:
        made = []
        for row in timings:
            density = "" if row["density"] is None else f"{100 * row['density']:.0f} %"
            cells = [row["name"], str(row["batch"]), density, f"{row['median']:.2f}"]
            cells += [f"{row['p10']:.2f} to {row['p90']:.2f}", f"{1000 * row['batch'] / row['median']:,.0f}"]
            made.append([*cells, f"{row['over_plain']:.2f}", f"{row['bytes'] / 1e6:.1f}"])
        return made

    text = f"`{found['command']}`, {machine_of(found)}, all in ONNX Runtime, gater included, medians of "
    text += f"{found['rounds']} turns; x plain: over the backbone's file without gates. [export.md](export.md) has "
    text += "which networks can be exported.\n\n### ResNet-50 at 224 pixels, gates at all sites, a fresh gater\n\n"
    text += table(titles, rows(found["resnet50"]))
    for name, each in found["trained"].items():
        text += f"\n### {name}, trained, under its own gates\n\n{table(titles, rows(each['timings']))}\n"
        effects = []
        for kind, effect in each["int8"].items():
            shares = (f"{100 * effect[key]:.2f} %" for key in ("accuracy", "int8_accuracy", "same_class"))
            effects.append([kind, f"{effect['images']:,}", *shares, f"{effect['flips']:.2f} of {effect['gates']:,}"])
        text += table(["file", "test images", "accuracy", "in 8 bits", "same class", "gates that flip"], effects)
    return text


def reports() -> str:
    """What an analysis takes, and its page."""
    path = DOCS / "results" / "report.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    seconds = found["seconds"]
    return (
        f"`{found['command']}`, {machine_of(found)}, medians of {found['rounds']} turns: {found['images']:,} images, "
        f"{found['gates']:,} gates, {100 * found['dependent']:.0f} % of them dependent on the image.\n\n"
        f"`evaluate` takes {seconds['evaluate']:.0f} s, `analyze` {seconds['analyze']:.0f} s: {found['ratio']:.2f} "
        "times as long (target: below 1.2).\n"
        f"The page is written in {found['writing_seconds']:.0f} s, has {found['page_bytes'] / 1e6:.1f} MB (target: "
        f"below 15) and is drawn {found['opening_seconds']:.1f} s after it was asked for (target: below 3).\n"
    )


def speed() -> str:
    """The benchmarks' figures."""
    text = ""
    path = DOCS / "results" / "training.json"
    if path.exists():
        found = read_json(path)
        rows = [
            [
                f"`{name}`",
                f"{1e3 * found['seconds'][part]:.0f}",
                f"{found['images_per_second'][part]:.0f}",
                f"{100 * found['outside'][part]:.1f} %",
                f"{found['macs'][part] / 1e6:.1f}M",
            ]
            for part, name in found["models"].items()
        ]
        text += f"### Training\n\n`{found['command']}`, {machine_of(found)}, {found['precision']} precision, "
        text += f"batch {found['batch']}, medians of {found['steps']} steps:\n\n"
        text += table(["model", "ms a step", "images/s", "outside of kernels", "MACs an image"], rows)
        text += f"\nGated over plain: {found['time_ratio']:.2f} in time, {found['mac_ratio']:.2f} in MACs, "
        text += f"quotient {found['time_ratio_over_mac_ratio']:.2f} (target: at most 1.10). Gates and bookkeeping, the "
        text += f"gated step over the sum of plain backbone and extractor: {found['overhead']:.3f}.\n"
    path = DOCS / "results" / "startup.json"
    if path.exists():
        found = read_json(path)
        text += f"\n### Startup\n\n`{found['command']}`, {machine_of(found)}, whole processes, "
        text += f"medians of {found['runs']}:\n\n"
        text += table(["command", "seconds"], [[f"`{name}`", f"{s:.2f}"] for name, s in found["seconds"].items()])
    return text or "Not measured.\n"


def page() -> str:
    """docs/results.md."""
    ledger = read_ledger(LEDGER)
    return (
        "# Results\n\n"
        "Written by `python benchmarks/results.py` from `docs/results/`; nothing here is typed by hand. Errors are on "
        "the test set after the last epoch, never the best one. n is the number of runs (seeds).\n\n"
        "## The paper's rows (Tables 1, 2 and 3)\n\n"
        "Measured by the recipe as it is, at full length; a run with any option changed does not count here.\n\n"
        f"{paper_rows(ledger)}\n"
        "## Our own recipes, and others with options changed\n\n"
        "MACs of an image: those of the open filters and of the gater, in the mean over the test images. A gate is "
        "dependent if it is open for some of them and closed for others. The short recipes are 8 epochs: they "
        "compare networks with each other, and are no evidence for or against the paper's figures.\n\n"
        f"{other_runs(ledger)}\n"
        f"## What the paper leaves open\n\n{silent_points(ledger)}\n"
        "## Networks trained by others\n\n"
        'Y. Idelbayev\'s CIFAR-10 ResNets, gated by `gaternet.gate(..., sites="all", open=True)`, then fine-tuned to '
        "half of their filters, a few epochs on a CPU. MACs are means over the test images, relative to the plain "
        "backbone.\n\n"
        f"{finetuned()}\n"
        f"## Generalisation\n\n{generalisation()}\n"
        f"## Skipping\n\n{skipping()}\n"
        f"## Exported files\n\n{exported()}\n"
        f"## Reports\n\n{reports()}\n"
        f"## Speed\n\n{speed()}"
    )


def main() -> None:
    """Add runs to the ledger, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("add").add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "add":
        for run in args.runs:
            add_run(LEDGER, run)
    (DOCS / "results.md").write_text(page())


if __name__ == "__main__":
    main()
