"""Skipping computes what masking computes, with open filters only."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import LINKS, chain_of
from skipped_networks import KERNELS, THREE, assert_skips_exactly, gated, inverted, plan_of, random_gates
from small_networks import IMAGES, Block, Net, conv, seeded, squeeze_excite
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gaternet
from gaternet.cost import CostModel
from gaternet.method import Gater
from gaternet.models.cifar_resnet import Bottleneck, CifarResNet
from gaternet.models.create import create_backbone
from gaternet.skipping import Skipper, kernels
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.program import Program


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


def _bottlenecks() -> nn.Module:
    """A ResNet-164 with 2 units a stage instead of 18."""
    return CifarResNet(Bottleneck, 2, 16, (4, 32, 64), (16, 128, 256))


@pytest.mark.parametrize("name", ["resnet20", "bottlenecks", "timm:mobilenetv3_small_050", "timm:regnetx_002"])
@pytest.mark.parametrize("sites", ["residual", "all"])
def test_networks_skip_exactly(name, sites):
    images = torch.randn(3, 3, 32, 32)
    backbone = _bottlenecks() if name == "bottlenecks" else create_backbone(name, 10)
    model = gated(backbone, images, sites)
    assert_skips_exactly(model, images, random_gates(model, 0.5))
    one = torch.zeros(3, model.num_gates)
    one[torch.arange(3), torch.tensor([0, 5, model.num_gates - 1])] = 1
    assert_skips_exactly(model, images, one)


CONVS = st.fixed_dictionaries(
    {
        "channels": st.integers(1, 70),
        "filters": st.integers(1, 150),
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 3)),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "height": st.integers(9, 13),
        "width": st.integers(9, 13),
        "bias": st.booleans(),
        "threads": st.integers(1, 3),
        "density": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    }
)


@given(CONVS)
@settings(max_examples=60, deadline=None)
def test_convolutions_of_any_shape_skip_exactly(case):
    """Tiles and panels have many sizes; a second convolution reads what the first left open, a third is depthwise."""
    filters, shape = case["filters"], {name: case[name] for name in ("stride", "dilation", "padding", "bias")}
    images = torch.randn(3, case["channels"], case["height"], case["width"])
    network = nn.Sequential(
        nn.Conv2d(case["channels"], filters, case["kernel"], **shape),
        nn.ReLU(),
        nn.Conv2d(filters, filters, 3, padding=1, groups=filters),
        nn.Conv2d(filters, 9, 1),
        nn.Flatten(),
    )
    model = gated(network, images, sites=lambda name, module: name in ("0", "2"))
    gates = random_gates(model, case["density"])
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        with torch.no_grad():
            found = NativeProgram(plan_of(model, images))(images, gates)
            torch.testing.assert_close(found, model.forward_gated(images, gates), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


def test_the_gater_decides():
    model = gated(chain_of(["residual", "inverted residual"]))
    for name in KERNELS:
        fast = gaternet.skip(model, IMAGES, "slice", kernels=name)
        with torch.no_grad():
            torch.testing.assert_close(fast(IMAGES), model(IMAGES))
            gates = fast.gates(IMAGES)
            assert torch.equal(gates, model.gates(IMAGES))
            assert 0 < gates.mean() < 1
            assert not torch.equal(gates[0], gates[1])


@pytest.mark.parametrize("name", KERNELS)
def test_a_result_does_not_depend_on_the_neighbours(name):
    model = gated(chain_of(["residual", "residual with SE", "shuffle"]))
    fast, gates = gaternet.skip(model, IMAGES, "slice", kernels=name), random_gates(model, 0.5)
    together = fast.forward_gated(THREE, gates)
    others = 1 - gates
    for i in range(3):
        keep = torch.arange(3) == i
        images = torch.where(keep[:, None, None, None], THREE, THREE.flip(0) + 1)
        mixed = fast.forward_gated(images, torch.where(keep[:, None], gates, others))
        assert torch.equal(mixed[i], together[i])
        alone = fast.forward_gated(THREE[i : i + 1], gates[i : i + 1])[0]
        torch.testing.assert_close(alone, together[i])  # a matrix product of one row may round otherwise


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_only_open_filters_are_computed(density, monkeypatch):
    """The multiplications that really happen are those that the cost model counts."""
    monkeypatch.setattr(kernels, "MULTIPLE", 1)
    model = gated(inverted())
    gates = random_gates(model, density, batch=1)
    gates[0, [site.start for site in model.sites]] = 1  # none is closed as a whole, which costs a filler
    program = Program(plan_of(model), kernels.Kernels)
    with FlopCounterMode(display=False) as counter:
        program(IMAGES[:1], gates)
    cost = CostModel.of(model, IMAGES)
    assert counter.get_total_flops() / 2 == cost(gates).item()


def test_rounding_up_changes_nothing(monkeypatch):
    model = gated(chain_of(["residual with SE", "inverted residual", "dense", "shuffle"]))
    gates, program = random_gates(model, 0.4), Program(plan_of(model), kernels.Kernels)
    results = []
    for multiple in (1, 3, 8, 100):
        monkeypatch.setattr(kernels, "MULTIPLE", multiple)
        results.append(program(THREE, gates))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_mask_is_the_model_itself():
    model = gated(chain_of(["residual"]))
    gates = random_gates(model, 0.5)
    fast = gaternet.skip(model, IMAGES, engine="mask")
    with torch.no_grad():
        assert torch.equal(fast.forward_gated(THREE, gates), model.forward_gated(THREE, gates))


def test_auto_takes_the_engine_that_was_fastest():
    model = gated(chain_of(["residual"]))
    fast = gaternet.skip(model, IMAGES)
    assert fast.timings.keys() == {"slice", "mask"}
    assert fast.timings[fast.engine] == min(fast.timings.values())


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_gates_that_are_not_0_or_1_are_refused(value):
    model = gated(chain_of(["residual"]))
    gates = torch.ones(2, model.num_gates)
    gates[1, 3] = value
    with pytest.raises(ValueError, match="gates must be 0 or 1 for filters to be skipped"):
        gaternet.skip(model, IMAGES, "slice").forward_gated(IMAGES, gates)


def test_what_does_not_fit_is_refused(unchecked_types):
    model = gated(chain_of(["residual"]))
    fast, gates = gaternet.skip(model, IMAGES, "slice"), torch.ones(2, model.num_gates)
    cases: list[tuple[str, Callable[[], Any]]] = [
        (rf"gates must be \(2, {model.num_gates}\)", lambda: fast.forward_gated(IMAGES, torch.ones(2, 1))),
        (r"images must be \(B, 3, 8, 8\).*call skip again", lambda: fast(torch.ones(2, 3, 9, 9))),
        (
            r"gates must be on cpu, as the images are, but are on meta",
            lambda: fast.forward_gated(IMAGES, gates.to("meta")),
        ),
        (r"images must be torch.float32 on cpu", lambda: fast.forward_gated(IMAGES.double(), gates)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="move the model, and call skip again"):
        fast.double()
    with FakeTensorMode(allow_non_fake_inputs=True):  # GPUs that need not be here
        fast.plan = fast.plan.to(torch.device("cuda:0"))
        fast._check_images(torch.empty(2, 3, 8, 8, device="cuda:0"))
        with pytest.raises(
            ValueError, match=r"images must be torch.float32 on cuda:0.*but are torch.float32 on cuda:1"
        ):
            fast._check_images(torch.empty(2, 3, 8, 8, device="cuda:1"))


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_the_default_precision_does_not_matter(name, other_defaults):
    torch.set_default_dtype(torch.float32)
    model = gated(chain_of(["residual with SE", "windows", "dense"]))
    torch.set_default_dtype(torch.float64)
    fast, gates = gaternet.skip(model, IMAGES, "slice", kernels=name), random_gates(model, 0.5).float()
    with torch.no_grad():
        expected = model.forward_gated(THREE, gates)
    assert fast.forward_gated(THREE, gates).dtype == torch.float32
    torch.testing.assert_close(fast.forward_gated(THREE, gates), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_it_keeps_its_precision_under_autocast(name):
    model = gated(chain_of(["grouped", "windows", "residual"]))
    fast, gates = gaternet.skip(model, IMAGES, "slice", kernels=name), random_gates(model, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast.forward_gated(THREE, gates)
    assert torch.equal(found, fast.forward_gated(THREE, gates))


MIXED: dict[str, Callable[[Any, Tensor], Tensor]] = {  # with more than one precision, or one option for both sides
    "threshold": lambda net, x: net.last(net.conv(x) * (net.conv2(x) > 0.1)),
    "sum with a condition": lambda net, x: net.last((y := net.conv(x)) + (y > 0)),
    "double in between": lambda net, x: net.last(net.conv(x).double().relu().float()),
    "double convolution": lambda net, x: net.last(F.conv2d(net.conv(x).double(), net.weight, padding=1).float()),
    "one stride": lambda net, x: F.conv2d(net.conv(x), net.last.weight, None, (2,), 1),
    "sides of their own": lambda net, x: F.conv2d(net.conv(x), net.last.weight, None, (1, 2), (0, 1), (2, 1)),
    "one dilation": lambda net, x: F.conv2d(net.conv(x), net.last.weight, None, 1, (2,), (2,)),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_precisions_or_names_one_side_skips_exactly(name):
    parts = {"conv": conv(3, 8), "conv2": conv(3, 8), "last": conv(8, 8)}
    model = gated(Net(MIXED[name], **parts, weight=torch.rand(8, 8, 3, 3, dtype=torch.float64)))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


def test_an_empty_batch_gives_no_logits():
    model = gated(chain_of(["residual"]))
    assert gaternet.skip(model, IMAGES, "slice")(IMAGES[:0]).shape == (0, 4)


def test_no_gradients():
    fast = gaternet.skip(gated(chain_of(["residual"])), IMAGES)
    assert not fast(IMAGES).requires_grad
    assert isinstance(fast, Skipper)


def test_a_gater_that_runs_as_it_is_makes_no_noise():
    """Not either where what holds the Skipper is put in training mode."""
    model = gated(chain_of(["residual"]))
    model.gater = Gater(Unexportable(), 3, model.num_gates, batch_norm=False)
    fast = gaternet.skip(model, IMAGES, "slice")
    expected = fast.gates(IMAGES)
    nn.Sequential(fast).train()
    assert not fast.training
    assert torch.equal(fast.gates(IMAGES), expected)


class Unexportable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return means if means.sum() > 0 else -means


def test_what_drops_at_random_goes_on_to():
    model = gated(Net(lambda net, x: F.dropout(net.last(net.conv(x)), training=True), conv=conv(3, 8), last=conv(8, 8)))
    program, gates = NativeProgram(plan_of(model)), torch.ones(2, model.num_gates)
    assert not torch.equal(program(IMAGES, gates), program(IMAGES, gates))


def test_the_weights_are_held_once():
    images = torch.zeros(1, 3, 32, 32)
    model = gated(create_backbone("resnet56", 10), images)
    dense = sum(p.numel() * 4 for p in model.backbone.parameters())
    program = NativeProgram(plan_of(model, images))
    program(images, torch.ones(1, model.num_gates))
    assert program.weight_bytes <= 1.1 * dense


def test_a_gater_with_soft_gates_is_refused(tmp_path):
    model = gated(chain_of(["residual"]))
    soft = gaternet.GaterNet(model.ungate(), Soft(model.num_gates), model.sites)
    fast = gaternet.skip(soft, IMAGES, "slice")
    fast.save(tmp_path)
    for skipper in (fast, Skipper.load(tmp_path)):
        with pytest.raises(ValueError, match="gates must be 0 or 1 for filters to be skipped"):
            skipper(IMAGES)


class Soft(nn.Module):
    """A gater whose gates are between 0 and 1 in evaluation, too."""

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, num_gates)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.mean((2, 3))).sigmoid()


@pytest.mark.parametrize("engine", ["slice", "mask"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_model_may_go_on_learning(name, engine):
    model = gated(chain_of(["residual", "dense", "shuffle", "windows", "grouped", "conv alone"]))
    gates = random_gates(model, 0.5)
    fast = gaternet.skip(model, IMAGES, engine, kernels=name)
    before = fast(IMAGES), fast.forward_gated(THREE, gates)
    model.train()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(3).add_(1)
    assert torch.equal(fast(IMAGES), before[0])
    assert torch.equal(fast.forward_gated(THREE, gates), before[1])


def test_the_plan_can_be_read():
    model = gated(
        Net(
            lambda net, x: net.se(net.second(net.first(x).relu())),
            first=conv(3, 6),
            second=conv(6, 8),
            se=squeeze_excite(),
        )
    )
    lines = str(gaternet.skip(model, IMAGES, "slice").plan).splitlines()
    assert lines[0] == "first: reads all of 3, writes open filters of 6"
    assert lines[1] == "second: reads open channels of 6, writes open filters of 8"
    grouped = gated(Net(lambda net, x: net.grouped(net.first(x)), first=conv(3, 6), grouped=conv(6, 8, groups=2)))
    assert str(plan_of(grouped)).splitlines()[1] == "grouped: reads open channels of 6, writes open filters of 8"


def test_writes_to_what_another_tensor_is_a_part_of_are_refused():
    def through_a_part(net: Any, x: Tensor) -> Tensor:
        x = net.one(x)
        x[:, :2] += 1
        return net.two(x)

    def behind_a_part(net: Any, x: Tensor) -> Tensor:
        x = net.one(x)
        part = x[:, :, ::2, ::2]
        return net.two(x.relu_())[:, :, ::2, ::2] + part

    for body in (through_a_part, behind_a_part):
        refused_for_writing(body)


def refused_for_writing(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = gated(Net(lambda net, x: net.part(x), part=Block(body, one=conv(3, 8), two=conv(8, 8))))
    with pytest.raises(ValueError, match=r"a part of what (part|part\.one) gives is overwritten in place"):
        gaternet.skip(model, IMAGES)


@pytest.mark.parametrize("residual", [True, False])
def test_a_convolution_does_not_overwrite_what_it_reads(residual):
    """A sum could be done in place by the convolution before it, but not if that reads the other summand."""

    def body(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        y = net.one(x) if residual else net.two(net.one(x).relu())
        return (x + y).relu()

    parts = {"one": conv(8, 8)} | ({} if residual else {"two": conv(8, 8)})
    model = gated(Net(body, stem=conv(3, 8), **parts), sites=lambda name, module: name != "stem")
    sums = [step for step in plan_of(model).steps if step.adds is not None]
    assert len(sums) == (0 if residual else 1)
    for density in (0.5, 1.0):
        assert_skips_exactly(model, THREE, random_gates(model, density))


def test_a_constant_is_there_for_every_image():
    def body(net: Any, x: Tensor) -> Tensor:
        tokens = net.one(net.stem(x).relu()).flatten(2).transpose(1, 2)  # (B, pixels, channels)
        tokens = torch.cat([net.token.expand(len(tokens), -1, -1), tokens], 1)
        return tokens.softmax(1).transpose(1, 2)[..., None]

    model = gated(Net(body, stem=conv(3, 8), one=conv(8, 8), token=torch.randn(1, 1, 8, generator=seeded(1))))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))
