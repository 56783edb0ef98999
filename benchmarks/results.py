"""Keep the ledger of finished runs, and write docs/results.md and the figures of README.md and docs/method.md from it.

python benchmarks/results.py add RUN...    # a line in docs/results/runs.jsonl for each finished run, then the page
gaternet sweep RECIPE... --ledger docs/results/runs.jsonl    # or trained so from the start
python benchmarks/results.py               # the page, and the others' figures

Every figure of docs/results.md and of marked tables in the others comes from docs/results/*: nothing is typed by hand.
A row of the paper counts as measured only by runs of its recipe with no option changed; all others are listed under the
recipe and options that made them.
"""

import argparse
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from open_points import DATA, EACH_OPTION, GAP, STUDIES, Study
from summary import METHOD, README, with_short, with_summary
from tables import (
    DOCS,
    RESULTS,
    TITLES,
    as_code,
    as_named,
    by_options,
    chosen,
    error_of,
    figures,
    machine_of,
    machines_of,
    marked_error,
    mean_macs,
    read_finetuned,
    table,
    trained_recipe,
    trains_like,
)
from timing_tables import exported, reports, skipping, speed

from gaternet.files import write_atomically
from gaternet.ledger import add_run, changed_options, read_ledger, train_flags
from gaternet.recipe import Recipe, data_name
from gaternet.recipes import RECIPES, find_recipe

LEDGER = RESULTS / "runs.jsonl"
FULL_PRECISION = "All in full precision: errors differ a little from those above of runs in bf16."


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
    return table(["recipe", "size", "paper's error %", "ours", "difference"], rows) + places(ledger)


def places(ledger: list[dict[str, Any]]) -> str:
    """Where the published rows were trained."""
    found = []
    for line in ledger:
        if line["as_published"]:
            where = f"{machine_of(line)}, {line['precision']} precision (commit {line['commit']})"
            for part in line.get("resumed", []):
                where += f", from epoch {part['epoch']} on {machine_of(part)}, {part['precision']} precision "
                where += f"(commit {part['commit']})"
            where += f", {line['seconds'] / 60:.0f} minutes; training loss {line['train_loss']:.3f}"
            if gates := line["gates"]:
                where += (
                    f"; {100 * gates['density']:.1f} % of the gates open, {100 * gates['dependent']:.1f} % dependent"
                )
            found.append(f"- `{line['command']}`: {where}\n")
    text = "\nWhere these were trained, some side by side with others on one GPU:\n\n"
    return text + "".join(found).replace("no precision", "full precision") if found else ""


# Recipes past the paper, and what they are to reach
AIMS = {
    f"{data}_resnet20_{kind}": f"below `{data}_resnet20_wider`"
    for data in ("cifar10", "cifar100")
    for kind in ("guided", "all")
}
AIMS |= {"cifar10_resnet20_half": "at most 7.8 at half of the dense MACs, gater included"}
AIMS |= {"cifar10_resnet56_half": "at most 6.3 at half of the dense MACs, gater included"}


def past_the_paper(ledger: list[dict[str, Any]]) -> str:
    """Each of `AIMS` beside what was measured by its recipe, or by another with options that make it the same."""
    rows = []
    for name, aim in AIMS.items():
        runs = [line for line in ledger if trains_like(line, find_recipe(name))]
        ours, macs = "not measured", ""
        if runs:
            dense = statistics.mean(line["backbone_macs"] for line in runs)
            ours = marked_error(runs, name)
            macs = f"{mean_macs(runs) / dense:.2f}"
        rows.append([f"`{name}`", aim, ours, macs])
    titles = ["recipe", "aim, error %", "ours", "MACs, relative to the plain backbone"]
    return table(titles, rows) + chosen([row[2] for row in rows])


_ERROR = TITLES.index("test error %") + 1


def is_full_length(line: dict[str, Any]) -> bool:
    """Whether a run trained a network of the paper on the same images, and for as long."""
    ours = trained_recipe(line)
    rows = [recipe for recipe in RECIPES.values() if recipe.paper]
    return ours is not None and _task(ours) in map(_task, rows)


def _task(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.model, data_name(recipe.data), recipe.image_size, recipe.epochs


def full_length(ledger: list[dict[str, Any]]) -> str:
    """The paper's networks, trained as published and otherwise."""
    return commands([line for line in ledger if is_full_length(line)])


def other_runs(ledger: list[dict[str, Any]]) -> str:
    """Runs of our own recipes, and shortened ones of the paper's."""
    return commands([line for line in ledger if not is_full_length(line) and study_of(line) is None])


def commands(lines: list[dict[str, Any]]) -> str:
    """A row for each command; runs that are another recipe by their options stand under its name."""
    groups = by_options(lines)
    rows = [
        [as_code("gaternet train", recipe, flags), *figures(lines), machines_of(lines)]
        for (recipe, flags), lines in sorted(groups.items())
    ]
    return table(["command", *TITLES, "machine"], rows) if rows else "None.\n"


def study_of(line: dict[str, Any]) -> Study | None:
    """The study of benchmarks/open_points.py that a run belongs to."""
    for study in STUDIES.values():
        others = {"data", "epochs", "batch_size", "image_size"} - study.common.keys()
        ours = study.common.items() <= line["options"].items() and not others & line["options"].keys()
        if line["recipe"] in study.names and ours:
            return study
    return None


def silent_points(ledger: list[dict[str, Any]], study: Study) -> str:
    """One question after the other, each with the network that has no option changed above."""
    groups = by_options([line for line in ledger if study_of(line) is study], as_named)
    networks = study.networks(DATA)
    if not any(name == networks[-1].name for name, _ in groups):
        return "Not measured.\n"
    rows, planned = [], [("", recipe) for recipe in networks]
    planned += [(question, r) for question, rs in study.variants_of(DATA, Path("runs")).items() for r in rs]
    named = [(question, r.name, shlex.join(train_flags(changed_options(r)))) for question, r in planned]
    keys = {(name, flags) for _, name, flags in named}
    named += [("others", name, flags) for name, flags in groups if (name, flags) not in keys]
    gated = named[len(networks) - 1][1:]
    asked, unchanged = "", groups.get(gated, [])
    for question, name, flags in named:
        lines = groups.get((name, flags))
        cells = figures(lines) if lines else ["", "", "not measured", "", "", "", ""]
        cells.insert(_ERROR, difference(lines, unchanged) if lines and lines is not unchanged else "")
        rows.append([question if question != asked else "", as_code(name, flags), *cells])
        asked = question
    text = (
        f"`python benchmarks/open_points.py --network {study.backbone}`, CIFAR-10 at {networks[0].image_size} pixels, "
    )
    text += f"{networks[0].epochs} epochs ({machines_of([line for lines in groups.values() for line in lines])}). "
    text += f"*Than gated*: the error minus that of {as_code(*gated)} with the same seed"
    titles = [*TITLES[:_ERROR], "than gated", *TITLES[_ERROR:]]
    text += ", mean and deviation over seeds"
    by_seed = {line["seed"]: line["precision"] for lines in groups.values() for line in lines}
    if len(set(by_seed.values())) > 1:
        words = {seed: {"no": "in full precision"}.get(name, f"in {name}") for seed, name in by_seed.items()}
        text += "".join(f". Seed {seed} is {how}" for seed, how in sorted(words.items()))
    return f"{text}.\n\n" + table(["question", "recipe", *titles], rows)


def difference(lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Mean test error in percent above that of other runs, seed by seed, and its standard deviation."""
    errors = {line["seed"]: line["test_error"] for line in reference}
    found = [line["test_error"] - errors[line["seed"]] for line in lines if line["seed"] in errors]
    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):+.2f}{spread}" if found else ""


def finetuned() -> str:
    """Networks trained by others, before and after; runs that differ only in their seed on one line."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in read_finetuned():
        key = tuple(line[name] for name in ("model", "half", "epochs", "group_size", "final_slope"))
        groups.setdefault(key, []).append(line)
    rows, commands = [], []
    for (model, half, epochs, group_size, final_slope), lines in groups.items():
        images = lines[0]["images"]

        def mean(key: str, lines: list[dict[str, Any]] = lines) -> float:
            return statistics.mean(line[key] for line in lines)

        rows.append(
            [
                model,
                {"filters": "filters", "macs": "MACs"}[half],
                str(group_size),
                f"{final_slope:g}",
                str(epochs),
                f"{100 * (1 - mean('plain_correct') / images):.2f}",
                f"{mean('open_correct') - mean('plain_correct'):+g} of {images:,}",
                error_of(lines),
                f"{100 * mean('density'):.1f} %",
                f"{100 * mean('dependent'):.1f} %",
                f"{mean('gated_macs') / mean('backbone_macs'):.2f}",
                f"{(mean('gated_macs') + mean('gater_macs')) / mean('backbone_macs'):.2f}",
                f"{mean('minutes'):.0f}",
            ]
        )
        threads = lines[0]["machine"]["threads"]
        commands += [f"`{line['command']}` ({machines_of([line])}, {threads} threads)" for line in lines]
    titles = [
        "network",
        "half of its",
        "group_size",
        "final_slope",
        "epochs",
        "test error %",
        "images right with all gates open, than plain",
    ]
    titles.append("error % fine-tuned")
    titles += ["open gates", "dependent", "backbone's MACs", "with the gater", "minutes"]
    return table(titles, rows) + "\n" + "\n".join(f"- {command}" for command in commands) + "\n"


def generalisation() -> str:
    """Training and test errors and those under corruptions, means over seeds."""
    path = RESULTS / "generalisation.json"
    if not path.exists():
        return "Not measured.\n"
    recorded = json.loads(path.read_text())
    kinds = ("noise", "blur", "contrast", "jpeg")
    rows = []
    for (recipe, options), lines in by_options(recorded).items():

        def mean(kind: str, lines: list[dict[str, Any]] = lines) -> float:
            found = [e for line in lines for k, e in line["errors"].items() if k.split()[0] == kind]
            return statistics.mean(found)

        corrupted = [mean(kind) for kind in kinds]
        shares = [mean("train"), mean("test"), mean("test") - mean("train"), *corrupted, statistics.mean(corrupted)]
        size = f"{lines[0]['parameters'] / 1e6:.2f}M"
        rows.append([as_code(recipe, options), size, str(len(lines)), *(f"{share:.1f}" for share in shares)])
    text = "`python benchmarks/generalisation.py --data cifar10.npz RUN...`: errors in %, of each corruption the mean "
    text += f"of three strengths ({machines_of(recorded)}). {FULL_PRECISION}\n\n"
    titles = ["recipe", "size", "n", "train", "test", "gap", *kinds, "corrupted"]
    return text + table(titles, rows)


def averaged() -> str:
    """Plain networks alone, and two at a time."""
    path = RESULTS / "averaged.json"
    if not path.exists():
        return "Not measured.\n"
    recorded = json.loads(path.read_text())
    rows = []
    for line in recorded:
        seeds = [{**line, "seed": seed, "test_error": error} for seed, error in line["alone"].items()]
        pairs = list(line["pairs"].values())
        spread = f"{min(pairs):.2f} to {max(pairs):.2f}, {len(pairs)} pairs" if len(pairs) > 1 else "1 pair"
        both = f"{statistics.mean(pairs):.2f} ({spread})"
        rows.append([as_code(*as_named(line)), f"{line['parameters'] / 1e6:.2f}M", error_of(seeds), both])
    text = (
        f"`{recorded[0]['command']}`: the probabilities of two plain networks with other seeds are averaged. Together "
    )
    text += "they have as many parameters and MACs as a gated network whose extractor is as large as its backbone, or "
    text += f"the Wider one. Pairs share networks, so they have a range and no deviation ({machines_of(recorded)}). "
    text += f"{FULL_PRECISION}\n\n"
    return text + table(["recipe", "size of two", "error %, alone", "error %, two averaged"], rows)


def exchanged_gates() -> str:
    """Whether the image or its gates decide, means over seeds."""
    path = RESULTS / "exchanged_gates.json"
    if not path.exists():
        return "Not measured.\n"
    recorded = json.loads(path.read_text())
    kinds = ("own", "usual", "same", "image", "gates")
    rows = []
    for (recipe, options), lines in by_options(recorded).items():
        shares = [f"{100 * statistics.mean(line[kind] for line in lines):.1f}" for kind in kinds]
        rows.append([as_code(recipe, options), str(lines[0]["epochs"]), str(len(lines)), *shares])
    text = (
        f"`{recorded[0]['command']}`: % of {recorded[0]['images']:,} test images that the backbone predicts rightly "
        "under their own gates, under each gate as it is for most images, and under the gates of another image of the "
        "same class; then, under the gates of an image of another class, those predicted as the class of the image, "
        f"and as the class of the one that the gates were made for ({machines_of(recorded)}). {FULL_PRECISION}\n\n"
    )
    titles = ["recipe", "epochs", "n", "own", "usual", "same class", "other class: image's", "other class: gates'"]
    return text + table(titles, rows)


def page() -> str:
    """docs/results.md."""
    ledger = read_ledger(LEDGER)
    return (
        "# Results\n\n"
        "Written by `python benchmarks/results.py` from `docs/results/`; nothing here is typed by hand. Errors are on "
        "the test set after the last epoch, never the best one. n is the number of runs (seeds). Minutes are "
        "means over the machines that are named: do not compare them where these differ.\n\n"
        "## The paper's rows (Tables 1, 2 and 3)\n\n"
        "Measured by the recipe as it is, at full length; a run with any option changed does not count here.\n\n"
        f"{paper_rows(ledger)}\n"
        "## Past the paper\n\n"
        "Recipes of our own with an aim, at full length: runs of the recipe, or of one with options that make it the "
        "same.\n\n"
        f"{past_the_paper(ledger)}\n"
        "## The paper's networks at full length, in the paper's and in other ways\n\n"
        "MACs of an image, here and below: those of the open filters and of the gater, in the mean over the test "
        "images. A gate is dependent if it is open for some of them and closed for others. A run whose options "
        "make it another recipe is listed under that one's name. Folders that commands start from are named as "
        "`gaternet sweep` names them: `runs/short_resnet20,epochs=16/seed0` comes from `gaternet sweep short_resnet20 "
        "--epochs 16`.\n\n"
        f"{full_length(ledger)}\n"
        "## Our own recipes, and shortened ones\n\n"
        "The short recipes are 8 epochs where their command says nothing else: they compare networks with each other, "
        "and are no evidence for or against the paper's figures.\n\n"
        f"{other_runs(ledger)}\n"
        "## What the paper leaves open\n\n"
        "Short trainings, one option at a time; the gated recipes' defaults are the paper's where that is known.\n\n"
        f"### ResNet-8: what each option does\n\n{silent_points(ledger, EACH_OPTION)}\n"
        f"### ResNet-20: what closes the distance to the plain network\n\n{silent_points(ledger, GAP)}\n"
        "## Networks trained by others\n\n"
        'Y. Idelbayev\'s CIFAR-10 ResNets, gated by `gaternet.gate(..., sites="all", open=True)`, then fine-tuned for '
        "a few epochs on a CPU: to half of their filters, with the default gater, or to half of their MACs, gater "
        "included, with one that is small and guided ([method.md](method.md)). MACs are means over the test images, "
        "relative to the plain backbone.\n\n"
        f"{finetuned()}\n"
        f"## Generalisation\n\n{generalisation()}\n"
        f"## Image or gates\n\n{exchanged_gates()}\n"
        f"## Two plain networks\n\n{averaged()}\n"
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
    ledger = read_ledger(LEDGER)
    pages = {DOCS / "results.md": page()}
    pages |= {README: with_summary(README.read_text(), ledger), METHOD: with_short(METHOD.read_text(), ledger)}
    for path, text in pages.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))


if __name__ == "__main__":
    main()
