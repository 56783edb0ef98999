"""The pages in docs/ say what was recorded, and no more: each is what its script writes from docs/results/."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import averaged
import export_families
import open_points
import pytest
import results
import summary
import tables
import torch
from measured_runs import measure_runs
from open_points import DATA, EACH_OPTION, GAP, STUDIES
from tables import trains_like
from torch import nn

from gaternet.data import ImageSet
from gaternet.files import write_json
from gaternet.jobs import Job
from gaternet.ledger import changed_options, read_ledger, train_flags
from gaternet.recipe import override
from gaternet.recipes import find_recipe
from gaternet.sweep import check_jobs
from gaternet.trained import Trained


def test_pages_are_those_of_the_recorded_figures():
    assert (results.DOCS / "results.md").read_text() == results.page()
    assert export_families.PAGE.read_text() == export_families.page()
    readme = summary.README.read_text()
    assert readme == summary.with_summary(readme, read_ledger(results.LEDGER))
    method = summary.METHOD.read_text()
    assert method == summary.with_short(method, read_ledger(results.LEDGER))


def test_a_row_without_a_run_is_not_measured():
    rows = results.paper_rows([]).splitlines()[2:]
    assert len(rows) == 48
    assert all(row.endswith("| not measured |  |") for row in rows)
    assert all(results.silent_points([], study) == "Not measured.\n" for study in STUDIES.values())
    aims = results.past_the_paper([]).splitlines()[2:]
    assert len(aims) == len(results.AIMS)
    assert all(row.endswith("| not measured |  |") for row in aims)


def _line(recipe: str, seed: int, error: float, **options: object) -> dict[str, object]:
    gates = {"density": 0.5, "dependent": 0.25}
    return {
        "recipe": recipe,
        "options": options,
        "seed": seed,
        "as_published": not options and recipe.startswith("cifar"),
        "parameters": 78_042,
        "backbone_macs": 3e6,
        "gater_macs": 1e6,
        "gated_macs": 2e6,
        "test_error": error,
        "train_loss": 0.5,
        "gates": gates,
        "seconds": 60.0,
        "precision": "no",
        "commit": "abc",
        "command": f"gaternet train {recipe} --seed {seed}",
        "machine": {"gpus": [], "processor": "P", "cores": 2},
    }


def test_seeds_share_a_row_and_options_have_their_own():
    ledger = [_line("cifar10_resnet20_gated", seed, error) for seed, error in enumerate((7.0, 8.0))]
    ledger += [_line("cifar10_resnet20_gated", 0, 30.0, epochs=2), _line(EACH_OPTION.names[-1], 0, 20.0)]
    (row,) = [row for row in results.paper_rows(ledger).splitlines() if "`cifar10_resnet20_gated`" in row]
    assert "| 7.50 ± 0.71 (n = 2) | +0.62 |" in row  # 6.88 in the paper
    (other,) = results.other_runs(ledger).splitlines()[2:]
    (published,) = results.full_length(ledger).splitlines()[2:]
    cells = "0.08M | 3.0M | 7.50 ± 0.71 (n = 2) | 0.500 | 50.0 % | 25.0 % | 1 | P, 2 cores"
    assert published == f"| `gaternet train cifar10_resnet20_gated` | {cells} |"
    cells = cells.replace("7.50 ± 0.71 (n = 2)", "30.00 (n = 1)")
    assert other == f"| `gaternet train cifar10_resnet20_gated --epochs 2` | {cells} |"
    ledger += [_line("cifar10_resnet20_half", 0, 7.5), _line("cifar10_resnet20_half", 0, 30.0, epochs=2)]
    assert "| 7.50 (n = 1) | 1.00 |" in results.past_the_paper(ledger)  # 2M + 1M of 3M MACs


def test_a_recipe_past_the_paper_counts_runs_that_are_the_same_by_their_options():
    same = changed_options(dataclasses.replace(find_recipe("cifar10_resnet20_guided"), name="cifar10_resnet20_gated"))
    assert same
    ledger = [_line("cifar10_resnet20_gated", 0, 7.0, **same), _line("cifar10_resnet20_guided", 1, 8.0)]
    others = [{**same, "open_probability": 0.25}, {**same, "epochs": 2}, {}]
    ledger += [_line("cifar10_resnet20_gated", 0, 30.0, **options) for options in others]
    aims = [row for row in results.past_the_paper(ledger).splitlines()[2:] if row.startswith("|")]
    (measured,) = [row for row in aims if not row.endswith("| not measured |  |")]
    assert measured.startswith("| `cifar10_resnet20_guided` |")
    assert r"| 7.50 ± 0.71 (n = 2); without seed 0 8.00 (n = 1) \* |" in measured  # which the choice saw


def test_runs_that_are_a_recipe_by_their_options_share_its_row():
    same = changed_options(dataclasses.replace(find_recipe("cifar10_resnet20_guided"), name="cifar10_resnet20_gated"))
    ledger = [_line("cifar10_resnet20_gated", 0, 7.0, **same), _line("cifar10_resnet20_guided", 1, 8.0)]
    (row,) = results.full_length(ledger).splitlines()[2:]
    assert row.startswith("| `gaternet train cifar10_resnet20_guided` | ")
    assert " | 7.50 ± 0.71 (n = 2) | " in row
    back = {"open_probability": 0.0, "auxiliary_weight": 0.0, "initial_bias": 0.0, "anneal_noise": False}
    (row,) = results.full_length([_line("cifar10_resnet20_guided", 0, 7.0, **back)]).splitlines()[2:]
    assert row.startswith("| `gaternet train cifar10_resnet20_gated` | ")


def test_full_length_are_the_networks_images_and_epochs_of_a_row():
    assert results.is_full_length(_line("cifar10_resnet20", 0, 7.0, milestones=[0.5, 0.75], lr=0.2))
    assert results.is_full_length(_line("short_resnet20", 0, 7.0, epochs=160))
    others = {"epochs": 2}, {"image_size": 16}, {"data": "photos"}, {"model": "resnet8"}
    assert not any(results.is_full_length(_line("cifar10_resnet20", 0, 7.0, **options)) for options in others)
    assert trains_like(_line("cifar10_resnet20", 0, 7.0, milestones=[0.5, 0.75]), find_recipe("cifar10_resnet20"))


@pytest.mark.parametrize(("recipe", "options"), [("of_long_ago", {}), ("cifar10_resnet20", {"forgotten": 1})])
def test_runs_of_what_there_is_no_more_are_listed_by_their_names(recipe, options):
    ledger = [{**_line(recipe, 0, 7.0, **options), "as_published": False}]
    (row,) = results.other_runs(ledger).splitlines()[2:]
    assert row.startswith("| `" + " ".join(["gaternet train", recipe, *train_flags(options)]) + "` | ")
    assert results.past_the_paper(ledger) == results.past_the_paper([])


def test_short_trainings_stand_beside_each_other_with_all_of_their_options():
    assert all("| not measured |" in row for row in summary.in_sixteen_epochs([]).splitlines()[4:])
    lines = [_line("short_resnet20_half", 0, 13.0, epochs=16, sparsity_start=6.0, sparsity_ramp=6.0)]
    lines += [_line("short_resnet20_half", 1, 15.0, epochs=16, sparsity_start=6.0, sparsity_ramp=6.0)]
    lines += [_line("short_resnet20_half", 0, 30.0, epochs=16), _line("short_resnet20_half", 0, 40.0)]
    measured = [row for row in summary.in_sixteen_epochs(lines).splitlines()[4:] if "not measured" not in row]
    assert measured == [
        "| gated to half of the MACs | 3.0M | 14.00 ± 1.41 (n = 2) | 0.500 | 50.0 % | 25.0 % | "
        "`gaternet train short_resnet20_half --sparsity-start 6.0 --sparsity-ramp 6.0` |"
    ]


def test_the_summary_has_the_figures_of_its_recipes_and_leaves_the_rest_of_the_text():
    lines = [_line("cifar10_resnet20_gated", seed, error) for seed, error in enumerate((7.0, 8.0))]
    rows = summary.accuracy(lines).splitlines()
    assert rows[0] == "ResNet-20 on CIFAR-10, 160 epochs (P, 2 cores):"
    assert [row.split(" | ")[-1] for row in rows[4:]] == 2 * ["not measured |"] + [
        "7.50 ± 0.71 (n = 2) |",
        "not measured |",
    ]
    assert " | 0.08M | 3.0M | 6.88 | " in rows[6]
    text = summary.with_summary("a\n<!-- benchmarks/results.py writes this -->\nold\n<!-- to here -->\nb\n", lines)
    assert text.startswith("a\n<!-- benchmarks")
    assert text.endswith("<!-- to here -->\nb\n")
    assert "\nold\n" not in text
    assert rows[6] in text
    assert summary.with_summary(text, lines) == text


class Sure(nn.Module):
    """Says these probabilities of three classes, of the images 0, 1 and 2."""

    def __init__(self, *chances: tuple[float, float, float]) -> None:
        super().__init__()
        self.chances = nn.Parameter(torch.tensor(chances))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.chances[images[:, 0, 0, 0].long()].log() + 3  # logits, but no logarithms of probabilities


def test_pairs_of_networks_are_averaged_by_their_probabilities(monkeypatch):
    surely, unsure, rather = (0.9, 0.05, 0.05), (0.001, 0.5, 0.499), (0.2, 0.5, 0.3)  # the first wins an average
    networks = {5: Sure(surely, surely, rather), 7: Sure(unsure, rather, rather), 9: Sure(surely, unsure, surely)}
    metadata = {"preprocessing": {"height": 1, "width": 1, "mean": [0.0], "std": [1 / 255]}}
    images = ImageSet(torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1), [0, 1, 1])
    monkeypatch.setattr(Trained, "open", lambda run, data: Trained(run, networks[int(run.name)].eval(), metadata, data))
    monkeypatch.setattr(Trained, "load_sets", lambda _: (images, images))
    found = averaged.measure({seed: Path(str(seed)) for seed in (9, 5, 7)}, "digits")
    assert found["alone"] == pytest.approx({"5": 100 / 3, "7": 100 / 3, "9": 100 / 3})
    assert found["pairs"] == pytest.approx({"5, 7": 100 / 3, "5, 9": 200 / 3, "7, 9": 100 / 3})
    assert (found["images"], found["parameters"]) == (3, 18)


def test_published_rows_say_where_they_were_trained():
    line = _line("cifar10_resnet20_gated", 1, 7.0)
    there = "\n- `gaternet train cifar10_resnet20_gated --seed 1`: P, 2 cores, full precision (commit abc)"
    rest = ", 1 minutes; training loss 0.500; 50.0 % of the gates open, 25.0 % dependent\n"
    assert there + rest in results.paper_rows([line])
    other = {"epoch": 3, "precision": "bf16", "commit": "abd", "machine": {"gpus": ["G"], "processor": "Q", "cores": 4}}
    resumed = {**line, "resumed": [other]}
    assert f"{there}, from epoch 3 on G, bf16 precision (commit abd){rest}" in results.paper_rows([resumed])
    assert results.full_length([resumed]).endswith(" | G, bf16; P, 2 cores |\n")


def test_a_study_lists_all_that_it_asks_and_nothing_of_the_other():
    gated = EACH_OPTION.names[-1]
    ledger = [_line(gated, seed, error) for seed, error in enumerate((20.0, 22.0, 30.0))]
    ledger += [_line(gated, seed, error, bottleneck=4) for seed, error in enumerate((21.0, 22.0))]
    ledger += [_line(gated, 0, 22.0, bottleneck=4, noise_std=0.5)]
    short = GAP.names[-1]
    ledger += [_line(short, 0, 23.0), _line(short, 0, 24.0, image_size=16, noise_std=0.0)]
    found = results.silent_points(ledger, EACH_OPTION)
    assert f"|  | `{gated}` | 0.08M | 3.0M | 24.00 ± 5.29 (n = 3) |  | 0.500 |" in found
    difference = "+0.50 ± 0.71"  # of each seed, by itself
    assert f"| width b | `{gated} --bottleneck 4` | 0.08M | 3.0M | 21.50 ± 0.71 (n = 2) | {difference} |" in found
    assert f"|  | `{gated} --bottleneck 32` |  |  | not measured |  |" in found
    assert f"| others | `{gated} --bottleneck 4 --noise-std 0.5` | 0.08M | 3.0M | 22.00 (n = 1) | +2.00 |" in found
    found = results.silent_points(ledger, GAP)
    assert f"| noise | `{short} --image-size 16 --noise-std 0.0` | 0.08M | 3.0M | 24.00 (n = 1) |  | 0.500 |" in found
    assert f"`{short}`" not in found  # at full size it is no part of the study
    assert f"`gaternet train {short}`" in results.other_runs(ledger)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_each_open_point_is_a_recipe_of_its_own(study):
    variants = study.variants_of(DATA, Path("runs"))
    flags = [train_flags(changed_options(recipe)) for recipes in variants.values() for recipe in recipes]
    assert len({tuple(words) for words in flags}) == len(flags)
    assert all(flags)


def test_what_is_measured_of_a_run_takes_the_place_of_what_was(tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for run, epochs, seed in zip(runs, (8, 8, 16), (0, 1, 0), strict=True):
        run.mkdir()
        recipe = override(find_recipe("short_resnet20_gated"), {"epochs": epochs})
        write_json(run / "config.json", {"recipe": dataclasses.asdict(recipe), "seed": seed})

    def measure(run: Path) -> dict[str, Any]:
        return {"value": values[run.name]}

    values = {"a": 1, "b": 2, "c": 3}
    measure_runs(runs, tmp_path / "found.json", "python x.py", measure)
    values["b"] = 4
    measure_runs(runs[1:2], tmp_path / "found.json", "python x.py", measure)
    lines = results.by_options(json.loads((tmp_path / "found.json").read_text()))
    found = {name: [(line["seed"], line["value"]) for line in group] for name, group in lines.items()}
    assert found == {("short_resnet20_gated", ""): [(0, 1), (1, 4)], ("short_resnet20_gated", "--epochs 16"): [(0, 3)]}


def test_no_seed_counts_twice():
    lines: list[dict[str, Any]] = [
        {"seed": seed, "test_error": 8.0 + seed, "command": "ab"[seed // 2]} for seed in (0, 2)
    ]
    assert tables.error_of(lines) == "9.00 ± 1.41 (n = 2)"
    with pytest.raises(ValueError, match="b was measured twice: keep one of the lines"):
        tables.error_of([*lines, lines[1]])


def test_runs_that_are_older_than_their_recipe_are_marked():
    line: dict[str, Any] = {"seed": 0, "test_error": 8.0, "command": "a", "recipe": "mine", "options": {}}
    assert tables.marked_error([line], "mine") == "8.00 (n = 1)"
    for older in ({"recipe": "other"}, {"options": {"epochs": 3}}):
        assert tables.marked_error([line | older], "mine") == r"8.00 (n = 1) \*"


def test_what_the_ledger_has_is_not_trained_again(tmp_path, monkeypatch):
    """All of both studies with seed 0 is there: a fresh checkout has nothing to do."""
    asked: list[list[Job]] = []
    ledger = tmp_path / "ledger.jsonl"
    lines = [line for line in read_ledger(open_points.LEDGER) if line["seed"] == 0]
    ledger.write_text("\n".join(json.dumps(line) for line in lines))

    def find(jobs: list[Job], *rest: object) -> None:
        check_jobs(jobs, ledger)
        asked.append([job for job in jobs if not job.finished(ledger)])

    monkeypatch.setattr(open_points, "sweep", find)
    monkeypatch.chdir(tmp_path)
    for seeds in (1, 2):
        monkeypatch.setattr("sys.argv", ["open_points.py", "--seeds", str(seeds), "--network", "resnet8"])
        open_points.main()
    assert asked[0] == []
    start, *missing = asked[1]
    assert {job.seed for job in missing} == {1}
    assert (start.recipe.name, start.seed) == ("short_resnet8", 0)  # from which these start


@pytest.mark.parametrize("change", [{"epochs": 16}, {"data": "fashion_mnist"}, {"image_size": 24}])
def test_a_study_is_of_runs_that_can_be_compared(change):
    line = {"recipe": "short_resnet8_gated", "options": {"noise_std": 0.5}}
    assert results.study_of(line) is EACH_OPTION
    assert results.study_of({**line, "options": {"noise_std": 0.5, **change}}) is None


def test_exchanged_gates_are_averaged_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    assert results.exchanged_gates() == "Not measured.\n"
    shares = {"own": 0.5, "usual": 0.25, "same": 0.5, "image": 0.125, "gates": 0.75}
    line = {"recipe": "short_resnet20_gated", "options": {}, "command": "x", "images": 10, "epochs": 8, **shares}
    line["machine"] = {"gpus": [], "processor": "P", "cores": 2}
    (tmp_path / "results").mkdir()
    found = [{**line, "seed": 0}, {**line, "seed": 1, "gates": 0.25}]
    (tmp_path / "results" / "exchanged_gates.json").write_text(json.dumps(found))
    text = results.exchanged_gates().splitlines()
    assert text[-1] == "| `short_resnet20_gated` | 8 | 2 | 50.0 | 25.0 | 50.0 | 12.5 | 50.0 |"
