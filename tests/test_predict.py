"""Predictions, evaluation and lists for programs, where something is wrong or unusual."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from gaternet import cli
from gaternet.checkpoint import load_model, save_model
from gaternet.cli.common import print_json
from gaternet.data import DataError, load_data
from gaternet.evaluate import evaluate_saved
from gaternet.method import GaterNet
from gaternet.models import create_model
from gaternet.predict import load, predict
from gaternet.recipe import Runtime


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    model: Any = create_model("resnet8_gated", 10, 1)
    save_model(model, tmp_path / "model", {**model.metadata, **load_data("digits").metadata()})
    return tmp_path / "model"


def picture(path: Path) -> Path:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("classes", [["a", "b"], [str(number) for number in range(20)]])
def test_names_that_are_not_those_of_the_outputs_are_refused(saved, tmp_path, classes):
    network, metadata = load(saved)
    with pytest.raises(ValueError, match=rf"10 outputs, but its metadata names {len(classes)} classes: name each one"):
        predict(network, metadata | {"classes": classes}, [picture(tmp_path / "0.png")], top=20)


def test_a_missing_file_is_found_before_any_work(saved, tmp_path, monkeypatch):
    network, metadata = load(saved)
    monkeypatch.setattr("gaternet.predict._BATCH", 1)
    monkeypatch.setattr("gaternet.predict._run", lambda *_: pytest.fail("work that would be lost"))
    with pytest.raises(DataError, match=r"no image .*missing\.png: check the path"):
        predict(network, metadata, [picture(tmp_path / "0.png"), tmp_path / "missing.png"])


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_broken_file_does_not_cost_the_others(saved, tmp_path, monkeypatch, batch):
    network, metadata = load(saved)
    monkeypatch.setattr("gaternet.predict._BATCH", batch)
    files = [picture(tmp_path / f"{number}.png") for number in range(4)]
    files.append(files[-1])  # named twice
    whole = predict(network, metadata, files)
    for number in (0, 1):
        files[number].write_text("no image")
    noted: list[DataError] = []
    assert predict(network, metadata, files, note=noted.append) == whole[2:]
    assert [str(files[number]) in str(noted[number]) for number in (0, 1)] == [True, True]
    with pytest.raises(DataError, match=r"0\.png"):
        predict(network, metadata, files)
    shown = CliRunner().invoke(cli.app, ["predict", str(saved), *map(str, files), "--json"])
    assert [found["image"] for found in json.loads(shown.stdout)] == [str(file) for file in files[2:]]
    assert str(shown.exception).startswith("2 of 5 files could not be read, the first of them: ")
    assert str(files[0]) in str(shown.exception)
    one = CliRunner().invoke(cli.app, ["predict", str(saved), str(files[1])])
    assert (str(one.exception), one.stdout) == (str(noted[1]), "")


def test_soft_gates_are_open_above_the_middle(saved, tmp_path):
    """As an analysis counts them."""
    network, metadata = load(saved)
    assert isinstance(network, GaterNet)
    values = torch.linspace(0, 1, network.num_gates)
    network.gater.register_forward_hook(lambda module, images, gates: values.expand_as(torch.as_tensor(gates)))
    (found,) = predict(network, metadata, [picture(tmp_path / "0.png")])
    assert (found.open_gates, found.num_gates) == (int((values > 0.5).sum()), len(values))


def test_a_model_that_gives_no_numbers_predicts_nothing(saved, tmp_path):
    network, metadata = load_model(saved)
    nn.init.constant_(next(network.parameters()), float("nan"))
    save_model(network, saved, metadata)
    with pytest.raises(ValueError, match=r"the model gives .*0\.png logits that are no finite numbers"):
        predict(*load(saved), [picture(tmp_path / "0.png")])
    with pytest.raises(ValueError, match=r"the model in .* gives logits that are no finite numbers"):
        evaluate_saved(saved, data="digits", runtime=Runtime(cpu=True))


def test_one_saved_model_has_no_best(saved, tmp_path):
    with pytest.raises(ValueError, match="is one saved model, not a run with a best one: name the run"):
        load(saved, "best")
    run = tmp_path / "run"
    for name in ("last", "best"):
        shutil.copytree(saved, run / name)
    assert load(run, "best")[1] == load(run / "best")[1]


def test_numbers_in_place_of_names_are_said(saved, tmp_path):
    """A folder's classes are numbered by their names, a file's by nothing that is known."""
    names = ["ape", "bat", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    for name in names:
        for part in ("train", "test"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            picture(tmp_path / "photos" / part / name / "0.png")
    model: Any = create_model("resnet8_gated", 10)
    known = {"height": 8, "width": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    save_model(model, saved, {**model.metadata, "preprocessing": known, "classes": list(map(str, range(10)))})
    with pytest.warns(UserWarning, match=r"photos are taken to be the model's in their order: ape is 0, bat is 1"):
        evaluate_saved(saved, data=str(tmp_path / "photos"), runtime=Runtime(cpu=True, workers=0))


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_what_gates_of_a_site_save_is_a_range():
    """Filters of one convolution that others read more, or less, save more, or less."""
    found = {site["conv"]: site for site in call("sites", "timm:res2net50_26w_4s", "--sites", "all", "--json")["sites"]}
    low, high = found["layer1.1.conv1"]["saves"]
    assert 0 < low < high
    sites = call("sites", "torchvision:mobilenet_v2", "--sites", "all", "--json")["sites"]
    first = {site["start"]: site["conv"] for site in reversed(sites)}
    shared = [site for site in sites if first[site["start"]] != site["conv"]]
    assert shared
    assert [site for site in sites if site["saves"] is None] == shared


def test_numbers_that_json_does_not_have_are_null(capsys):
    print_json({"loss": float("nan"), "rows": [(1.5, float("inf"))], "text": "NaN"})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [[1.5, None]], "text": "NaN"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet8", "--data", "digits"], "--data is for runs, not for resnet8: leave it out"),
        (["resnet8", "--which", "best"], "--which is for runs"),
        (["SAVED", "--image-size", "16"], "--image-size is for networks by name"),
        (["SAVED", "--sites", "all"], "--sites is for networks by name"),
    ],
)
def test_bench_refuses_options_that_do_nothing(saved, arguments, message):
    given = [str(saved) if argument == "SAVED" else argument for argument in arguments]
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["bench", *given], catch_exceptions=False)


def test_json_is_json_where_colours_are_forced(tmp_path, gaternet_command):
    """As in many services for continuous integration, where a pipe is taken for a terminal."""
    words = [
        "bench",
        "resnet8",
        "--image-size",
        "8",
        "--batch-size",
        "1",
        "--engine",
        "eager",
        "--rounds",
        "1",
        "--json",
    ]
    colours = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([*gaternet_command, *words], capture_output=True, text=True, env=colours)
    assert done.returncode == 0, done.stderr
    assert {"dense: eager", "skipped"} <= {row["name"] for row in json.loads(done.stdout)}


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_full_memory_is_one_sentence(saved, monkeypatch, capsys, error):
    def fill(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("gaternet.evaluate.evaluate_saved", fill)
    monkeypatch.setattr("sys.argv", ["gaternet", "evaluate", str(saved), "--data", "digits"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert re.match(r"error: memory is full \(.*\): take smaller batches or images", capsys.readouterr().err)


def test_classes_of_a_file_have_the_names_of_its_set(tmp_path):
    torch.manual_seed(0)
    model: Any = create_model("resnet8_gated", 10)
    known = {"height": 8, "width": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    about = {"classes": [str(number) for number in range(10)], "preprocessing": known}
    save_model(model, tmp_path / "a", model.metadata | about | {"trained": {"data": "somewhere/cifar10.npz"}})
    save_model(model, tmp_path / "b", model.metadata | about)
    found, unnamed = (predict(*load(tmp_path / name), [picture(tmp_path / "0.png")], top=10)[0] for name in "ab")
    assert {name for name, _ in found.classes} >= {"bird", "truck"}
    assert {name for name, _ in unnamed.classes} == set(about["classes"])


def test_names_and_shares_are_those_of_the_network(tmp_path):
    names = [f"class {letter}" for letter in "abcdefghij"]
    model, data = create_model("resnet8_gated", 10, 1), load_data("digits")
    assert isinstance(model, GaterNet)
    save_model(model, tmp_path / "m", {**model.metadata, **data.metadata(), "classes": names})
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(data.test[i][0][0].numpy()).save(path)
    network, metadata = load(tmp_path / "m")
    found = predict(network, metadata, paths, top=4)
    with torch.no_grad():
        shares = network(data.preprocessing.normalize(data.test.take(range(3)))).softmax(1)
    for one, row in zip(found, shares.tolist(), strict=True):
        expected = sorted(zip(row, names, strict=True), reverse=True)[:4]
        assert [name for name, _ in one.classes] == [name for _, name in expected]
        assert [share for _, share in one.classes] == pytest.approx([share for share, _ in expected], rel=1e-4)


def test_an_exported_model_has_no_best_one(tmp_path):
    with pytest.raises(ValueError, match=r"model\.onnx is one exported model, not a run with a best one: name the run"):
        load(tmp_path / "model.onnx", "best")
