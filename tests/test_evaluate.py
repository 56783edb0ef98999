"""Evaluation: what it counts."""

from dataclasses import replace

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from training_runs import CPU, small

from gaternet.cli.using import evaluate as evaluate_command
from gaternet.cost import CostModel
from gaternet.data import Preprocessing, ToInput, load_data
from gaternet.evaluate import batch_size_for, evaluate
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.method import GaterNet
from gaternet.models import create_model
from gaternet.preparation import prepare


def test_macs_are_counted_in_full_where_the_network_computes_in_bf16(monkeypatch):
    data, counted, seen = load_data("digits"), CostModel.__call__, []

    def count(cost, gates):
        seen.append(torch.is_autocast_enabled("cpu"))
        return counted(cost, gates)

    network = create_model("resnet8_gated", 10, 1, extractor="resnet8")
    assert isinstance(network, GaterNet)
    to_input, accelerator = ToInput(data.preprocessing), make_accelerator(replace(CPU, precision="bf16"))
    cost = CostModel.of(network, to_input(data.test.take([0])))
    monkeypatch.setattr(CostModel, "__call__", count)
    evaluate(network, make_batches(data.test, 500, CPU, accelerator), to_input, accelerator, cost)
    assert seen == [False]


def test_evaluation_equals_a_recount():
    data = load_data("digits")
    network = create_model("resnet20_gated", 10, 1)
    assert isinstance(network, GaterNet)
    network.gater.eval()  # frozen
    accelerator = make_accelerator(CPU)
    metrics = evaluate(
        network, make_batches(data.test, 100, CPU, accelerator), ToInput(data.preprocessing), accelerator
    )
    assert (network.training, network.backbone.training, network.gater.training) == (True, True, False)  # as before
    network.eval()
    pixels, labels = data.test.take(range(360)), torch.tensor(data.test.labels)
    with torch.no_grad():
        logits, gates = network(data.preprocessing.normalize(pixels), return_gates=True)
    ranks = logits.argsort(descending=True)
    assert metrics["images"] == 360
    assert np.isclose(metrics["loss"], nn.functional.cross_entropy(logits, labels).item(), rtol=1e-4)
    assert np.isclose(metrics["accuracy"], (ranks[:, 0] == labels).double().mean().item(), atol=1e-9)
    assert np.isclose(metrics["top5_accuracy"], (ranks[:, :5] == labels[:, None]).any(1).double().mean().item())
    rates = gates.double().mean(0)
    assert np.isclose(metrics["density"], rates.mean().item())
    assert np.isclose(metrics["dependent"], ((rates > 0) & (rates < 1)).double().mean().item())
    assert np.isclose(metrics["always_on"] + metrics["always_off"] + metrics["dependent"], 1)
    assert np.isclose(metrics["site_density"][2], rates[32:48].mean().item(), atol=1e-4)
    varying = rates[(rates > 0) & (rates < 1)].numpy()
    bits = -varying * np.log2(varying) - (1 - varying) * np.log2(1 - varying)
    assert np.isclose(metrics["entropy"], bits.sum() / network.num_gates)


def test_large_images_are_evaluated_in_smaller_batches(monkeypatch):
    accelerator = make_accelerator(CPU)
    for side, alone, shared in ((32, 500, 500), (64, 500, 500), (224, 40, 160), (4096, 1, 4)):
        preprocessing = Preprocessing(side, side, (0.5,) * 3, (0.5,) * 3)
        assert batch_size_for(preprocessing, accelerator) == alone
        with monkeypatch.context() as four:
            four.setattr(type(accelerator), "num_processes", 4)
            assert batch_size_for(preprocessing, accelerator) == shared


def test_a_training_evaluates_as_many_at_once_as_fit_or_as_it_trains_on():
    data = load_data("digits", image_size=128)  # 360 test images
    for batch_size, batches in ((64, 3), (256, 2)):
        recipe = small("resnet8", batch_size=batch_size, image_size=128)
        assert len(prepare(recipe, data, CPU, 0, make_accelerator(CPU)).test_batches) == batches


def test_one_of_several_processes_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gaternet.evaluate.evaluate_saved", lambda *_: {"images": 1})
    for main in (False, True):
        monkeypatch.setattr(PartialState, "is_main_process", main)
        evaluate_command(tmp_path, as_json=True)
        assert capsys.readouterr().out == ('{"images": 1}\n' if main else "")
