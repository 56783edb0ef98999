"""What a run notes of the machine and the code."""

import importlib.metadata
import json
import signal
import subprocess

import pytest
import torch
from training_runs import CPU, send_signal_after, small

import gaternet.cli
import gaternet.provenance
from gaternet.checkpoint import save_model
from gaternet.jobs import make_jobs
from gaternet.ledger import add_run, describe_run
from gaternet.models import create_model
from gaternet.provenance import describe_machine
from gaternet.recipe import Runtime
from gaternet.train import Stopped, train
from gaternet.trained import as_trained


def test_commit_is_marked_where_code_was_changed_but_not_by_the_ledger(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a", *words], check=True)

    names = ["src/run.py", "docs/results/runs.jsonl", "README.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(gaternet.provenance, "__file__", str(tmp_path / "src" / "run.py"))
    git("init", "--quiet")
    assert describe_machine()["commit"] is None  # this code is no part of it
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    clean = describe_machine()["commit"]
    assert len(clean) == 12
    for name in reversed(names):
        assert describe_machine()["commit"] == clean
        (tmp_path / name).write_text("b")
    assert describe_machine()["commit"] == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/usr/bin/gaternet", "train", "--out", "my runs/a; b"], "gaternet train --out 'my runs/a; b'"),
        (["/src/gaternet/__main__.py", "evaluate", "run"], "gaternet evaluate run"),
        (["/home/me/my_script.py", "--lr", "3"], "my_script.py --lr 3"),
    ],
)
def test_the_command_is_one_that_can_be_given_again(monkeypatch, words, command):
    monkeypatch.setattr("sys.argv", words)
    assert describe_machine()["command"] == command


def test_code_that_runs_where_it_lies_is_not_installed(tmp_path, monkeypatch, capsys):
    installed = importlib.metadata.distribution

    def distribution(name):
        if name == "gaternet":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert describe_machine()["versions"]["gaternet"] == gaternet.__version__
    model = create_model("resnet8", 10, 1)
    save_model(model, tmp_path / "saved", {})
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["gaternet"] == gaternet.__version__
    gaternet.export_pt2(model, torch.zeros(2, 1, 8, 8), tmp_path / "model.pt2")
    with pytest.raises(SystemExit):
        gaternet.cli.app(["--version"])
    assert capsys.readouterr().out == f"{gaternet.__version__}\n"


def test_a_folder_of_another_program_is_no_run(tmp_path):
    (job,) = make_jobs([small("resnet8")], [0], tmp_path)
    job.path.mkdir(parents=True)
    (job.path / "config.json").write_text('{"model_type": "bert"}')
    ledger = tmp_path / "ledger.jsonl"
    for use in (
        lambda: train(small("resnet8"), job.path, CPU, resume=True),
        lambda: add_run(ledger, job.path),
        lambda: describe_run(job.path),
    ):
        with pytest.raises(ValueError, match=r"config.json is of no run, but of another program: name another folder"):
            use()
    job.start(CPU, ledger, {})  # of a sweep, whose others go on
    assert job.state == "failed"


def test_a_run_goes_on_with_the_network_that_it_was_given(tmp_path, monkeypatch):
    recipe, network = small(epochs=2), create_model("resnet20_gated", 10, 1, noise_std=0.0)
    send_signal_after(monkeypatch, 6, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(recipe, tmp_path, CPU, network=network)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"trains a CifarResNet that it was given in Python: .*network="):
        train(recipe, tmp_path, CPU, resume=True)
    assert train(recipe, tmp_path, CPU, resume=True, network=network)["epoch"] == 2


def test_a_run_is_judged_in_the_precision_in_which_it_ended(tmp_path):
    for config, precision in (
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "bf16", "resumed": [{"precision": "no"}]}, "no"),
        ({"precision": "no", "resumed": [{"precision": "bf16"}, {"step": 3}]}, "no"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"recipe": {}, **config}))
        assert as_trained(tmp_path, Runtime(cpu=True)).precision == precision
        (tmp_path / "last").mkdir(exist_ok=True)
        (tmp_path / "last" / "config.json").write_text("{}")
        assert as_trained(tmp_path / "last", Runtime(cpu=True)).precision == precision


def test_a_signal_in_the_last_step_does_not_keep_a_run_from_being_finished(tmp_path, monkeypatch):
    send_signal_after(monkeypatch, 5, signal.SIGTERM)
    assert train(small("resnet8", epochs=1), tmp_path, CPU)["step"] == 5
