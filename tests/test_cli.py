import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gaternet import cli
from gaternet.checkpoint import save_model
from gaternet.data import load_data
from gaternet.explore import Explorer
from gaternet.models import create_model
from gaternet.recipe import GROUPS, Augmentation, Distillation, Gating, Optimizer, Recipe, Runtime
from gaternet.recipes import RECIPES

QUICK = ["--epochs", "1", "--batch-size", "256", "--cpu", "--precision", "no"]


@pytest.fixture(scope="session")
def run(tmp_path_factory, gaternet_command) -> Path:
    """A trained run, made by the command line in a process of its own; some of its gates depend on the image."""
    path = tmp_path_factory.mktemp("cli") / "run"
    options = ["--lr", "0.05", "--initial-bias", "0", "--out", path, "--json"]
    done = subprocess.run(
        [*gaternet_command, "train", "digits_resnet20_gated", *QUICK, *options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\nepoch 1/1  train loss " in done.stderr  # plain lines, for it is no terminal
    assert json.loads(done.stdout)["epoch"] == 1
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and message of a command that goes wrong."""
    monkeypatch.setattr("sys.argv", ["gaternet", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "sweep", "evaluate", "predict", "export", "report", "explore", "recipes", "sites", "bench"]
)
def test_every_command_has_help_with_examples(command):
    text = call(command, "--help")
    assert "Examples:" in text
    assert f"gaternet {command}" in text


def test_every_option_of_the_dataclasses_is_on_the_command_line():
    owners = (Recipe, Augmentation, Optimizer, Gating, Distillation, Runtime)
    names = [f.name for owner in owners for f in dataclasses.fields(owner) if f.metadata]
    assert len(names) == len(set(names))  # flat names mean one thing each
    shown = {parameter.name for parameter in cli.training._option_parameters()}
    assert shown == set(names)
    silent = {f.name for owner in owners for f in dataclasses.fields(owner)} - shown
    assert silent == {"name", "paper", "about", *GROUPS}


def test_options_reach_the_run(run):
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["optimizer"]["lr"] == 0.05
    assert config["recipe"]["batch_size"] == 256
    assert config["runtime"]["cpu"] is True
    assert "--lr 0.05" in config["command"]


def test_evaluate_prints_what_the_run_recorded(run):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    metrics = json.loads(call("evaluate", run, "--cpu", "--json"))
    assert metrics["images"] == 360
    assert metrics["accuracy"] == last["test_accuracy"]  # in the precision that the run was trained in
    assert f"{100 * metrics['accuracy']:.2f} %" in call("evaluate", run, "--cpu", "--which", "best")
    assert re.search(r"precision +full", call("evaluate", run, "--cpu", "--precision", "no"))


def test_predict_names_classes_and_counts_open_gates(run, tmp_path):
    test = load_data("digits").test
    paths = []
    for i in range(3):
        Image.fromarray(test[i][0][0].numpy()).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    found = json.loads(call("predict", run, *paths, "--top", 3, "--json"))
    assert [item["image"] for item in found] == [str(path) for path in paths]
    for item in found:
        shares = [share for _, share in item["classes"]]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1
        assert 0 < item["open_gates"] < item["num_gates"] == 336
    assert "of 336" in call("predict", run, paths[0])


def test_models_saved_in_half_precision_are_used(tmp_path):
    data = load_data("digits")
    model: Any = create_model("resnet8_gated", 10, 1)
    about = {**model.metadata, **data.metadata(), "trained": {"data": "digits"}}
    save_model(model.bfloat16(), tmp_path / "half", about)
    save_model(model.float(), tmp_path / "whole", about)
    Image.fromarray(data.test[0][0][0].numpy()).save(tmp_path / "0.png")
    for arguments in (["evaluate", "--cpu"], ["predict", tmp_path / "0.png"]):
        half, whole = (call(arguments[0], tmp_path / name, *arguments[1:], "--json") for name in ("half", "whole"))
        assert half == whole
    assert call("sites", tmp_path / "half", "--json") == call("sites", tmp_path / "whole", "--json")
    call("report", tmp_path / "half", "--cpu", "--samples", 20)
    assert json.loads(call("export", tmp_path / "half", "--json"))["compared"]["images"] == 64
    call("bench", tmp_path / "half", "--engine", "eager", "--rounds", 1, "--batch-size", 2)
    half, whole = (Explorer.of_run(tmp_path / name, images=50) for name in ("half", "whole"))
    assert np.array_equal(half.gates(data.test[0][0].numpy()), whole.gates(data.test[0][0].numpy()))


def test_an_exported_file_predicts_what_the_run_does(run, tmp_path, capsys, monkeypatch):
    test = load_data("digits").test
    for i in range(3):
        Image.fromarray(test[i][0][0].numpy()).save(tmp_path / f"{i}.png")
    images = [tmp_path / f"{i}.png" for i in range(3)]
    wanted = json.loads(call("predict", run, *images, "--json"))
    for options in ([], ["--form", "skipping"]):
        report = json.loads(call("export", run, *options, "--json"))
        assert (report["on"], report["outputs"]) == ("test images", ["logits", "gates"])
        assert report["compared"]["images"] == 64
        assert report["compared"]["patterns"] > 1
        found = json.loads(call("predict", report["file"], *images, "--json"))
        for item, other in zip(found, wanted, strict=True):
            assert [name for name, _ in item.pop("classes")] == [name for name, _ in other["classes"]]
            assert item == {name: other[name] for name in item}  # also the number of open filters
    assert {path.name for path in run.glob("*.onnx")} == {"model.onnx", "model-skipping.onnx"}
    text = call("export", run, "--no-gates", "--int8", "backbone", "--images", 100)
    assert "pixels in, logits out" in text
    assert "8 bits: accuracy" in text
    assert "0.00 of 336 gates of an image differ" in text
    assert "not known" in call("predict", run / "model-int8.onnx", images[0])
    assert "equal to the model on 64 test images" in call("export", run, "--format", "pt2", "--out", tmp_path / "m.pt2")
    for arguments, message in {
        ("predict", tmp_path / "m.pt2", images[0]): "may hold pickled objects",
        ("predict", images[0], images[0]): "name a run, a saved model or an .onnx file that was exported",
        ("sites", run, "--in-chans", "3"): "takes images of 1 channels: leave --in-chans out",
        ("export", run, "--out", tmp_path / "m.pt"): "m.pt is neither .onnx nor .pt2",
        ("export", run, "--out", tmp_path / "m.onnx", "--format", "pt2"): "m.onnx is to be a file of pt2: name it",
        ("export", run, "--int8", "all", "--format", "pt2"): "int8 is for ONNX files of the masked form",
        ("export", run, "--form", "skipping", "--format", "pt2"): "the skipping form is for ONNX files",
        ("export", run, "--data", tmp_path / "none.npz"): "check --data",
        ("export", run, "--out", images[0] / "m.onnx"): "cannot write",
    }.items():
        code, error = fail(capsys, monkeypatch, *arguments)
        assert code == (1 if message == "cannot write" else 2), arguments
        assert message in error
        assert error.count("\n") == 1, error


def test_recipes_lists_all():
    assert [item["name"] for item in json.loads(call("recipes", "--json"))] == list(RECIPES)
    listed = " ".join(call("recipes").split())
    assert "cifar100_resnet164_gated" in listed
    assert all(recipe.paper or recipe.about in listed for recipe in RECIPES.values())


def test_a_recipes_options_are_shown_as_they_are_given():
    words = call("recipes", "cifar10_resnet20_guided", "imagenet_resnet34").split()
    for flags in (["--crop"], ["--open-probability", "0.5"], ["--milestones", "0.5", "--milestones", "0.75"]):
        assert " ".join(flags) in " ".join(words)
    assert words.count("--epochs") == 2
    assert [recipe["name"] for recipe in json.loads(call("recipes", "short_resnet20", "--json"))] == ["short_resnet20"]


def test_the_version_is_that_of_the_package():
    assert call("--version").strip() == version("gaternet")


def test_the_name_of_a_file_says_what_is_exported(run, tmp_path):
    for name, kind in (("m.pt2", "pt2"), ("m.onnx", "onnx")):
        call("export", run, "--out", tmp_path / name)
        assert (torch.export.load if kind == "pt2" else onnx.load)(tmp_path / name)


def test_what_a_terminal_cannot_show_is_spelt_out(run, tmp_path, gaternet_command):
    Image.new("L", (8, 8)).save(tmp_path / "\u00e9.png")
    done = subprocess.run(
        [*gaternet_command, "predict", run, "\u00e9.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert r"\xe9.png" in done.stdout


def test_user_errors_are_one_sentence_and_an_exit_code(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "damaged" / "last").mkdir(parents=True)
    (tmp_path / "damaged" / "last" / "config.json").write_text((run / "last" / "config.json").read_text())
    weights = (run / "last" / "model.safetensors").read_bytes()
    (tmp_path / "damaged" / "last" / "model.safetensors").write_bytes(weights[:1000])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    cases = {
        ("train", "cifar10_resnet20_gate"): "did you mean 'cifar10_resnet20_gated'?",
        ("train", "digits_resnet20", "--out", run): "continue it with --resume",
        ("train", "digits_resnet20", "--lr", "-1", "--out", tmp_path / "a"): "lr must be above 0",
        ("train", "digits_resnet20", "--model", "resnet21", "--out", tmp_path / "a"): "unknown model 'resnet21'",
        ("train", "digits_resnet20", "--data", tmp_path / "no", "--out", tmp_path / "a"): "no data",
        (
            "train",
            "digits_resnet20",
            "--noise-std",
            "0",
            "--out",
            tmp_path / "a",
        ): "no gater that --noise-std",
        (
            "train",
            "digits_resnet20",
            "--gamma",
            "0.5",
            "--out",
            tmp_path / "a",
        ): "--gamma has an effect only with --schedule",
        (
            "train",
            "digits_resnet20",
            "--temperature",
            "2",
            "--out",
            tmp_path / "a",
        ): "an effect only with --teacher: add",
        (
            "train",
            "cifar10_resnet20_gated",
            "--penalty",
            "each",
            "--out",
            tmp_path / "a",
        ): "--target-density or --",
        (
            "train",
            "digits_resnet20_gated",
            "--freeze",
            "gater",
            "--noise-std",
            "0.1",
            "--out",
            tmp_path / "a",
        ): "--noise-std has an effect only with --freeze none or backbone",
        ("bench", "resnet8_gated", "--sites", "all"): "resnet8_gated is gated as published: leave --sites out",
        ("sites", "densenet_bc_100_12_gated"): "is gated as published: name densenet_bc_100_12, or a run",
        ("train", "digits_resnet20_gated", "--sites", "all", "--out", tmp_path / "a"): "name backbone resnet20 in its",
        ("sweep", "digits_resnet20_gated", "--vary", "open=maybe", "--out", tmp_path / "a"): "open takes true or false",
        ("sweep", "digits_resnet20", "--vary", "epochs=1.5", "--out", tmp_path / "a"): "epochs takes a whole number",
        ("sweep", "digits_resnet20", "--vary", "noise-std=0,1", "--out", tmp_path / "a"): "no gater that --noise-std",
        ("sweep", "digits_resnet20", "--gater-lr", "0.1", "--out", tmp_path / "a"): "no gater that --gater-lr",
        ("train", "digits_resnet20", "--lr", "inf", "--out", tmp_path / "a"): "lr must be finite",
        ("predict", run, tmp_path): "is a folder: name the images in it",
        (
            "sweep",
            "digits_resnet20",
            "--vary",
            "milestones=0.5",
            "--out",
            tmp_path / "a",
        ): "milestones, which is a list",
        ("train", "digits_resnet20", "--precision", "fp16", "--cpu", "--out", tmp_path / "a"): "fp16",
        ("evaluate", tmp_path / "none"): "no run or saved model",
        ("evaluate", tmp_path / "damaged"): "damaged",
        ("predict", run, tmp_path / "none.png"): "no image",
        ("predict", run, tmp_path / "broken.png"): "cannot read image",
    }
    for arguments, message in cases.items():
        code, text = fail(capsys, monkeypatch, *arguments)
        assert code == 2, arguments
        assert text.startswith("error: "), arguments
        assert message in text, arguments
        assert text.count("\n") == 1, arguments
    assert not (tmp_path / "a").exists()  # nothing half begun is left behind
    code, text = fail(capsys, monkeypatch, "train", "digits_resnet20", "--batchsize", "3")
    assert code == 2
    assert "No such option" in text
    code, text = fail(capsys, monkeypatch, "train", "digits_resnet20", "--seed", str(2**63))
    assert code == 2
    assert "Invalid value for '--seed'" in text


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, gaternet_command):
    run = tmp_path / "run"
    command = [*gaternet_command, "train", "digits_resnet20", "--epochs", "50", "--cpu", "--out", str(run)]
    process = subprocess.Popen(
        [*command, "--log-every", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert f"gaternet train --resume --out {run} goes on" in errors
    assert "Traceback" not in errors
    assert (run / "training.pt").exists()


def test_a_run_knows_what_it_trains(run, tmp_path, capsys, monkeypatch):
    """Its options, its seed and those of the machine are what it was started with, unless others are given."""
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "training.pt").unlink()  # as if it had been killed before it saved anything
    shutil.rmtree(copied / "last")
    call("train", "--resume", "--out", copied)
    for name in ("config.json", "last/model.safetensors"):
        assert (copied / name).read_bytes() == (run / name).read_bytes()
    for options, message in {
        ("--resume", "--out", copied, "--seed", 4): "seed was 0, now it is 4",
        ("--resume", "--out", copied, "--lr", 0.2): "lr was 0.05, now it is 0.2",
        ("--resume", "--out", tmp_path): "holds no run to resume: name a recipe to start one",
        ("--resume",): "name a recipe to train, or a run to go on with: gaternet train --resume --out RUN",
        ("--out", copied): "name a recipe to train",
    }.items():
        assert message in fail(capsys, monkeypatch, "train", *options)[1]
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "seed": 3}))
    assert "evaluate" in call("train", "--resume", "--out", copied)  # it is finished
    assert "seed was 3, now it is 0" in fail(capsys, monkeypatch, "train", "--resume", "--out", copied, "--seed", 0)[1]


def test_sites_of_a_run_are_those_of_its_backbone(run, tmp_path):
    options = ["--image-size", 8, "--in-chans", 1]
    expected = json.loads(call("sites", "resnet20", *options, "--sites", "all", "--json"))
    found = json.loads(call("sites", run, "--sites", "all", "--json"))
    assert [found[name] for name in ("sites", "left_out")] == [expected[name] for name in ("sites", "left_out")]
    assert len(found["sites"]) > 9  # more than this run gates
    assert "336 gates at 9 sites" in call("sites", run)
    plain: Any = create_model("resnet20", 10, 1)
    save_model(plain, tmp_path / "plain", {"backbone": plain.gaternet_source})  # which does not say what it sees
    found = json.loads(call("sites", tmp_path / "plain", *options, "--sites", "all", "--json"))
    assert found["sites"] == expected["sites"]


def test_bench_times_dense_masked_and_skipped():
    options = ["--image-size", 16, "--batch-size", 2, "--density", 0.5, "--engine", "eager", "--rounds", 1, "--json"]
    rows = {row["name"]: row for row in json.loads(call("bench", "resnet20", *options))}
    assert rows.keys() == {"dense: eager", "masked", "skipped", "gater"}
    assert all(row["batch"] == 2 and 0 < row["p10"] <= row["median"] <= row["p90"] for row in rows.values())
    assert rows["skipped"]["macs"] == rows["masked"]["macs"] < rows["dense: eager"]["macs"]
    assert 0.4 < rows["skipped"]["density"] < 0.6


def test_bench_of_a_run_times_its_own_gates_on_its_own_images(run):
    text = call("bench", run, "--batch-size", 3, "--engine", "eager", "--rounds", 1)
    assert "3 at a time" in text
    assert "gater and skipped" in text


def test_bench_refuses_what_has_no_gates_and_engines_that_are_not_there(capsys, monkeypatch, tmp_path):
    code, message = fail(capsys, monkeypatch, "bench", tmp_path)
    assert code == 2
    assert "is neither a run nor a saved model" in message
    code, message = fail(capsys, monkeypatch, "bench", "resnet20", "--image-size", 16, "--engine", "abacus")
    assert code == 2
    assert "no dense engine 'abacus': choose of eager" in message


@pytest.mark.parametrize(
    ("given", "found"), [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_give_their_cores_away_before_pytorch_is_loaded(given, found):
    code = """
import os, sys
from gaternet.cli import common
common.app = lambda: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
common.main()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(found), "False"]
