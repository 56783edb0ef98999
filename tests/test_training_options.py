"""That a run does what its recipe says: augmentation, order, optimizer, averages, and what it writes down."""

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_state import machine_of, state
from torch import nn
from training_runs import CPU, records, small

import gaternet.train
from gaternet import files
from gaternet.checkpoint import load_model, save_model
from gaternet.data import load_data
from gaternet.machine import make_accelerator
from gaternet.method import GaterNet
from gaternet.models import create_model
from gaternet.network import make_optimizer
from gaternet.preparation import prepare
from gaternet.step import TrainingStep
from gaternet.train import train


def test_images_are_augmented_in_an_order_of_the_seed(tmp_path, monkeypatch):
    seen = []

    def look(step: Any, images: torch.Tensor, labels: torch.Tensor, now: Any) -> None:
        seen.append((images.clone(), labels.tolist()))
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingStep, "__call__", look)
    for number, (options, seed) in enumerate((({"crop": False}, 0), ({}, 0), ({}, 1))):
        with pytest.raises(KeyboardInterrupt):
            train(small("resnet8", **options), tmp_path / str(number), CPU, seed)
    (plain, first), (moved, same), (_, other) = seen
    assert first == same
    assert first != other
    assert not torch.equal(plain, moved)


def test_the_optimizer_is_the_recipes():
    recipe = small("resnet8", momentum=0.8, weight_decay=0.03, nesterov=True)
    (group,) = make_optimizer(create_model("resnet8", 10, 1), recipe, make_accelerator(CPU)).param_groups
    assert [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")] == [0.1, 0.8, True, 0.03]


def test_averages_keep_as_much_as_their_decay_says():
    prepared = prepare(small("resnet8", ema_decay=0.75), load_data("digits"), CPU, 0, make_accelerator(CPU))
    assert prepared.ema is not None
    weight = prepared.network.get_parameter("conv1.weight")
    before = weight.detach().clone()
    for _ in range(2):  # the first is a copy
        with torch.no_grad():
            weight.add_(1)
        prepared.ema.update_parameters(prepared.network)
    torch.testing.assert_close(prepared.judged.get_parameter("conv1.weight"), before + 0.75 * 1 + 0.25 * 2)


def test_best_is_the_first_of_the_highest_accuracies(tmp_path, monkeypatch):
    training = state(machine_of(1))
    assert [training.end_epoch(accuracy) for accuracy in (0.5, 0.7, 0.7, 0.6)] == [True, True, False, False]
    evaluate, accuracies = gaternet.train.evaluate, iter((0.75, 0.5))
    monkeypatch.setattr(gaternet.train, "evaluate", lambda *given: {**evaluate(*given), "accuracy": next(accuracies)})
    train(small("resnet8"), tmp_path, CPU)
    epochs = [load_model(tmp_path / which)[1]["trained"]["epochs"] for which in ("best", "last")]
    assert epochs == [1, 2]


def test_what_is_written_down_is_what_happened(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = train(small("resnet8", epochs=1), tmp_path, replace(CPU, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Scalars("test/accuracy")
    assert (event.step, event.value) == (5, pytest.approx(record["test_accuracy"]))
    assert all(line["gradient_norm"] > 0 for line in records(tmp_path, "step"))
    assert record["lr"] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))  # of the last of five steps


class WithIndex(nn.Module):
    """A plain network that holds whole numbers, and a kernel for volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = create_model("resnet8", 10, 1)
        self.register_buffer("index", torch.arange(169))
        self.register_buffer("volume", torch.ones(1, 1, 2, 2, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)


def test_averages_leave_whole_numbers_as_they_are(tmp_path):
    train(small("resnet8", ema_decay=0.9, epochs=1), tmp_path, CPU, network=WithIndex())
    saved, _ = load_model(tmp_path / "last", backbone=WithIndex())
    assert torch.equal(saved.get_buffer("index"), torch.arange(169))


@pytest.mark.parametrize("gated", [False, True])
def test_a_network_that_was_compiled_before_is_refused(gated, tmp_path):
    model = create_model("resnet8_gated" if gated else "resnet8", 10, 1)
    compiled: Any = torch.compile(model)
    with pytest.raises(
        ValueError, match="is wrapped in OptimizedModule, where its weights have other names: pass it unwrapped"
    ):
        train(small("resnet8"), tmp_path / "run", CPU, network=compiled)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ValueError, match="is wrapped in OptimizedModule, where its weights have other names: pass it unwrapped"
    ):
        save_model(compiled, tmp_path / "saved")


def test_what_a_subclass_adds_learns_beside_a_gaters_own_rate():
    class Head(GaterNet):
        pass

    plain = create_model("resnet8_gated", 10, 1)
    assert isinstance(plain, GaterNet)
    model = Head(plain.ungate(), plain.gater, plain.sites)
    model.add_module("head", nn.Linear(3, 3))
    groups = make_optimizer(model, small(gater_lr=0.05), make_accelerator(CPU)).param_groups
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    assert counts == [
        sum(p.numel() for p in model.backbone.parameters()) + 12,
        sum(p.numel() for p in model.gater.parameters()),
    ]
    assert [group["scale"] for group in groups] == [1.0, 0.5]


def test_each_process_draws_noise_of_its_own(tmp_path, monkeypatch):
    drawn: dict[int, list[int]] = {}
    for process in (0, 1):
        seeds = drawn.setdefault(process, [])
        monkeypatch.setattr(Accelerator, "process_index", process)
        monkeypatch.setattr(gaternet.train, "seed_step", lambda seed, device, seeds=seeds: seeds.append(seed))
        train(small("resnet8", epochs=1), tmp_path / str(process), CPU)
    assert len({*drawn[0], *drawn[1]}) == 10


def test_checkpoints_within_an_epoch_are_minutes_apart(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(time, "monotonic", itertools.count(0.0, 1.0).__next__)  # a second passes whenever it is asked
    monkeypatch.setattr(files, "save_state", lambda path, state: saved.append(state["step"]))
    train(small("resnet8", epochs=1), tmp_path / "seldom", replace(CPU, save_minutes=1.0))
    assert saved == [5]
    saved.clear()
    train(small("resnet8", epochs=1), tmp_path / "often", replace(CPU, save_minutes=1 / 60))
    assert saved == [1, 2, 3, 4, 5]
