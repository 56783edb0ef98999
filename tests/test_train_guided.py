"""What our own recipes add to the training of gates: a classifier on E, open samples, and what changes with time."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_runs import CPU, assert_same_weights, records, send_signal_after, small, weights

import gaternet.step
from gaternet.checkpoint import load_model
from gaternet.data import load_data
from gaternet.method import Gater, GaterNet
from gaternet.models import create_model
from gaternet.network import GuidedNet, build_network
from gaternet.recipe import Gating
from gaternet.step import training_step
from gaternet.train import Stopped, train


@pytest.mark.parametrize("training", [True, False])
def test_a_guided_network_is_the_network_with_a_classifier(training):
    network = build_network(small(), load_data("digits"), seed=3).train(training)
    assert isinstance(network, GaterNet)
    images = torch.randn(6, 1, 8, 8)
    guided = GuidedNet(network, Gating(auxiliary_weight=1.0), 10).train(training)
    assert guided.classifier is not None
    torch.manual_seed(0)
    expected = network(images, return_gates=True)
    torch.manual_seed(0)
    logits, gates, guess = guided(images, return_gates=True)
    assert torch.equal(logits, expected[0])
    assert torch.equal(gates, expected[1])
    torch.testing.assert_close(guess, guided.classifier(network.gater.get_submodule("extractor")(images)))
    of_another = GaterNet(create_model("resnet20", in_chans=1), nn.Linear(1, 1), network.sites)
    network.gater.register_forward_hook(lambda _module, _args, gates: gates.mul(0))  # evaluation has it, too
    for changed in (of_another, network):
        with pytest.raises(ValueError, match="auxiliary_weight needs a usual Gater: this network makes its gates in"):
            GuidedNet(changed, Gating(auxiliary_weight=1.0), 10)


@pytest.mark.parametrize("auxiliary_weight", [0.0, 1.0])
def test_training_samples_have_all_gates_open_at_random(auxiliary_weight, monkeypatch):
    network = create_model("resnet8_gated", 10, 1, extractor="resnet8", batch_norm=False)
    assert isinstance(network, GaterNet)
    network.train()
    used = []
    monkeypatch.setattr(network, "forward_gated", lambda images, gates: used.append(gates) or gates)
    guided = GuidedNet(network, Gating(auxiliary_weight=auxiliary_weight, open_probability=0.25), 10)
    images = torch.randn(2000, 1, 8, 8)
    torch.manual_seed(0)
    _, gates, *_ = guided(images, return_gates=True)
    torch.manual_seed(0)
    assert torch.equal(gates, network.gates(images))  # the penalty is on these
    is_open = (used[0] == 1).all(1)
    assert torch.equal(used[0][~is_open], gates[~is_open])
    assert not (gates == 1).all(1).any()
    assert is_open.float().mean() == pytest.approx(0.25, abs=0.04)  # 4 standard deviations
    guided.eval()(images[:20], return_gates=True)
    assert torch.equal(used[1], network.gates(images[:20]))
    assert not (used[1] == 1).all(1).any()


def test_an_auxiliary_classifier_teaches_the_extractor_and_is_not_kept(tmp_path, monkeypatch):
    recipe = small(auxiliary_weight=1.0, gater_lr=0.05)
    whole, cut, without = tmp_path / "whole", tmp_path / "cut", tmp_path / "without"
    train(recipe, whole, CPU)
    losses = [line["auxiliary_loss"] for line in records(whole, "step")]
    assert losses[-1] < 0.8 * losses[0]
    with monkeypatch.context() as patched:
        send_signal_after(patched, 3, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(recipe, cut, CPU)
    train(recipe, cut, CPU, resume=True)
    assert_same_weights(cut, whole)
    train(small(gater_lr=0.05), without, CPU)
    assert weights(whole).keys() == weights(without).keys()
    parts = [{k: v for k, v in weights(run).items() if "extractor" in k} for run in (whole, without)]
    assert not any(torch.equal(parts[0][k], parts[1][k]) for k in parts[0] if k.endswith("conv1.weight"))
    assert "auxiliary_loss" not in records(without, "step")[0]


def test_open_samples_are_part_of_training_and_not_of_its_penalty(tmp_path):
    for name, chance in (("own", 0.0), ("open", 0.9)):
        train(small(open_probability=chance, initial_bias=-1.0), tmp_path / name, replace(CPU, log_every=1))
    first, second = (records(tmp_path / name, "step")[0] for name in ("own", "open"))
    assert first["density"] == second["density"] < 0.4
    assert first["loss"] != second["loss"]


def test_the_seed_decides_where_the_guide_of_a_given_network_starts(tmp_path):
    network, losses = create_model("resnet8_gated", 10, 1, extractor="resnet8"), []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        recipe = small(auxiliary_weight=1.0, noise_std=0.0, epochs=1)
        train(recipe, tmp_path / str(number), CPU, seed, network=copy.deepcopy(network))
        losses.append(records(tmp_path / str(number), "step")[0]["auxiliary_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_the_gates_noise_falls_and_their_slope_rises(tmp_path, monkeypatch):
    found, slopes = [], []

    def noted(model, *rest):
        found.append(model.gater.noise_std)
        slopes.append(model.gater.slope)
        return training_step(model, *rest)

    monkeypatch.setattr(gaternet.step, "training_step", noted)
    recipe = small(anneal_noise=True, noise_std=0.5)
    train(recipe, tmp_path / "own", CPU)
    assert found == pytest.approx([0.5 * (1 - step / 10) for step in range(10)])
    trained, _ = load_model(tmp_path / "own" / "last")
    assert isinstance(trained, GaterNet)
    assert trained.gater.noise_std == 0.5  # to go on with
    given = create_model("resnet8_gated", 10, 1, extractor="resnet8", noise_std=0.25)
    train(replace(recipe, gating=replace(recipe.gating, final_slope=5.0)), tmp_path / "given", CPU, network=given)
    assert slopes[:10] == [None] * 10
    assert slopes[10:] == pytest.approx([1 + 0.4 * step for step in range(10)])
    assert isinstance(given.gater, Gater)
    assert given.gater.slope is None
    assert found[10:] == pytest.approx([0.25 * (1 - step / 10) for step in range(10)])
