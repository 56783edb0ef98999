"""Sweeps and their ledger: each run in a process of its own, on the embedded digits."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gaternet.evaluate import evaluate_saved
from gaternet.jobs import Job, make_jobs
from gaternet.ledger import add_run, changed_options, describe_run, find_line, read_ledger, train_flags
from gaternet.provenance import describe_machine
from gaternet.recipe import Recipe, Runtime, override
from gaternet.recipes import RECIPES, find_recipe
from gaternet.run import RunDirectory
from gaternet.sweep import sweep
from gaternet.train import Stopped, TrainingError, train

CPU = Runtime(cpu=True, precision="no")
SHORT = {"epochs": 1, "batch_size": 512}
PLAIN, GATED = find_recipe("digits_resnet20"), find_recipe("digits_resnet20_gated")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("sweep")
    jobs = make_jobs([override(PLAIN, SHORT), override(GATED, SHORT)], [0], out, {"noise_std": [0.5]})
    return out, sweep(jobs, out / "ledger.jsonl", CPU, at_once=2)


def test_options_are_those_that_differ_from_the_recipe():
    assert changed_options(GATED) == {}
    changes = {"epochs": 3, "lr": 0.5, "noise_std": 0.5, "crop": False, "schedule": "step", "milestones": (0.5,)}
    assert changed_options(override(GATED, changes)) == changes | {"milestones": [0.5]}
    assert changed_options(asdict(override(GATED, changes))) == changed_options(override(GATED, changes))
    assert changed_options(override(PLAIN, changes)).keys() == changes.keys() - {"noise_std"}  # it has no gates
    assert changed_options(override(PLAIN, {"backbone_from": "a"})) == {"backbone_from": "a"}
    cifar = RECIPES["cifar10_resnet20"]
    assert changed_options(override(cifar, {"data": "somewhere/cifar10.npz"})) == {}
    for other in ("cifar100", "somewhere/cifar10.1"):
        assert changed_options(override(cifar, {"data": other})) == {"data": other}
        assert override(cifar, {"data": other}).paper is None
    same = {"data": "somewhere/cifar10.npz", "epochs": cifar.epochs, "lr": cifar.optimizer.lr, "model": cifar.model}
    assert override(cifar, same).paper == cifar.paper
    assert override(cifar, same | {"lr": 0.2}).paper is None
    assert changed_options(Recipe("mine", epochs=2)) == {"epochs": 2}
    finetune = find_recipe("finetune")  # has a target density, which lambda takes the place of
    assert changed_options(override(finetune, {"sparsity": 0.1})) == {"sparsity": 0.1}
    assert override(finetune, {"sparsity": 0.1}).gating.target_density is None
    assert override(finetune, {"sparsity": 0.0}) == override(finetune, {"target_density": None}) != finetune
    assert changed_options(override(finetune, {"sparsity": 0.0})) == {"sparsity": 0.0}
    for target in (0.0, 0.3):
        assert changed_options(override(finetune, {"target_density": target})) == {"target_density": target}
    assert changed_options(override(override(GATED, {"sparsity": 0.1}), {"target_density": 0.5})) == {
        "target_density": 0.5
    }
    other = {"backbone": "resnet8", "sites": "all"}  # "model" is None now, which no flag can say and none needs to
    assert changed_options(override(GATED, other)) == other


def test_flags_are_what_the_command_line_reads():
    flags = train_flags({"epochs": 3, "crop": False, "nesterov": True, "milestones": [0.5, 0.9], "schedule": "step"})
    expected = "--epochs 3 --no-crop --nesterov --milestones 0.5 --milestones 0.9 --schedule step"
    assert " ".join(flags) == expected
    with pytest.raises(ValueError, match="--target-density cannot be taken back"):
        train_flags({"target_density": None})


def test_one_option_varies_at_a_time_and_seeds_come_one_after_another(tmp_path):
    jobs = make_jobs([PLAIN, GATED], [0, 1], tmp_path, {"noise_std": [1.0, 0.5], "lr": [0.2]})
    names = ["digits_resnet20", "digits_resnet20,lr=0.2", "digits_resnet20_gated"]
    names += ["digits_resnet20_gated,noise_std=0.5", "digits_resnet20_gated,lr=0.2"]
    assert [job.name for job in jobs] == [f"{name}/seed{seed}" for seed in (0, 1) for name in names]
    assert jobs[3].recipe == override(GATED, {"noise_std": 0.5})
    assert jobs[0].path == tmp_path / "digits_resnet20" / "seed0"


def test_values_that_would_share_a_directory_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher a/b and a_b would both be trained in .*,teacher=a_b: rename one"):
        make_jobs([PLAIN], [0], tmp_path, {"teacher": ["a/b", "a_b"]})
    same = {"lr": [PLAIN.optimizer.lr], "data": ["digits"], "noise_std": [0.5]}  # of which the last acts on gates
    assert len(make_jobs([PLAIN, PLAIN], [0], tmp_path, same)) == 1


def test_ledger_says_what_was_measured(swept):
    out, lines = swept
    assert [(line["recipe"], line["options"].get("noise_std")) for line in lines] == [
        ("digits_resnet20", None),
        ("digits_resnet20_gated", None),
        ("digits_resnet20_gated", 0.5),
    ]
    assert sorted(map(json.dumps, read_ledger(out / "ledger.jsonl"))) == sorted(map(json.dumps, lines))
    path = out / "digits_resnet20_gated,epochs=1,batch_size=512,noise_std=0.5" / "seed0"
    line, epoch, measured = lines[2], RunDirectory(path).epochs()[-1], evaluate_saved(path, runtime=CPU)
    assert line["test_error"] == 100 * (1 - epoch["test_accuracy"])
    assert line["command"] == (
        "gaternet train digits_resnet20_gated --epochs 1 --batch-size 512 --noise-std 0.5 --seed 0"
    )
    assert line["gates"]["density"] == pytest.approx(epoch["test_density"], abs=1e-6)
    for name in ("parameters", "backbone_macs", "gater_macs", "gated_macs"):
        assert line[name] == measured[name]
    assert 0 < line["seconds"] < 600
    assert line["commit"] == describe_machine()["commit"]  # none outside of a git checkout
    assert line["machine"]["cores"] >= 1
    assert lines[0]["gates"] is lines[0]["gated_macs"] is None
    assert "noise_std" not in lines[0]["options"]


def test_what_is_in_the_ledger_is_not_run_again(swept):
    out, lines = swept
    jobs = make_jobs([override(PLAIN, SHORT), override(GATED, SHORT)], [0], out, {"noise_std": [0.5]})
    before = (out / "ledger.jsonl").read_text()
    start = time.monotonic()
    assert sweep(jobs, out / "ledger.jsonl", CPU) == lines
    assert time.monotonic() - start < 2  # no process was started
    assert (out / "ledger.jsonl").read_text() == before
    add_run(out / "ledger.jsonl", jobs[0].path)
    assert (out / "ledger.jsonl").read_text() == before


def test_unfinished_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        describe_run(tmp_path)
    assert find_line(tmp_path / "none.jsonl", tmp_path) is None
    RunDirectory(tmp_path).start({"recipe": asdict(PLAIN), "seed": 0})
    with pytest.raises(ValueError, match="has finished 0 of 20 epochs: continue it with --resume"):
        describe_run(tmp_path)


def test_a_failing_run_is_reported_and_does_not_keep_the_others_from_finishing(tmp_path, capsys):
    good, bad = override(PLAIN, SHORT), override(PLAIN, {**SHORT, "batch_size": 2000})
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed, digits_resnet20,.* with: error: batch_size 2000 is"):
        sweep(make_jobs([bad, good], [0], tmp_path), tmp_path / "ledger.jsonl", CPU)
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 1
    assert re.search(r"/seed0  failed  0/1  error: batch_size 2000 is more", capsys.readouterr().out)


def test_a_run_that_cannot_begin_does_not_keep_the_others_from_finishing(tmp_path, monkeypatch):
    jobs = make_jobs([override(PLAIN, {"epochs": 1, "model": "resnet8"})], range(3), tmp_path)
    jobs[0].path.mkdir(parents=True)
    (jobs[0].path / "config.json").write_text('{"recipe"')
    jobs[1].path.write_text("no folder")
    (tmp_path / "random.py").write_text("raise ImportError('that is not Python's own')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match=r"2 of 3 runs failed, .*seed0 with: .*config.json"):
        sweep(jobs, tmp_path / "ledger.jsonl", CPU)
    assert [job.state for job in jobs] == ["failed", "failed", "finished"]


def test_a_ledger_that_cannot_be_written_is_named_before_any_run(tmp_path):
    (tmp_path / "plain").write_text("")
    for ledger, message in ((tmp_path, "is a folder: name a file"), (tmp_path / "plain" / "ledger.jsonl", "plain")):
        jobs = make_jobs([PLAIN], [0], tmp_path / "out")
        with pytest.raises((ValueError, OSError), match=message):
            sweep(jobs, ledger, CPU)
        assert jobs[0].state == "waiting"


def test_a_line_is_not_glued_to_one_that_was_written_by_hand(swept, tmp_path):
    out, lines = swept
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(json.dumps(lines[0]))
    other = next(path for path in out.glob("*/seed0") if find_line(ledger, path) is None)
    add_run(ledger, other, CPU)
    assert len(read_ledger(ledger)) == 2


def test_runs_share_the_gpus_that_were_given(tmp_path, monkeypatch):
    found = []

    def start(job, runtime, ledger, environment):
        found.append(environment.get("CUDA_VISIBLE_DEVICES"))
        job.state = "finished"

    monkeypatch.setattr(Job, "start", start)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-1f")
    sweep(make_jobs([PLAIN], [0, 1], tmp_path), tmp_path / "ledger.jsonl", at_once=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    sweep(make_jobs([PLAIN], [0, 1], tmp_path), tmp_path / "ledger.jsonl", at_once=2)
    assert found == ["2", "GPU-1f", "0", "1"]


@pytest.mark.parametrize(
    ("gpus", "at_once", "code", "works", "serves"),
    [
        (1, 2, 0, True, True),
        (1, 1, 0, True, False),
        (2, 2, 0, True, False),
        (1, 2, 1, True, False),
        (1, 2, 0, False, False),
    ],
)
def test_runs_on_one_gpu_run_side_by_side(tmp_path, monkeypatch, gpus, at_once, code, works, serves):
    """NVIDIA's service is started for them, and ended; where it does not work, they go on without."""
    found, control = [], tmp_path / "nvidia-cuda-mps-control"
    control.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES: ${{1:-$(cat)}} $CUDA_MPS_PIPE_DIRECTORY" >> {tmp_path}/log\n'
        f"exit {code}\n"
    )
    control.chmod(0o755)

    def start(job, runtime, ledger, environment):
        found.append({name: value for name, value in environment.items() if name.startswith("CUDA")})
        job.state = "finished"

    monkeypatch.setattr(Job, "start", start)
    monkeypatch.setattr("gaternet.machine._USE_GPU", "print()" if works else "raise SystemExit(1)")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join("345"[:gpus]))
    sweep(make_jobs([PLAIN], [0], tmp_path / "runs"), tmp_path / "ledger.jsonl", at_once=at_once)
    log = (tmp_path / "log").read_text().split("\n") if (tmp_path / "log").exists() else []
    if serves:
        folder = found[0]["CUDA_MPS_PIPE_DIRECTORY"]
        assert found[0] | {"CUDA_MPS_LOG_DIRECTORY": ""} == {
            "CUDA_MPS_PIPE_DIRECTORY": folder,
            "CUDA_MPS_LOG_DIRECTORY": "",
            "CUDA_VISIBLE_DEVICES": "0",
        }
        assert log == [f"3: -d {folder}", f"3: quit {folder}", ""]
        assert not Path(folder).exists()
    else:
        assert not any("CUDA_MPS_PIPE_DIRECTORY" in environment for environment in found)
        tried = (gpus, at_once) == (1, 2)
        assert [line.split()[1] for line in log if line] == ["-d", "quit"] * tried
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "mine")  # one runs already
    sweep(make_jobs([PLAIN], [1], tmp_path / "runs"), tmp_path / "ledger.jsonl", at_once=at_once)
    assert not any(name.startswith("CUDA_MPS") for name in found[-1])


def test_the_last_words_of_an_error_in_a_frame_are_its_words(tmp_path):
    (tmp_path / "log.txt").write_text("Usage: gaternet\n╭─ Error ───╮\n│ No such option: --x │\n╰───────────╯\n\n")
    assert Job(PLAIN, 0, tmp_path).last_words() == "No such option: --x"


def wait_for(process: subprocess.Popen[Any], path: Path) -> None:
    """Until the file is there, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_a_sweep_that_is_stopped_goes_on(tmp_path, gaternet_command):
    words = ["sweep", "digits_resnet20", "--seeds", "1", "--epochs", "8", "--out", str(tmp_path), "--cpu", "--json"]
    run = tmp_path / "digits_resnet20,epochs=8" / "seed0"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*gaternet_command, *words], **pipes)
    wait_for(process, run / "training.pt")
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped, with all saved; 0 of 1 runs are finished: the same command goes on" in message
    assert "with all saved: " in (run / "log.txt").read_text()
    config = (run / "config.json").read_text()
    done = subprocess.run([*gaternet_command, *words], check=True, **pipes)
    (line,) = json.loads(done.stdout)
    assert line == read_ledger(tmp_path / "ledger.jsonl")[0]
    assert (run / "config.json").read_text() == config  # resumed, not begun anew


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGKILL])
def test_runs_end_with_their_sweep_however_that_ends(tmp_path, gaternet_command, signum):
    words = ["sweep", "digits_resnet20", "--seeds", "1", "--epochs", "50", "--out", str(tmp_path), "--cpu"]
    run = tmp_path / "digits_resnet20,epochs=50" / "seed0"
    process = subprocess.Popen(
        [*gaternet_command, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    wait_for(process, run / "training.pt")
    process.send_signal(signum)
    assert process.wait(120) in (128 + signum, -signum)
    deadline = time.monotonic() + 60
    while "with all saved: " not in (run / "log.txt").read_text():
        assert time.monotonic() < deadline, "the run goes on"
        time.sleep(0.05)


def test_a_damaged_ledger_is_named_before_any_run(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text('{"recipe": "digits_resnet20"}\n\n{"recip')
    with pytest.raises(ValueError, match=r"line 3 of .*ledger\.jsonl is damaged"):
        sweep(make_jobs([override(PLAIN, SHORT)], [0], tmp_path), ledger, CPU)
    assert not (tmp_path / "digits_resnet20,epochs=1,batch_size=512").exists()


def test_no_run_goes_on_where_the_sweep_does_not(tmp_path, monkeypatch):
    """The second cannot be started, say because the disk is full."""
    jobs, start = make_jobs([PLAIN], [0, 1], tmp_path), Job.start
    monkeypatch.setattr(Job, "start", lambda job, *rest: start(job, *rest) if job.seed == 0 else tmp_path.read_text())
    with pytest.raises(IsADirectoryError):
        sweep(jobs, tmp_path / "ledger.jsonl", CPU, at_once=2)
    assert jobs[0].state == "stopped"


def test_time_that_is_up_when_all_is_done_stops_nothing(swept):
    out, lines = swept
    jobs = make_jobs([override(PLAIN, SHORT), override(GATED, SHORT)], [0], out, {"noise_std": [0.5]})
    assert sweep(jobs, out / "ledger.jsonl", CPU, minutes=0.0, at_once=len(jobs)) == lines


def test_time_runs_out(tmp_path):
    jobs = make_jobs([PLAIN], [0, 1], tmp_path)
    with pytest.raises(Stopped, match=r"stopped after 0 minutes, with all saved; 0 of 2 runs"):
        sweep(jobs, tmp_path / "ledger.jsonl", CPU, minutes=0.0)
    assert [job.state for job in jobs] == ["stopped", "waiting"]


def test_numbers_that_say_nothing_are_refused(tmp_path):
    options: tuple[dict[str, Any], ...] = ({"minutes": float("nan")}, {"minutes": -1.0}, {"at_once": 0})
    for each in options:
        with pytest.raises(ValueError, match="must be at least"):
            sweep(make_jobs([PLAIN], [0], tmp_path), tmp_path / "ledger.jsonl", CPU, **each)
    assert list(tmp_path.iterdir()) == []


def test_training_writes_its_own_line(tmp_path, gaternet_command):
    words = ["train", "digits_resnet20", "--epochs", "1", "--cpu", "--out", str(tmp_path / "run")]
    subprocess.run([*gaternet_command, *words, "--ledger", tmp_path / "a" / "ledger.jsonl"], check=True)
    (line,) = read_ledger(tmp_path / "a" / "ledger.jsonl")
    assert line["options"] == {"epochs": 1}
    train(override(PLAIN, {"epochs": 1}), tmp_path / "again", CPU)
    assert describe_run(tmp_path / "again").keys() == line.keys()


def test_a_line_is_of_all_epochs_and_of_the_last_model(tmp_path, monkeypatch):
    measured = {"parameters": 1, "backbone_macs": 2}

    def evaluated(path: Path, which: str = "last", **options: Any) -> Mapping[str, Any]:
        assert which == "last"
        return measured

    monkeypatch.setattr("gaternet.ledger.evaluate_saved", evaluated)
    for name, recipe in (("row", find_recipe("cifar10_resnet20")), ("other", find_recipe("digits_resnet20"))):
        run = RunDirectory(tmp_path / name)
        run.start(
            {
                "recipe": asdict(override(recipe, {"epochs": recipe.epochs})),
                "seed": 3,
                "processes": 1,
                "precision": "bf16",
            }
        )
        for epoch, right in ((1, 0.75), (recipe.epochs, 0.5)):  # the first is the best
            tested = {"test_accuracy": right, "test_top5_accuracy": right + 0.125, "test_loss": 2.0 * epoch}
            run.log(
                {"kind": "epoch", "step": epoch, "epoch": epoch, **tested, "train_loss": 1.0 * epoch, "seconds": 10.0}
            )
        run.close()
        line = describe_run(tmp_path / name, CPU)
        assert line["as_published"] == (name == "row")
        assert (line["model"], line["seed"], line["precision"], line["seconds"]) == ("resnet20", 3, "bf16", 20.0)
        assert (line["test_error"], line["test_top5_error"]) == (50.0, 37.5)
        assert (line["train_loss"], line["test_loss"]) == (recipe.epochs, 2 * recipe.epochs)
        (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n")
        assert find_line(tmp_path / "ledger.jsonl", tmp_path / name) == line
        config = json.loads((tmp_path / name / "config.json").read_text())
        for other in ({"seed": 4}, {"started": "2020-01-01T00:00:00+00:00"}):  # another run with the same options
            (tmp_path / name / "config.json").write_text(json.dumps(config | other))
            assert find_line(tmp_path / "ledger.jsonl", tmp_path / name) is None


def test_another_run_in_a_jobs_directory_is_not_taken_for_it(swept, tmp_path):
    out, lines = swept
    jobs = [Job(override(PLAIN, SHORT), 0, out / name / "seed0") for name in ("digits_resnet20,epochs=1", "other")]
    jobs[0].path = next(path.parent for path in out.glob("digits_resnet20,*/seed0/config.json"))
    assert sweep(jobs[:1], out / "ledger.jsonl", CPU) == lines[:1]
    for job in (Job(override(PLAIN, SHORT | {"epochs": 2}), 0, jobs[0].path), Job(jobs[0].recipe, 1, jobs[0].path)):
        with pytest.raises(TrainingError, match=r"holds another run .gaternet train digits_resnet20"):
            sweep([job], out / "ledger.jsonl", CPU)
