"""Filters that get no gates: which, and the reason that is given."""

from typing import Any

import pytest
import torch
from random_networks import Attention, LayerNorm2d, attend, in_windows
from site_checks import check_promises, listed, reasons
from small_networks import IMAGES, Block, Net, conv, norm, squeeze_excite, with_stem
from torch import nn
from torch.nn import functional as F

from gaternet import find_sites
from gaternet.cost import CostModel
from gaternet.graph import read_graph
from gaternet.sites import examine


def shared_weights() -> Net:
    net = Net(lambda net, x: net.two(net.one(net.stem(x)).relu()), stem=conv(3, 8), one=conv(8, 8), two=conv(8, 8))
    net.two.weight = net.one.weight
    return net


def under_autocast(unit: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x + unit.conv(x).float()


class Shift(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x


def shifted_in_passing(unit, x):
    x = unit.conv(x)
    unit.shift(x)  # gates that act on what this gives would act on nothing
    return x


def changed_while_held(unit: Any, x: torch.Tensor) -> torch.Tensor:
    y = unit.conv(x)
    return unit.side(unit.shift(y)) + y


def weighed(x: torch.Tensor) -> torch.Tensor:
    """Each pixel's mean of all, weighed by how like they are."""
    pixels = x.flatten(2)
    return (pixels @ (pixels.transpose(1, 2) @ pixels).softmax(-1)).reshape(x.shape)


def normalised_as_well(unit: Any, x: torch.Tensor) -> Any:
    y = F.batch_norm(unit.conv(x), unit.mean, unit.variance)
    return y, y.sigmoid()


class CenteredNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


class Filtered(nn.Conv2d):
    """Convolves twice, first with a filter of its own."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.first = nn.Parameter(torch.rand(in_channels, 1, 3, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (its name in Conv2d)
        return super().forward(F.conv2d(input, self.first, padding=1, groups=len(self.first)))


POOLED = "it acts on pooled features: there is nothing to save"
IN_PLACE = "unit.shift behind it writes to its input, which may be read in place of its result: let it make a tensor"
INNER = "it runs in a block of its own: put autocast around the call instead"
SHARED = "it shares its weights with another layer"
ATTENTION = "it is part of an attention block, Attention"


class Masked(nn.Conv2d):
    """Gives features and a mask, as partial convolutions do."""

    def forward(self, input: torch.Tensor) -> Any:  # noqa: A002 (its name in Conv2d)
        return super().forward(input), None


class Slim(nn.Conv2d):
    """Uses the first of its filters."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (its name in Conv2d)
        return F.conv2d(input, self.weight[:4], padding=1)


LEFT_OUT: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "several results": (
        with_stem(Block(lambda u, x: u.conv(x)[0], conv=Masked(8, 8, 3, padding=1))),
        {"unit.conv": "unit.conv gives more than one tensor, and gates act on one: let it give that alone"},
    ),
    "some of the filters": (
        with_stem(Block(lambda u, x: torch.cat([u.conv(x), x[:, 4:]], 1), conv=Slim(8, 8, 3))),
        {"unit.conv": "it computes 4 of its 8 filters"},
    ),
    "GroupNorm": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x)), conv=conv(8, 8), norm=nn.GroupNorm(2, 8))),
        {"unit.conv": "GroupNorm behind it mixes channels"},
    ),
    "GroupNorm behind an activation": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x).relu()), conv=conv(8, 8), norm=nn.GroupNorm(2, 8))),
        {"unit.conv": "GroupNorm behind it mixes channels"},
    ),
    "LayerNorm": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x)), conv=conv(8, 8), norm=LayerNorm2d(8))),
        {"unit.conv": "LayerNorm2d behind it mixes channels"},
    ),
    "a norm of its own": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x)), conv=conv(8, 8), norm=CenteredNorm())),
        {"unit.conv": "CenteredNorm behind it mixes channels"},
    ),
    "conv run twice": (
        with_stem(Block(lambda u, x: u.conv(u.conv(x + u.bn(x)).relu()), bn=norm(), conv=conv(8, 8))),
        {"unit.conv": "it runs 2 times"},
    ),
    "norm run twice": (
        with_stem(Block(lambda u, x: u.bn(u.two(u.bn(u.one(x)).relu())), bn=norm(), one=conv(8, 8), two=conv(8, 8))),
        dict.fromkeys(("unit.one", "unit.two"), "unit.bn behind it runs 2 times: give each convolution its own"),
    ),
    "shared weights": (shared_weights(), {"one": SHARED, "two": SHARED}),
    "function": (
        with_stem(Block(lambda u, x: F.conv2d(x, u.weight), weight=nn.Parameter(torch.rand(8, 8, 1, 1)))),
        {"conv2d_1": "a function computes it within Block, not an nn.Conv2d"},
    ),
    "attention": (
        with_stem(Block(lambda u, x: u.bn(x) + u.attention(u.bn(x)), bn=norm(), attention=Attention())),
        {f"unit.attention.{name}": ATTENTION for name in ["q", "k", "v", "out"]},
    ),
    "attention in the root": (
        Net(lambda net, x: attend(net, net.stem(x)), stem=conv(3, 8), **dict(Attention().named_children())),
        dict.fromkeys("qkv", "it leads into attention"),
    ),
    "attention and a convolution": (
        Net(lambda net, x: weighed(y := net.conv(x)) + net.side(y), conv=conv(3, 8), side=conv(8, 8)),
        {},
    ),
    "a sum before attention": (
        Net(lambda net, x: weighed(net.one(x) + net.two(x)), one=conv(3, 8), two=conv(3, 8)),
        {},
    ),
    "product with weights": (
        with_stem(Block(lambda u, x: x + u.conv(x) @ u.weight, conv=conv(8, 8), weight=torch.rand(8, 8))),
        {},
    ),
    "sigmoid weights": (
        with_stem(Block(lambda u, x: x * u.conv(x).sigmoid(), conv=conv(8, 8))),
        {"unit.conv": "it computes weights between 0 and 1, not features"},
    ),
    "mask of one channel": (
        with_stem(Block(lambda u, x: x * u.norm(u.conv(x)).sigmoid(), conv=conv(8, 1), norm=norm(1))),
        {"unit.conv": "it computes weights between 0 and 1, not features"},
    ),
    "SE": (with_stem(squeeze_excite()), {"unit.fc1": POOLED, "unit.fc2": POOLED}),
    "SE of maxima": (
        with_stem(
            Block(
                lambda u, x: x * u.two(u.one(x.amax((2, 3), keepdim=True)).relu()).sigmoid(),
                one=conv(8, 2, 1),
                two=conv(2, 8, 1),
            )
        ),
        {"unit.one": POOLED, "unit.two": POOLED},
    ),
    "outputs": (
        Block(lambda net, x: net.head(net.stem(x).relu()).mean((2, 3)), stem=conv(3, 8), head=conv(8, 4, 1)),
        {"head": "its filters are the network's outputs"},
    ),
    "outputs, for each pixel": (
        Block(lambda net, x: net.head(net.stem(x).relu()).log_softmax(1), stem=conv(3, 8), head=conv(8, 4, 1)),
        {"head": "its filters are the network's outputs"},
    ),
    "outputs, flattened": (
        Block(
            lambda net, x: F.adaptive_avg_pool2d(net.head(net.stem(x).relu()), 1).flatten(1),
            stem=conv(3, 8),
            head=conv(8, 4, 1),
        ),
        {"head": "its filters are the network's outputs"},
    ),
    "outputs, as probabilities": (
        Block(lambda net, x: net.head(net.stem(x).relu()).mean((2, 3)).softmax(1), stem=conv(3, 8), head=conv(8, 4, 1)),
        {"head": "its filters are the network's outputs"},
    ),
    "outputs, pooled first": (
        Block(
            lambda net, x: net.head(F.adaptive_avg_pool2d(net.stem(x), 1)).flatten(1).log_softmax(1),
            stem=conv(3, 8),
            head=conv(8, 4, 1),
        ),
        {"head": POOLED},
    ),
    "windows": (
        with_stem(Block(in_windows, conv=conv(8, 8))),
        {"unit.conv": "it runs on parts of images, such as windows, stacked as a larger batch"},
    ),
    "autocast of its own": (
        with_stem(Block(under_autocast, conv=conv(8, 8))),
        {"unit.conv": INNER},
    ),
    "in place on what is read elsewhere": (
        with_stem(Block(changed_while_held, conv=conv(8, 8), side=conv(8, 8), shift=Shift())),
        {"unit.conv": IN_PLACE},
    ),
    "in place, without a look at what it gives": (
        with_stem(Block(shifted_in_passing, conv=conv(8, 8), shift=Shift())),
        {"unit.conv": IN_PLACE},
    ),
    "functional BatchNorm of a block that gives two tensors": (
        with_stem(
            Block(
                lambda u, x: torch.mul(*u.both(x)),
                both=Block(normalised_as_well, conv=conv(8, 8), mean=torch.ones(8), variance=torch.ones(8)),
            )
        ),
        {"unit.both.conv": "batch_norm behind it is a function within Block: make it a module"},
    ),
    "functional BatchNorm": (
        with_stem(
            Block(
                lambda u, x: x + F.batch_norm(u.conv(x), u.mean, u.variance),
                conv=conv(8, 8),
                mean=torch.zeros(8),
                variance=torch.ones(8),
            )
        ),
        {"unit.conv": "batch_norm behind it is a function within Block: make it a module"},
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_filters_whose_closing_would_not_be_exact_are_left_out_with_the_reason(case):
    net, expected = LEFT_OUT[case]
    assert reasons(net) == expected
    convs = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert {conv for _, conv, *_ in listed(net, "all")} == convs - expected.keys()


@pytest.mark.parametrize("case", [case for case in LEFT_OUT if "each pixel" not in case])  # which gives no logits
def test_what_is_not_left_out_keeps_what_gating_promises(case):
    check_promises(LEFT_OUT[case][0], "all")


def test_a_module_that_convolves_twice_is_gated_as_its_last_convolution():
    net = with_stem(Block(lambda u, x: u.conv(x).relu(), conv=Filtered(8, 8)))
    assert reasons(net) == {"conv2d_1": "a function computes it within Filtered, not an nn.Conv2d"}
    assert [site[1] for site in listed(net, "all")] == ["stem", "unit.conv"]


def test_a_functional_norm_is_gated_where_its_block_gives_out_nothing_else():
    unit = Block(
        lambda u, x: F.batch_norm(u.conv(x), u.mean, u.variance).relu(),
        conv=conv(8, 8),
        mean=torch.ones(8),
        variance=torch.ones(8),
    )
    assert listed(with_stem(unit), "all") == [("stem", "stem", 0, 8, "inner"), ("unit", "unit.conv", 8, 16, "inner")]
    check_promises(with_stem(unit), "all")


def test_pooled_features_stay_pooled_where_ways_part_and_join():
    unit = Block(
        lambda u, x: x + u.two((y := u.one(x.mean((2, 3), keepdim=True))) * y.sigmoid()),
        one=conv(8, 8, 1),
        two=conv(8, 8, 1),
    )
    assert reasons(with_stem(unit)) == {"unit.one": POOLED, "unit.two": POOLED}


class Blurred(nn.Conv2d):
    """Convolves twice, first with a filter that it does not learn."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (its name in Conv2d)
        return super().forward(F.conv2d(input, torch.ones(6, 1, 3, 3) / 9, padding=1, groups=6))


@pytest.mark.parametrize("filters", [6, 9])
def test_the_first_of_its_convolutions_costs_the_same_whatever_its_gates(filters):
    two = Blurred(6, filters, 3, padding=1)
    net = Net(lambda net, x: net.end(net.two(net.one(x))), one=conv(3, 6), two=two, end=conv(filters, 8))
    graph = read_graph(net, IMAGES[:1])
    cost, gates = CostModel(graph, examine(graph, "all").sites), torch.ones(1, 6 + filters + 8)
    gates[:, 6 : 6 + filters] = 0
    assert cost(gates).item() == cost.dense - (filters * 6 + 8 * filters) * 9 * 64


def test_a_convolution_whose_hook_changes_what_it_gives_is_left_out_with_the_reason():
    net = Net(lambda net, x: net.b(net.a(x)), a=conv(3, 8), b=conv(8, 8))
    net.get_submodule("a").register_forward_hook(lambda _module, _args, output: output.round())
    assert reasons(net) == {
        "a": "a gives something else than its convolution does: put that, a hook perhaps, in a module behind it"
    }


def test_hundreds_of_additions_are_followed_to_the_convolutions_that_end_there():
    def add_up(net: Net, x: torch.Tensor) -> torch.Tensor:
        x = net.a(x)
        for _ in range(1000):  # as many functions that call each other Python does not follow
            x = x + F.relu(x)
        return x + net.b(x)

    sites = [(site.conv, site.role) for site in find_sites(Net(add_up, a=conv(3, 8), b=conv(8, 8)), IMAGES)]
    assert sites == [("b", "residual")]
