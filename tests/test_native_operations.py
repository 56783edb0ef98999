"""The compiled operations beside convolutions, each against PyTorch's."""

from collections.abc import Callable

import pytest
import torch
from random_networks import chain_of
from skipped_networks import THREE, assert_skips_exactly, gated, plan_of, random_gates
from small_networks import IMAGES, Net, conv, norm
from torch import nn

from gaternet.graph import read_graph
from gaternet.method import Gater, GaterNet, GateSite
from gaternet.skipping.kernels import Kernels
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.native.library import KINDS
from gaternet.skipping.native.segment import Segment
from gaternet.skipping.planner import make_plan
from gaternet.skipping.program import Program
from gaternet.skipping.specialise import prune


def native_share(program: NativeProgram) -> float:
    """Of the parts in which the plan is carried out, those that are calls of the library."""
    return sum(isinstance(part, Segment) for part in program._parts) / len(program._parts)


def kinds(program: NativeProgram) -> list[str]:
    """What the library does, operation by operation."""
    return [KINDS[op.kind] for part in program._parts if isinstance(part, Segment) for op in part._ops]


FUNCTIONS = [nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.SiLU(), nn.Hardsigmoid(), nn.Hardswish(), nn.GELU()]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: type(function).__name__)
def test_activations_are_pytorchs_from_end_to_end(function):
    numbers = torch.cat([torch.linspace(-120, 120, 2000), torch.linspace(-9, 9, 1990)])
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
    images = torch.cat([numbers, ends])[:3999].reshape(1, 3, 31, 43)
    program = NativeProgram(make_plan(read_graph(function, images)))
    assert native_share(program) == 1
    expected = function(images.double()).float()
    torch.testing.assert_close(program(images), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "whole": lambda: conv(8, 21),
    "in groups": lambda: conv(8, 24, groups=4),
    "depthwise": lambda: conv(8, 8, groups=8),
    "wide": lambda: conv(8, 70, 1, bias=True),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 9)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: type(function).__name__)
def test_a_convolution_does_the_activation_behind_it(layer, function):
    network = nn.Sequential(conv(3, 8), LAYERS[layer](), function).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(9)  # so that numbers lie on all parts of the functions
        program, expected = NativeProgram(make_plan(read_graph(network, IMAGES[:1]))), network.double()(IMAGES.double())
    assert "pointwise" not in kinds(program)
    torch.testing.assert_close(program(IMAGES), expected.float(), rtol=1e-4, atol=1e-5)


def test_an_activation_stays_where_others_read_what_is_before_it():
    """And where a gate acts between them, or behind."""
    model = gated(
        Net(
            lambda net, x: net.last(net.act(y := net.first(x)) * y + net.act(net.second(x))),
            first=conv(3, 20),
            second=nn.Sequential(conv(3, 20), norm(20)),
            act=nn.SiLU(),
            last=conv(20, 8),
        )
    )
    program = NativeProgram(plan_of(model))
    assert kinds(program).count("pointwise") == 1
    for density in (0.0, 0.5, 1.0):
        assert_skips_exactly(model, THREE, random_gates(model, density))


def test_an_activation_behind_a_sum_is_done_by_itself():
    """Also where the convolution before adds to what nothing else reads."""
    model = gated(
        Net(
            lambda net, x: net.last(net.act(net.second(x) + net.first(x))),
            first=nn.Sequential(conv(3, 20), norm(20)),
            second=nn.Sequential(conv(3, 20), norm(20)),
            act=nn.SiLU(),
            last=conv(20, 8),
        ),
        sites=lambda name, module: name == "last",
    )
    assert kinds(NativeProgram(plan_of(model))).count("pointwise") == 1
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


def test_one_activation_behind_another_is_done_by_itself():
    network = nn.Sequential(conv(3, 20), nn.ReLU(), nn.SiLU(), conv(20, 8)).eval()
    program = NativeProgram(make_plan(read_graph(network, IMAGES[:1])))
    assert kinds(program) == ["conv", "pointwise", "conv"]
    with torch.no_grad():
        torch.testing.assert_close(program(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)


def test_gates_that_act_behind_an_activation_act_behind_it():
    network = Net(lambda net, x: net.last(net.act(net.first(x))), first=conv(3, 20), act=nn.Sigmoid(), last=conv(20, 8))
    gater = Gater(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, 20)
    model = GaterNet(network.eval(), gater, [GateSite("act", "first", 0, 20)]).eval()
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


def test_what_a_subnetwork_multiplies_by_zero_stays_zero_behind_an_activation():
    network = Net(
        lambda net, x: net.last(net.act(net.grouped(net.first(x)))),
        first=conv(3, 16),
        grouped=nn.Sequential(conv(16, 16, groups=4), norm(16)),
        act=nn.Hardswish(),
        last=conv(16, 8),
    )
    model = gated(network)
    kept = torch.arange(model.num_gates) % 3 > 0
    gates = random_gates(model, 0.5) * kept
    program = NativeProgram(prune(plan_of(model), kept))
    assert "pointwise" not in kinds(program)
    found = program(THREE, gates)
    with torch.no_grad():
        torch.testing.assert_close(found, model.forward_gated(THREE, gates), rtol=1e-4, atol=1e-4)


def test_an_activation_of_zeros_at_closed_filters_is_done_by_itself():
    """A plan from a file may have such, and a sigmoid makes other numbers of zeros."""
    plan = make_plan(read_graph(nn.Sequential(conv(3, 20), nn.Sigmoid()).eval(), IMAGES[:1]))
    plan.patterns, plan.num_gates, plan.steps[0].filters = [torch.arange(20)], 20, 0
    gates = (torch.arange(40).reshape(2, 20) % 3 == 0).float()
    torch.testing.assert_close(NativeProgram(plan)(IMAGES, gates), Program(plan, Kernels)(IMAGES, gates))


@pytest.mark.parametrize("channels", [1, 15, 70, 145])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"bias": False, "stride": 2},
        {"dilation": 2, "padding": 3},
        {"kernel_size": 5, "padding": (0, 4)},
    ],
    ids=str,
)
def test_depthwise_convolutions_of_any_width(channels, options):
    """Whole tiles and parts of them; every number of threads gives the same bits."""
    own = {"kernel_size": 3, "padding": 1, "groups": channels, **options}
    network = Net(
        lambda net, x: net.last(net.depthwise(net.first(x)).relu()),
        first=nn.Sequential(conv(3, channels, 1), norm(channels), nn.ReLU()),
        depthwise=nn.Conv2d(channels, channels, **own),
        last=conv(channels, 8, 1),
    )
    model, threads = gated(network), torch.get_num_threads()
    program = NativeProgram(plan_of(model))
    try:
        for density in (0.3, 0.95, 1.0):
            gates = random_gates(model, density)
            assert_skips_exactly(model, THREE, gates)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(program(THREE[:1], gates[:1]))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("bounds", "native"), [((0, 6), True), ((-1, 1), False)])
def test_numbers_are_cut_off_at_their_bounds(bounds, native):
    program = NativeProgram(make_plan(read_graph(nn.Hardtanh(*bounds), IMAGES[:1])))
    assert native_share(program) == native
    assert torch.equal(program(10 * IMAGES - 3), (10 * IMAGES - 3).clamp(*bounds))


POOLS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "mean, margins count": (lambda: nn.AvgPool2d(3, 1, 1), True),
    "mean, margins do not": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), True),
    "mean of unlike sides": (lambda: nn.AvgPool2d((2, 3), (1, 2), (0, 1)), True),
    "mean, default stride": (lambda: nn.AvgPool2d(2), True),
    "mean, sizes rounded up": (lambda: nn.AvgPool2d(3, 2, ceil_mode=True), False),
    "mean, another divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), False),
    "largest": (lambda: nn.MaxPool2d(3, 2, 1), True),
    "largest, apart": (lambda: nn.MaxPool2d((3, 2), 1, 1, (2, 1)), True),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_of_open_channels(name):
    pool, native = POOLS[name]
    model = gated(
        Net(lambda net, x: net.last(net.pool(net.first(x))), first=conv(3, 21), pool=pool(), last=conv(21, 8))
    )
    assert (native_share(NativeProgram(plan_of(model))) == 1) == native
    for density in (0.0, 0.5, 1.0):
        assert_skips_exactly(model, THREE, random_gates(model, density))


def concatenated() -> GaterNet:
    """Open channels behind all of a tensor, and again behind those."""
    return gated(
        Net(
            lambda net, x: net.last(torch.cat([net.one(x), x, net.two(x), net.one(x)], 1)),
            one=nn.Sequential(conv(3, 5), norm(5), nn.ReLU()),
            two=conv(3, 18),
            last=conv(31, 8),
        ),
        sites=lambda name, module: name == "two",
    )


@pytest.mark.parametrize("make", [concatenated, lambda: gated(chain_of(["branches", "dense"]))])
def test_concatenations_of_open_channels(make):
    model = make()
    assert native_share(NativeProgram(plan_of(model))) == 1
    for density in (0.0, 0.5, 1.0):
        assert_skips_exactly(model, THREE, random_gates(model, density))


def test_a_batchnorm_by_itself_is_a_convolution_with_its_relu():
    model = gated(chain_of(["pre-activation", "dense"]))
    plan = plan_of(model)
    alone = [step for step in plan.steps if step.conv is not None and step.conv.is_scale]
    assert len(alone) == 2
    assert all(step.relu for step in alone)
    assert "batch_norm" not in " ".join(str(step.call) for step in plan.steps)
    assert native_share(NativeProgram(plan)) == 1


def test_open_channels_of_a_single_pixel_are_made_flat():
    layers = nn.Sequential(conv(3, 20), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))
    model = gated(layers)
    assert native_share(NativeProgram(plan_of(model))) == 1
    for density in (0.0, 0.5, 1.0):
        assert_skips_exactly(model, THREE, random_gates(model, density))


def test_numbers_near_zero_are_zeros_inside_and_numbers_again_outside():
    """Not a hundredth of the processor's speed is left with them, and all images of a layer may have them."""
    images = torch.full((8, 3, 8, 8), 1e-39)
    program = NativeProgram(make_plan(read_graph(nn.ReLU6(), images[:1])))
    function = NativeProgram(make_plan(read_graph(nn.Hardswish(), images[:1])))
    assert torch.equal(function(images), torch.zeros_like(images))
    assert (program(images) <= 1e-39).all()
    assert (torch.full((100_000,), 1e-39) / 2 > 0).all()


def test_tails_of_vectors_stay_inside():
    """With 1 to 20 channels each operation ends within a vector; what lies behind is not written."""
    for channels in range(1, 21):
        net = nn.Sequential(conv(3, channels), nn.SiLU(), nn.AvgPool2d(2), conv(channels, 3)).eval()
        program = NativeProgram(make_plan(read_graph(net, IMAGES[:1])))
        with torch.no_grad():
            torch.testing.assert_close(program(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)
