"""A captured step learns what a step learns that is run anew each time; without a GPU, the graph has a stand-in."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from small_networks import Net, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import CPU, records, small, weights

import gaternet
import gaternet.step
import gaternet.train
from gaternet.data import Preprocessing, ToInput
from gaternet.machine import make_accelerator
from gaternet.objective import Schedule
from gaternet.recipe import Distillation, Gating, Optimizer, Recipe, Runtime
from gaternet.step import CapturedStep, StepGraph, Sums, TrainingStep, can_be_captured
from gaternet.train import Stopped, train

GPU = torch.cuda.is_available()
RUNTIME = Runtime(cpu=not GPU, precision="no", log_every=1)
TEN_STEPS: dict[str, Any] = {"lr": 0.01, "target_density": 0.3, "sparsity_start": 0.0, "sparsity_ramp": 1.5}
RECIPES = {
    "plain": small("resnet8", lr=0.01),
    "gated": small("resnet8_gated", extractor="resnet8", **TEN_STEPS),
    "guided": small(
        "resnet8_gated",
        extractor="resnet8",
        auxiliary_weight=1.0,
        anneal_noise=True,
        final_slope=3.0,
        open_probability=0.5,
        **TEN_STEPS,
    ),
    "macs": small("resnet8_gated", backbone="resnet8", sites="all", extractor="resnet8", penalty="macs", **TEN_STEPS),
    "averaged, step schedule": small("resnet8", lr=0.01, schedule="step", ema_decay=0.9),
}


class StandIn(StepGraph):
    """What a graph does, without a GPU: the function is run anew, and what it gives lies where it lay before."""

    made: "list[StandIn]"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.made.append(self)

    def warm_up(self, run: Callable[[], Sums]) -> Sums:
        self.calls.append("warm up")
        return run()

    def capture(self, run: Callable[[], Sums]) -> None:
        self.calls.append("capture")
        self.run, self.result = run, dict[str, torch.Tensor]()

    def replay(self) -> Sums:
        self.calls.append("replay")
        for name, value in self.run().items():
            self.result.setdefault(name, value).copy_(value)
        return self.result


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The stand-ins that were used; on a GPU there are none."""
    StandIn.made = []
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not GPU:
        monkeypatch.setattr(gaternet.step, "StepGraph", StandIn)
        monkeypatch.setattr(gaternet.step, "can_be_captured", lambda accelerator: True)
    return StandIn.made


def assert_close(first: Path, second: Path) -> None:
    for a, b in zip(records(first, "step"), records(second, "step"), strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)
    losses = [[line["train_loss"] for line in records(run, "epoch")] for run in (first, second)]  # of all its steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    a, b = weights(first), weights(second)
    assert all(torch.allclose(a[name].double(), b[name].double(), rtol=1e-2, atol=1e-3) for name in a)


@pytest.mark.parametrize("name", RECIPES)
def test_a_captured_step_learns_the_same(name: str, tmp_path: Path, graphs: list[StandIn]):
    train(RECIPES[name], tmp_path / "captured", RUNTIME)
    train(RECIPES[name], tmp_path / "anew", replace(RUNTIME, cuda_graph=False))
    assert_close(tmp_path / "captured", tmp_path / "anew")
    assert len(records(tmp_path / "anew", "step")) == 10
    if not GPU:
        assert [graph.calls for graph in graphs] == [["warm up"] * 3 + ["capture"] + ["replay"] * 7]


def test_so_does_one_that_learns_from_a_teacher(tmp_path: Path):
    train(RECIPES["plain"], tmp_path / "teacher", RUNTIME)
    recipe = small("resnet8", lr=0.01, teacher=str(tmp_path / "teacher"))
    train(recipe, tmp_path / "captured", RUNTIME)
    train(recipe, tmp_path / "anew", replace(RUNTIME, cuda_graph=False))
    assert_close(tmp_path / "captured", tmp_path / "anew")


def test_a_captured_run_that_was_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the middle of the replays, also as a run that is not captured; rates are saved as numbers."""
    recipe = RECIPES["guided"]
    train(recipe, tmp_path / "whole", RUNTIME)
    for name, runtime in (("captured", RUNTIME), ("anew", replace(RUNTIME, cuda_graph=False))):
        stop_after(7, monkeypatch)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / name, RUNTIME)
        state = torch.load(tmp_path / name / "training.pt", weights_only=True)
        assert state["step"] == 7
        assert all(type(group["lr"]) is float for group in state["optimizer"]["param_groups"])
        train(recipe, tmp_path / name, runtime, resume=True)
        assert_close(tmp_path / name, tmp_path / "whole")


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a step; a replay runs no Python of ours, so it is counted one floor above."""
    call, calls = CapturedStep.__call__, []

    def counted(self: CapturedStep, *args: Any) -> Sums:
        calls.append(0)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, *args)

    monkeypatch.setattr(CapturedStep, "__call__", counted)


@pytest.mark.parametrize(
    ("device", "processes", "scaler", "can"),
    [("cuda", 1, None, True), ("cpu", 1, None, False), ("cuda", 2, None, False), ("cuda", 1, object(), False)],
)
def test_what_can_be_captured(device: str, processes: int, scaler: Any, can: bool):
    accelerator = Mock(spec=Accelerator, device=torch.device(device), num_processes=processes, scaler=scaler)
    assert can_be_captured(accelerator) is can


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_network_that_waits_for_the_gpu_cannot_be_captured(tmp_path: Path):
    def waiting(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.conv(x) if x.sum().item() > 0 else net.conv(-x)

    recipe = Recipe("own", model="resnet8", data="digits", batch_size=256, epochs=2)
    network = Net(waiting, conv=nn.Conv2d(1, 8, 3))
    network.fc = nn.Linear(8, 10)
    with pytest.raises(ValueError, match=r"this training step cannot be a CUDA graph \(.*\): run it with --no-cuda"):
        train(recipe, tmp_path / "run", RUNTIME, network=network)


class Given(nn.Module):
    """Gives its parameters, whatever the images: logits, gates and the logits of a classifier beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = nn.ParameterList(torch.rand(6, size, generator=seeded(size)) for size in (4, 5, 4))

    def forward(self, images: Tensor, return_gates: bool = False) -> tuple[Tensor, ...]:
        return tuple(self.outputs)


def test_a_step_descends_the_loss_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # exported for some other training
    recipe = Recipe(
        "own",
        optimizer=Optimizer(label_smoothing=0.3),
        gating=Gating(sparsity=0.5, auxiliary_weight=0.25),
        distillation=Distillation(teacher_weight=0.3, temperature=2.0),
    )
    model, labels, targets = Given(), torch.arange(6) % 4, torch.rand(6, 4, generator=seeded(1))
    logits, gates, guess = (output.detach().clone().requires_grad_() for output in model.outputs)
    told, guessed = (F.cross_entropy(values, labels, label_smoothing=0.3) for values in (logits, guess))
    p, q = (targets / 2).softmax(1), (logits / 2).softmax(1)
    loss, penalty = 0.7 * told + 0.3 * 4 * (p * (p / q).log()).sum(1).mean(), 0.5 * 0.125 * gates.mean()
    gradients = torch.autograd.grad(loss + penalty + 0.25 * guessed, (logits, gates, guess))

    accelerator = make_accelerator(CPU)
    optimizer = accelerator.prepare(torch.optim.SGD([{"params": list(model.parameters()), "scale": 2.0}], 1.0))
    to_input = ToInput(Preprocessing(8, 8, (0.5,) * 3, (0.5,) * 3))
    options: dict[str, Any] = {"density_of": lambda gates: gates.mean()[None], "teacher": lambda images: targets}
    step = TrainingStep(model, optimizer, recipe, accelerator, to_input, **options)
    sums = step(
        torch.zeros(6, 3, 8, 8, dtype=torch.uint8), labels, Schedule(rate=0.1, noise=1.0, ramp=0.125, slope=1.0)
    )
    for before, gradient, after in zip((logits, gates, guess), gradients, model.outputs, strict=True):
        torch.testing.assert_close(after.detach(), before - 0.2 * gradient)
    expected = {"loss": loss, "penalty": penalty, "auxiliary_loss": guessed, "density": gates.mean()}
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], 6 * value.detach())


def test_convolutions_are_tuned_while_a_run_lasts(tmp_path, monkeypatch):
    before, seen = torch.backends.cudnn.benchmark, []
    evaluate = gaternet.train.evaluate
    monkeypatch.setattr(
        gaternet.train, "evaluate", lambda *args: seen.append(torch.backends.cudnn.benchmark) or evaluate(*args)
    )
    train(RECIPES["plain"], tmp_path / "run", CPU)
    assert set(seen) == {True}
    assert torch.backends.cudnn.benchmark is before
