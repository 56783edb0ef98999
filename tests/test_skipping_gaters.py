"""A skipper's gates are its model's, whatever the gater is: its plan is tried, and where it differs not used."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_networks import chain_of
from small_networks import IMAGES, conv
from torch import Tensor, nn

import gaternet
from gaternet.method import Gater, GaterNet
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.program import Program


class Calm(GaterNet):
    """Half as sure of itself."""

    def forward(self, images: Tensor, *, return_gates: bool = False) -> Any:
        logits, gates = super().forward(images, return_gates=True)
        return (logits / 2, gates) if return_gates else logits / 2


def hooked(model: GaterNet) -> GaterNet:
    model.register_forward_hook(lambda module, images, logits: 1 + torch.as_tensor(logits))
    return model


def calm(model: GaterNet) -> GaterNet:
    return Calm(model.ungate(), model.gater, model.sites).eval()


@pytest.mark.parametrize("change", [hooked, calm])
def test_what_a_model_does_beside_its_parts_is_not_dropped(change, tmp_path):
    model = change(gaternet.gate(chain_of(["residual"]), IMAGES, gater="resnet8").eval())
    with pytest.raises(ValueError, match="does more than run its backbone under its gates"):
        gaternet.skip(model, IMAGES, "slice")
    with pytest.raises(ValueError, match="does more than run its backbone under its gates"):
        gaternet.export_pt2(model, IMAGES, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_hooks_that_only_look_are_no_hindrance():
    model, seen = gaternet.gate(chain_of(["residual"]), IMAGES, gater="resnet8").eval(), []
    model.register_forward_hook(lambda module, images, logits: seen.append(len(logits)))
    torch.testing.assert_close(gaternet.skip(model, IMAGES, "slice")(IMAGES), model(IMAGES))


def test_a_hook_of_the_gater_decides_in_an_analysis_as_well():
    model = gaternet.gate(chain_of(["residual"]), IMAGES, gater="resnet8").eval()
    model.gater.register_forward_hook(lambda module, images, gates: torch.ones_like(torch.as_tensor(gates)))
    found = gaternet.analyze(model, [IMAGES])
    assert (found.samples.gates == 1).all()


MANY = torch.randn(16, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(5))


class Features(nn.Module):
    def __init__(self, act: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.act = act

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return features if self.act is None else self.act(images, features)


def of_batch(images: Tensor, features: Tensor) -> Tensor:
    """Through a product of matrices, each image's depend on the others."""
    return (features @ features.t()).softmax(1) @ features


def of_number(images: Tensor, features: Tensor) -> Tensor:
    return features * (1 if len(images) == 1 else -1)


def of_one(images: Tensor, features: Tensor) -> Tensor:
    return features.reshape(1, -1)


def of_few(images: Tensor, features: Tensor) -> Tensor:
    if len(images) > 4:
        raise RuntimeError("too many images")
    return features


class Bools(Features):
    """A gater whose gates are no numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).repeat_interleave(2, 1)[:, :8] > 0.1


class HalfOpen(GaterNet):
    """Half of the gates are open, whatever their logits."""

    def gates(self, images: Tensor) -> Tensor:
        assert isinstance(self.gater, Gater)
        logits = self.gater.logits(images)
        return (logits > logits.median(1, keepdim=True).values).to(logits.dtype)


class Shared(GaterNet):
    """One gate of the gater's for all."""

    def gates(self, images: Tensor) -> Tensor:
        return self.gater(images)[:, :1].expand(-1, self.num_gates)


def model_of(extractor: nn.Module, images: Tensor = IMAGES) -> GaterNet:
    torch.manual_seed(0)
    model = gaternet.gate(chain_of(["residual"]), images, gater=extractor, batch_norm=False).eval()
    assert isinstance(model.gater, Gater)
    nn.init.normal_(model.gater.fc2.weight)
    return model


def with_one_gate_at(bias: float) -> GaterNet:
    model = model_of(Features(of_number))
    assert isinstance(model.gater, Gater)
    model.gater.fc2.bias.data[0] = bias
    return model


def remade(kind: type[GaterNet], gater: nn.Module | None = None) -> GaterNet:
    model = model_of(Features())
    return kind(model.ungate(), gater or model.gater, model.sites).eval()


UNLIKE: dict[str, Callable[[], GaterNet]] = {
    "of the batch": lambda: model_of(Features(of_batch)),
    "of its size": lambda: model_of(Features(of_number)),
    "of its size, one gate far from the threshold": lambda: with_one_gate_at(-1e9),
    "of its size, one gate infinitely far": lambda: with_one_gate_at(-float("inf")),
    "a subclass": lambda: remade(HalfOpen),
    "a subclass with fewer outputs": lambda: remade(Shared, Features()),
}


@pytest.mark.parametrize("engine", ["slice", "mask"])
@pytest.mark.parametrize("name", UNLIKE)
def test_gates_are_the_models_where_a_plan_would_give_others(name, engine):
    model = UNLIKE[name]()
    expected = model.gates(MANY)
    fast = gaternet.skip(model, IMAGES, engine)
    assert torch.equal(fast.gates(MANY), expected)
    assert not isinstance(fast.gater, Program | NativeProgram)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("act", [of_one, of_few])
def test_a_gater_may_take_few_images(act, number):
    """It is tried image by image then; of single ones there is a plan."""
    of_yours = nn.Sequential(Features(act), nn.Linear(6, 8), nn.Hardtanh(0, 1))
    images = IMAGES[:1] if act is of_one else IMAGES[:number]
    for model in (model_of(Features(act), IMAGES[:1]), remade(GaterNet, of_yours)):
        for engine in ("slice", "mask"):
            fast = gaternet.skip(model, images, engine)
            torch.testing.assert_close(fast.gates(images), model.gates(images))
            assert isinstance(fast.gater, Program | NativeProgram) == (engine == "slice")


def test_gates_may_be_bools(unchecked_types):
    model = remade(GaterNet, Bools())
    expected = copy.deepcopy(model).gates(IMAGES)
    assert expected.any()
    assert not expected.all()
    fast = gaternet.skip(model, IMAGES, "slice")
    assert torch.equal(fast.gates(IMAGES).bool(), expected)
    assert isinstance(fast.gater, Program | NativeProgram)


@pytest.mark.parametrize("kind", [HalfOpen, GaterNet])
def test_an_analysis_counts_the_gates_of_the_model(kind):
    model = remade(kind)
    expected = model.gates(MANY).sum().item()
    assert 16 * gaternet.analyze(model, [MANY], samples=1).rates.sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_compiled_models_gater_may_have_no_plan_either(unchecked_types):
    def by_numbers(images: Tensor, features: Tensor) -> Tensor:  # which cannot be exported
        return features if images.sum() < 1e9 else -features

    model = gaternet.gate(chain_of(["residual"]).eval(), IMAGES, gater=Features(by_numbers)).eval()
    fast = gaternet.skip(torch.compile(model), IMAGES, "slice")  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert torch.equal(fast.gates(MANY), model.gates(MANY))
