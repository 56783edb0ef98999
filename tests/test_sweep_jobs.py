"""Jobs of a sweep: what it shows of them, and what it finds out before the first begins."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gaternet.sweep
from gaternet import cli
from gaternet.checkpoint import save_model
from gaternet.cli.training import _varied
from gaternet.errors import TrainingError
from gaternet.jobs import Job, make_jobs
from gaternet.ledger import changed_options, find_line, train_flags
from gaternet.models import create_model
from gaternet.recipe import Recipe, Runtime, override
from gaternet.recipes import RECIPES, find_recipe
from gaternet.run import RunDirectory
from gaternet.sweep import _Overview, check_jobs, sweep

PLAIN, GATED = find_recipe("digits_resnet20"), find_recipe("digits_resnet20_gated")


def test_metrics_are_read_when_they_have_changed(tmp_path, monkeypatch):
    job, read, epochs = Job(PLAIN, 0, tmp_path), [], RunDirectory.epochs
    monkeypatch.setattr(RunDirectory, "epochs", lambda run: read.append(run.path) or epochs(run))
    assert job.row()[2:] == ["0/20", ""]
    line = {"kind": "epoch", "step": 5, "test_loss": 1.0, "test_accuracy": 0.5}
    for finished in (1, 2):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for _ in range(3):
            assert job.row()[2:] == [f"{finished}/20", "loss 1.0000 acc 50.00%"]
        assert len(read) == finished
    (tmp_path / "metrics.jsonl").unlink()  # a run that was removed, and is begun anew
    assert job.row()[2:] == ["0/20", ""]


def test_a_folder_name_that_is_too_long_is_shortened(tmp_path):
    paths = {name: "/" + "/".join([f"ü{name * 40}ü"] * 5) for name in "äb"}
    changes: list[dict[str, Any]] = [
        {"backbone_from": paths[a], "extractor_from": paths[b]} for a in "äb" for b in "äb"
    ]
    jobs = make_jobs([override(GATED, change) for change in changes], [0], tmp_path)
    assert len({job.path for job in jobs}) == 4
    for job in jobs:
        job.path.mkdir(parents=True)
        assert job.path.parent.name.startswith("digits_resnet20_gated,backbone_from=_")
        str(job.path).encode()  # of whole letters
    (again,) = make_jobs([override(GATED, changes[3])], [0], tmp_path)
    assert again.path == jobs[3].path


def test_a_state_that_cannot_be_looked_for_is_none(tmp_path, monkeypatch):
    """On a disk that takes no such names, or in a folder that may not be read."""
    job = make_jobs([override(GATED, {"extractor_from": "a"})], [0], tmp_path)[0]
    monkeypatch.setattr(Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert gaternet.sweep._sources(job) == ["a"]


def test_a_run_that_was_killed_says_so(tmp_path):
    job = Job(PLAIN, 0, tmp_path)
    (tmp_path / "log.txt").write_text("epoch 3/20  test loss 1.0\n")
    job._process = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    job.wait(60.0)
    assert job.state == "stopped"
    assert job.last_words() == "it was killed by signal 9, as when memory is full: the same command goes on"


def check(out: Path, *recipes: Recipe) -> None:
    check_jobs(make_jobs(recipes, [0], out), out / "ledger.jsonl")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "resnet21_gated"}, r"resnet21_gated.*/seed0 cannot be trained: unknown model 'resnet21_gated': did"),
        ({"extractor": "resnet21"}, "unknown model of timm 'resnet21'"),
        ({"backbone": "resnet20_gated"}, "unknown model 'resnet20_gated'"),
        ({"backbone": "timm:resnet181"}, "unknown model of timm 'resnet181'"),
        ({"backbone": "resnet20", "extractor": "resnet21"}, "unknown model of timm 'resnet21'"),
        ({"data": "none.npz"}, "data=none.npz/seed0 cannot be trained: no file none.npz: check --data"),
        ({"data": "digit"}, "no data 'digit': it is not one of digits, "),
        ({"teacher": "none"}, "teacher=none/seed0 cannot be trained: no run or saved model none"),
        ({"teacher": "weights.pth"}, "no run or saved model weights.pth"),
        ({"backbone_from": "none"}, "no run or saved model none"),
        ({"extractor_from": "none"}, "no run or saved model none"),
    ],
)
def test_what_cannot_be_trained_is_named_before_any_run(tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").write_bytes(b"")
    jobs = make_jobs([PLAIN, override(GATED, changes)], [0], Path("runs"))
    with pytest.raises(ValueError, match=said):
        sweep(jobs, Path("ledger.jsonl"))
    assert not Path("runs").exists()
    assert [job.state for job in jobs] == ["waiting"] * 2


def test_a_recipe_that_no_command_repeats_is_named_before_any_run(tmp_path):
    with pytest.raises(ValueError, match="mine,data=digits/seed0 cannot be trained: unknown recipe 'mine'"):
        check(tmp_path, Recipe("mine", data="digits"))
    with pytest.raises(ValueError, match="cannot be trained: --image-size cannot be taken back on the command line"):
        check(tmp_path, override(find_recipe("imagenette64_resnet18"), {"image_size": None, "data": "digits"}))


def test_a_list_without_values_cannot_be_written_as_an_option(tmp_path):
    with pytest.raises(ValueError, match="cannot be trained: --milestones cannot be taken back on the command line"):
        check(tmp_path, override(find_recipe("cifar10_resnet20"), {"milestones": (), "data": "digits"}))


def test_every_recipe_could_be_trained(tmp_path):
    for recipe in RECIPES.values():
        check(tmp_path, replace(recipe, data="digits"))


def test_what_pytorch_builds_with_real_numbers_alone_is_left_to_the_run(tmp_path, monkeypatch):
    def built(*args: Any, **options: Any) -> nn.Module:
        assert torch.zeros(1).item() == 0
        return nn.Identity()

    monkeypatch.setattr(gaternet.sweep, "create_model", built)
    check(tmp_path, GATED)


def test_runs_may_learn_from_what_is_there_and_from_what_earlier_ones_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network: Any = create_model("resnet20", 10, 1)
    save_model(network, Path("saved"), {"backbone": network.gaternet_source})
    for source in ("saved", "saved/model.safetensors"):
        check(tmp_path, override(GATED, {"backbone_from": source, "extractor_from": source}))
    check(tmp_path, override(GATED, {"teacher": "saved"}))
    made = str(make_jobs([PLAIN], [0], Path("runs"))[0].path)
    follower = override(GATED, {"teacher": made, "backbone_from": f"{made}/last/model.safetensors"})
    jobs = make_jobs([PLAIN, follower], [0], tmp_path / "runs")
    check_jobs(jobs, Path("ledger.jsonl"))
    with pytest.raises(ValueError, match="no run or saved model"):
        check_jobs(jobs[::-1], Path("ledger.jsonl"))


def test_a_run_waits_for_what_it_learns_from_and_others_do_not(tmp_path, monkeypatch):
    events, watched = [], {}

    def start(job: Job, *rest: object) -> None:
        events.append(("begins", job))
        job.state = "running"

    def watch(job: Job) -> None:
        watched[job] = watched.get(job, 0) + 1
        if watched[job] == 3:
            events.append(("ends", job))
            job.state = "finished"

    monkeypatch.setattr(Job, "start", start)
    monkeypatch.setattr(Job, "watch", watch)
    recipes = [PLAIN]
    for learns_from in ("extractor_from", "teacher"):  # of the one before
        recipes.append(override(GATED, {learns_from: str(make_jobs(recipes, [0], tmp_path)[-1].path)}))
    first, follower, last, other = jobs = make_jobs([*recipes, GATED], [0], tmp_path)
    sweep(jobs, tmp_path / "ledger.jsonl", at_once=2)
    assert [job for what, job in events if what == "begins"] == [first, other, follower, last]
    for earlier, later in ((first, follower), (follower, last)):
        assert events.index(("ends", earlier)) < events.index(("begins", later))


def test_a_run_that_goes_on_needs_no_weights_to_start_from(tmp_path):
    recipe = override(GATED, {"backbone_from": "none", "extractor_from": "none"})
    (job,) = make_jobs([recipe], [0], tmp_path)
    job.path.mkdir(parents=True)
    (job.path / "training.pt").write_bytes(b"")
    check_jobs([job], tmp_path / "ledger.jsonl")
    (job.path / "training.pt").unlink()
    with pytest.raises(ValueError, match="no run or saved model none"):
        check_jobs([job], tmp_path / "ledger.jsonl")


def test_a_plain_network_takes_no_notice_of_where_a_gater_starts(tmp_path):
    check(tmp_path, override(PLAIN, {"extractor_from": "none"}))


def in_ledger(ledger: Path, recipe: Recipe) -> dict[str, Any]:
    line = {"recipe": recipe.name, "options": changed_options(recipe), "seed": 0, "started": "then", "command": "it"}
    with ledger.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def test_what_is_in_the_ledger_is_not_checked(tmp_path):
    recipe = override(PLAIN, {"data": "none.npz"})
    in_ledger(tmp_path / "ledger.jsonl", recipe)
    check(tmp_path, recipe)


def test_what_is_in_the_ledger_is_not_trained_again_wherever_it_lay(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    lines = [in_ledger(ledger, recipe) for recipe in (GATED, PLAIN)]
    assert sweep(make_jobs([PLAIN, GATED], [0], tmp_path / "runs"), ledger) == lines[::-1]
    assert not (tmp_path / "runs").exists()


def test_what_others_learn_from_is_trained_again_where_it_is_gone(tmp_path, monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda words, **options: started.append(words))
    ledger = tmp_path / "ledger.jsonl"
    follower = override(GATED, {"teacher": str(make_jobs([PLAIN], [0], tmp_path)[0].path)})
    jobs = make_jobs([PLAIN, follower], [0], tmp_path)
    in_ledger(ledger, PLAIN)
    check_jobs(jobs, ledger)
    assert [job.finished(ledger) for job in jobs] == [False, False]
    for job in jobs:
        job.start(Runtime(cpu=True), ledger, {})
    assert ["--ledger" in words for words in started] == [False, True]  # where the first has a line already
    lines = [{"kind": "epoch", "step": epoch} for epoch in range(PLAIN.epochs)]
    (jobs[0].path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [job.finished(ledger) for job in jobs] == [True, False]
    (jobs[0].path / "metrics.jsonl").unlink()
    in_ledger(ledger, follower)
    check_jobs(jobs, ledger)
    assert [job.finished(ledger) for job in jobs] == [True, True]


def test_values_to_vary_may_be_given_in_several_options(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr("gaternet.sweep.sweep", lambda jobs, *rest: planned.extend(jobs) or [])
    options = ["--vary", "noise-std=0,0.5", "--vary", "lr=0.2", "--vary", "noise-std=2", "--seeds", "1"]
    CliRunner().invoke(cli.app, ["sweep", GATED.name, "--out", str(tmp_path), *options], catch_exceptions=False)
    changes = [changed_options(job.recipe) for job in planned]
    assert changes == [{}, {"noise_std": 0.0}, {"noise_std": 0.5}, {"noise_std": 2.0}, {"lr": 0.2}]


def test_an_option_may_act_beside_what_is_varied(tmp_path, monkeypatch):
    planned, trained = [], []
    monkeypatch.setattr("gaternet.sweep.sweep", lambda jobs, *rest: planned.extend(jobs) or [])
    monkeypatch.setattr("gaternet.train.train", lambda recipe, *rest: trained.append(recipe) or {})
    options = ["--penalty", "macs", "--vary", "target-density=0.5", "--seeds", "1", "--out", str(tmp_path)]
    CliRunner().invoke(cli.app, ["sweep", "short_resnet8_gated", *options], catch_exceptions=False)
    changes = [changed_options(job.recipe) for job in planned]
    assert changes == [{}, {"target_density": 0.5, "penalty": "macs"}]
    for job, found in zip(planned, changes, strict=True):  # the process that trains it takes them
        words = ["train", job.recipe.name, *train_flags(found), "--out", str(tmp_path / "run")]
        assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert [changed_options(recipe) for recipe in trained] == changes


@pytest.mark.parametrize(
    ("name", "changes", "idle"),
    [
        ("short_resnet8_gated", {"density_weight": 5.0}, {"density_weight"}),
        ("digits_resnet20_gated", {"density_weight": 5.0, "target_density": 0.5}, set()),
        ("digits_resnet20_gated", {"teacher_weight": 0.1, "temperature": 2.0}, {"teacher_weight", "temperature"}),
        ("cifar10_resnet20", {"schedule": "cosine", "gamma": 0.2}, {"gamma"}),
        ("cifar10_resnet20", {"noise_std": 0.5}, {"noise_std"}),
        ("finetune", {"sparsity": 0.0, "penalty": "macs", "density_weight": 5.0}, {"penalty", "density_weight"}),
        ("finetune", {"freeze": "gater", "gater_lr": 0.1, "target_density": 0.3}, {"gater_lr", "target_density"}),
        ("finetune", {"freeze": "backbone", "gater_lr": 0.1, "target_density": 0.3}, set()),
    ],
)
def test_options_that_change_nothing_are_no_changes(name, changes, idle):
    assert changed_options(override(find_recipe(name), changes)).keys() == changes.keys() - idle


def test_a_line_of_an_older_version_is_found(tmp_path):
    """Which took options for changes that change nothing."""
    recipe = override(PLAIN, {"temperature": 2.0})
    config = {"recipe": asdict(recipe), "seed": 0, "started": "then"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = {"recipe": PLAIN.name, "options": {"temperature": 2.0}, "seed": 0, "started": "then"}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    assert find_line(tmp_path / "ledger.jsonl", tmp_path) == line
    job = Job(PLAIN, 0, tmp_path)
    job.start(Runtime(cpu=True), tmp_path / "ledger.jsonl", {})
    assert job.state == "finished"


def test_a_table_shows_what_a_run_printed_as_it_is(tmp_path, monkeypatch, capsys):
    """Brackets are no colours, and nothing that closes some."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    job = Job(PLAIN, 0, tmp_path / "seed0")
    job.state, job._refusal = "failed", "cannot read [/data/x]: [enforce fail at alloc_cpu.cpp:1]"
    with _Overview([job]):
        pass
    assert job._refusal in capsys.readouterr().out


def test_runs_side_by_side_share_the_cores(tmp_path, monkeypatch):
    found = []

    def start(job: Job, runtime: Any, ledger: Any, environment: dict[str, str]) -> None:
        found.append(environment["OMP_NUM_THREADS"])
        job.state = "finished"

    monkeypatch.setattr(Job, "start", start)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    jobs = make_jobs([find_recipe("digits_resnet20")], [0, 1], tmp_path)
    sweep(jobs, tmp_path / "ledger.jsonl", Runtime(cpu=True), at_once=2)
    assert found == ["4", "4"]


def test_values_to_vary_have_the_type_of_their_option():
    assert _varied("anneal-noise=True,false") == ("anneal_noise", [True, False])
    assert _varied("--epochs=1,20") == ("epochs", [1, 20])
    assert _varied("noise-std=0,1e-1") == ("noise_std", [0.0, 0.1])
    assert _varied("teacher=runs/short,epochs=16/seed0") == ("teacher", ["runs/short,epochs=16/seed0"])
    assert _varied("extractor=resnet8,auto") == ("extractor", ["resnet8", "auto"])
    assert _varied("gater-lr=1") == ("gater_lr", [1.0])


def test_what_a_run_said_at_its_end_is_kept_whatever_becomes_of_its_folder(tmp_path):
    """Another sweep's run prints there, too, or somebody removes it."""
    job = Job(PLAIN, 0, tmp_path / "seed0")
    job.start(Runtime(cpu=True, precision="fp16"), tmp_path / "ledger.jsonl", {})
    job.wait(60.0)
    said = job.last_words()
    assert job.state == "failed"
    assert "fp16" in said
    with (job.path / "log.txt").open("a") as log:
        log.write("epoch 3/20  train loss 0.1\n")
    assert job.row()[3] == said
    shutil.rmtree(job.path)
    assert job.row()[3] == said


def test_a_run_whose_folder_vanished_leaves_the_others_alone(tmp_path, monkeypatch):
    jobs = make_jobs([PLAIN], [0, 1], tmp_path)
    monkeypatch.setattr(subprocess, "Popen", _Vanishing)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed, .*seed0 with: what it printed cannot be read"):
        sweep(jobs, tmp_path / "ledger.jsonl", Runtime(cpu=True), 2)
    assert [job.state for job in jobs] == ["failed", "finished"]


class _Vanishing:
    """A process that ends at once; that of seed 0 fails, and takes its folder with it."""

    def __init__(self, command: list[str], **_options: Any) -> None:
        self.path = Path(command[command.index("--out") + 1])

    def poll(self) -> int:
        if self.path.name != "seed0":
            return 0
        shutil.rmtree(self.path)
        return 1
