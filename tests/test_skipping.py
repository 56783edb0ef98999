"""Skipping computes what masking computes, with open filters only."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import IMAGES, Block, Net, conv, norm, seeded, squeeze_excite
from test_sites import LINKS, chain_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gaternet
from gaternet.cost import CostModel
from gaternet.graph import read_graph
from gaternet.method import GaterNet
from gaternet.models.create import create_backbone
from gaternet.skipping.engine import SliceEngine
from gaternet.skipping.plan import Plan, plan_for
from gaternet.skipping.skip import Skipper

THREE = torch.cat([IMAGES, IMAGES[:1].flip(3)])


def gated(backbone: nn.Module, images: Tensor = IMAGES, sites: Any = "all") -> GaterNet:
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return gaternet.gate(backbone.eval(), images, gater=extractor, sites=sites).eval()


def random_gates(model: GaterNet, density: float, seed: int = 0, batch: int = 3) -> Tensor:
    return (torch.rand(batch, model.num_gates, generator=seeded(seed)) < density).float()


@torch.no_grad()
def assert_skips_exactly(model: GaterNet, images: Tensor, gates: Tensor) -> None:
    expected = model.forward_gated(images, gates)
    for count in (1, len(images)):
        fast = gaternet.skip(model, images)
        found = fast.forward_gated(images[:count], gates[:count])
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected[:count], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", LINKS)
def test_every_kind_of_layer_skips_exactly(name):
    model = gated(chain_of([name, "conv alone", name]))
    for density in (0.0, 0.3, 0.7, 1.0):
        assert_skips_exactly(model, THREE, random_gates(model, density))


@given(names=st.lists(st.sampled_from(sorted(LINKS)), min_size=2, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_random_networks_skip_exactly(names, seed):
    model = gated(chain_of(names))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5, seed))


@pytest.mark.parametrize("name", ["resnet20", "resnet164", "timm:mobilenetv3_small_050", "timm:regnetx_002"])
@pytest.mark.parametrize("sites", ["residual", "all"])
def test_networks_skip_exactly(name, sites):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    model = gated(create_backbone(name, 10), images, sites)
    assert_skips_exactly(model, images, random_gates(model, 0.5))
    one = torch.zeros(3, model.num_gates)
    one[torch.arange(3), torch.tensor([0, 5, model.num_gates - 1])] = 1
    assert_skips_exactly(model, images, one)


def test_the_gater_decides():
    model = gated(chain_of(["residual", "inverted residual"]))
    with torch.no_grad():
        torch.testing.assert_close(gaternet.skip(model, IMAGES)(IMAGES), model(IMAGES))
        assert 0 < model.gates(IMAGES).mean() < 1


def test_a_result_does_not_depend_on_the_neighbours():
    model = gated(chain_of(["residual", "residual with SE", "shuffle"]))
    fast, gates = gaternet.skip(model, IMAGES), random_gates(model, 0.5)
    together = fast.forward_gated(THREE, gates)
    for i in range(3):
        assert torch.equal(fast.forward_gated(THREE[i : i + 1], gates[i : i + 1])[0], together[i])


def chain(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.out(net.depthwise(net.expand(x))) + x


def inverted() -> Net:
    return Net(
        chain,
        stem=nn.Sequential(conv(3, 8), norm(), nn.ReLU()),
        expand=nn.Sequential(conv(8, 12, 1), norm(12), nn.Hardswish()),
        depthwise=nn.Sequential(conv(12, 12, groups=12), norm(12), nn.ReLU()),
        out=nn.Sequential(conv(12, 8, 1), norm()),
    )


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_only_open_filters_are_computed(density):
    """The multiplications that really happen are those that the cost model counts."""
    model = gated(inverted())
    gates = random_gates(model, density, batch=1)
    gates[0, [site.start for site in model.sites]] = 1  # none is closed as a whole, which costs a filler
    graph = read_graph(model.backbone, IMAGES[:1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        SliceEngine(Plan(graph, model.sites), multiple=1)(IMAGES[:1], gates[0])
    assert counter.get_total_flops() / 2 == CostModel(graph, model.sites)(gates).item()


def test_rounding_up_changes_nothing():
    model = gated(chain_of(["residual with SE", "inverted residual", "dense", "shuffle"]))
    gates, plan = random_gates(model, 0.4, batch=1)[0], plan_for(model.backbone, model.sites, IMAGES)
    with torch.no_grad():
        results = [SliceEngine(plan, multiple)(IMAGES[:1], gates) for multiple in (1, 3, 8, 100)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_fully_open_gates_run_the_plain_backbone(monkeypatch):
    model = gated(chain_of(["residual"]))
    monkeypatch.setattr(SliceEngine, "forward", None)
    fast = gaternet.skip(model, IMAGES)
    with torch.no_grad():
        assert torch.equal(fast.forward_gated(THREE, torch.ones(3, model.num_gates)), model.backbone(THREE))


def test_mask_is_the_model_itself():
    model = gated(chain_of(["residual"]))
    gates = random_gates(model, 0.5)
    fast = gaternet.skip(model, IMAGES, engine="mask")
    with torch.no_grad():
        assert torch.equal(fast.forward_gated(THREE, gates), model.forward_gated(THREE, gates))


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_gates_that_are_not_0_or_1_are_refused(value):
    model = gated(chain_of(["residual"]))
    gates = torch.ones(2, model.num_gates)
    gates[1, 3] = value
    with pytest.raises(ValueError, match="gates must be 0 or 1 for filters to be skipped"):
        gaternet.skip(model, IMAGES).forward_gated(IMAGES, gates)


def test_gates_of_another_shape_are_refused(unchecked_types):
    model = gated(chain_of(["residual"]))
    with pytest.raises(ValueError, match=rf"gates must be \(2, {model.num_gates}\)"):
        gaternet.skip(model, IMAGES).forward_gated(IMAGES, torch.ones(2, model.num_gates + 1))


def test_no_gradients_and_no_training_mode():
    model = gated(chain_of(["residual"])).train()
    fast = gaternet.skip(model, IMAGES)
    assert not model.training
    assert not fast(IMAGES).requires_grad
    assert isinstance(fast, Skipper)


def test_the_plan_can_be_read():
    model = gated(
        Net(
            lambda net, x: net.se(net.second(net.first(x).relu())),
            first=conv(3, 6),
            second=conv(6, 8),
            se=squeeze_excite(),
        )
    )
    lines = str(gaternet.skip(model, IMAGES).plan).splitlines()
    assert lines[0] == "first: reads all of 3, writes open filters of 6"
    assert lines[1] == "second: reads open channels of 6, writes open filters of 8"
    grouped = gated(Net(lambda net, x: net.grouped(net.first(x)), first=conv(3, 6), grouped=conv(6, 8, groups=2)))
    assert (
        str(gaternet.skip(grouped, IMAGES).plan).splitlines()[1] == "grouped: reads all of 6, writes all of 8, masked"
    )


def test_writes_to_a_part_of_a_tensor_are_refused():
    def body(net: Any, x: Tensor) -> Tensor:
        x = net.one(x)
        x[:, :2] += 1
        return net.two(x)

    model = gated(Net(lambda net, x: net.part(x), part=Block(body, one=conv(3, 8), two=conv(8, 8))))
    with pytest.raises(ValueError, match=r"a part of what part\.one gives is overwritten in place"):
        gaternet.skip(model, IMAGES)
