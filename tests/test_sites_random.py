"""Random networks keep what gating promises, and the check of that fails where it should."""

from typing import Any

import pytest
import torch
from families import check_dead_channels, check_gates, small_gater_net, unsettle_
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import LINKS, LayerNorm2d, chain_of, layers
from site_checks import check_promises, listed
from small_networks import IMAGES, Block, Net, conv, norm, with_stem
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet import find_sites
from gaternet.cost import CostModel
from gaternet.graph import read_graph
from gaternet.method import GateSite
from gaternet.sites import examine


@pytest.mark.parametrize("name", LINKS)
def test_every_link_of_random_networks_keeps_what_gating_promises(name):
    check_promises(chain_of([name, "conv alone"]), "all")


@given(names=st.lists(st.sampled_from(sorted(LINKS)), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_random_networks_keep_what_gating_promises(names):
    net = chain_of(names)
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for report in check_promises(net, "residual", "all"):  # each convolution is gated or left out, once
        assert sorted([*(site.conv for site in report.sites), *report.left_out]) == sorted(convs)


@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm2d"])
def test_the_check_fails_where_a_site_lies_behind_what_mixes_channels(name):
    mixer = nn.GroupNorm(2, 8) if name == "GroupNorm" else LayerNorm2d(8)
    net = Net(lambda net, x: net.mixer(net.conv(x)), conv=conv(3, 8), mixer=mixer).eval()
    unsettle_(net)
    wrong = small_gater_net(net, [GateSite("mixer", "conv", 0, 8)])
    with pytest.raises(AssertionError, match="a closed filter still matters"):
        check_gates(wrong, IMAGES, {})
    wrong.ungate()
    check_gates(small_gater_net(net, [GateSite("conv", "conv", 0, 8)]), IMAGES, {})


def test_the_check_fails_where_a_site_names_another_convolution():
    net = Net(lambda net, x: net.two(net.one(x)), one=conv(3, 8), two=conv(8, 8)).eval()
    with pytest.raises(AssertionError, match="a closed filter still matters"):
        check_gates(small_gater_net(net, [GateSite("two", "one", 0, 8)]), IMAGES, {})


def test_the_check_fails_where_dead_channels_are_revived_by_a_batch_norm():
    net = Net(lambda net, x: net.two(net.bn(net.one(x)).relu()), one=conv(3, 8), bn=norm(), two=conv(8, 8)).eval()
    before, behind = [GateSite("one", "one", 0, 8)], [GateSite("bn", "one", 0, 8)]
    graph = read_graph(net, IMAGES)
    model = small_gater_net(net, before)
    check_dead_channels(model, CostModel(graph, before), IMAGES)
    with pytest.raises(AssertionError, match="two reads what is said to be dead"):
        check_dead_channels(model, CostModel(graph, behind), IMAGES)


def test_two_convolutions_that_are_multiplied_are_both_accounted_for():
    net = Net(lambda net, x: net.bn(net.one(x) * net.two(x)), one=conv(3, 8), two=conv(3, 8), bn=norm())
    report = examine(read_graph(net, IMAGES), "all")
    assert {site.conv for site in report.sites} | report.left_out.keys() == {"one", "two"}


def test_a_batch_norm_behind_global_pooling_is_no_site():
    net = Block(
        lambda net, x: net.fc(net.bn(net.conv(x).mean((2, 3)))),
        conv=conv(3, 8),
        bn=nn.BatchNorm1d(8),
        fc=nn.Linear(8, 4),
    )
    check_promises(net, "all")


def test_a_clamp_with_tensor_bounds_is_read():
    net = Net(lambda net, x: net.conv(x).clamp(min=net.floor), conv=conv(3, 8), floor=torch.zeros(8, 1, 1))
    check_promises(net, "all")


def test_a_shortcut_around_pooling_makes_no_convolution_residual():
    net = Net(lambda net, x: net.last(F.avg_pool2d(y := net.stem(x), 3, 1, 1) + y), stem=conv(3, 8), last=conv(8, 8))
    assert listed(net, "residual") == [("stem", "stem", 0, 8, "inner"), ("last", "last", 8, 16, "inner")]


def test_the_last_convolutions_of_three_branches_are_all_residual():
    unit = Block(
        lambda u, x: x + (u.one(x) + u.two(x) + u.three(x)),
        one=layers(conv(8, 4), conv(4, 8)),
        two=layers(conv(8, 4), conv(4, 8)),
        three=layers(conv(8, 4), conv(4, 8)),
    )
    assert [name for name, *_ in listed(with_stem(unit))] == ["unit.one.1", "unit.two.1", "unit.three.1"]


def body_of_two(**parts: nn.Module) -> dict[str, nn.Module]:
    return {"layers": layers(conv(8, 4), nn.ReLU(), conv(4, 8)), **parts}


RESIDUAL: dict[str, tuple[nn.Module, list[str]]] = {  # of each unit, its last convolutions
    "the input added twice": (Block(lambda u, x: x + (x + u.layers(x)), **body_of_two()), ["unit.layers.2"]),
    "a unit for a shortcut": (
        Block(lambda u, x: u.layers(x) + (x + u.short(x)), **body_of_two(short=conv(8, 8, 1))),
        ["unit.short", "unit.layers.2"],
    ),
    "weights of the same shape": (
        Block(lambda u, x: x + u.layers(x) * u.mask(x).sigmoid(), **body_of_two(mask=conv(8, 8))),
        ["unit.layers.2"],
    ),
    "a mean of the image": (Block(lambda u, x: u.layers(x) + x.mean((2, 3), keepdim=True), **body_of_two()), []),
}


@pytest.mark.parametrize("unit", RESIDUAL)
def test_residual_convolutions_are_the_last_of_a_units_own(unit):
    net, expected = with_stem(RESIDUAL[unit][0]), RESIDUAL[unit][1]
    assert sorted(name for name, *_, role in listed(net, "all") if role == "residual") == sorted(expected)


def test_what_lies_before_a_unit_is_no_shortcut_of_it():
    unit = Block(lambda u, x: u.layers(x) + (x + u.short(x)), **body_of_two(short=conv(8, 8, 1)))
    long = Block(lambda u, x: u.layers(x) + u.short(x), **body_of_two(short=conv(8, 8, 1)))
    roles = [{name: role for name, *_, role in listed(with_stem(body), "all")} for body in (unit, long)]
    assert roles[0] == {
        "stem": "inner",
        "unit.layers.0": "inner",
        "unit.layers.2": "residual",
        "unit.short": "residual",
    }
    assert roles[1] == roles[0] | {"unit.short": "shortcut"}


class TwoNames(nn.Module):
    """Its layers have two names each, and run by the second, as in networks whose head was cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.fc = conv(3, 8), norm(8), conv(8, 8), nn.Linear(8, 4)
        self.body = nn.Sequential(self.first, self.norm, nn.ReLU(), self.second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def test_a_layer_with_two_names_goes_by_its_first():
    sites = find_sites(TwoNames().eval(), IMAGES, "all")
    assert [(site.conv, site.name) for site in sites] == [("first", "norm"), ("second", "second")]
    check_promises(TwoNames().eval(), "all")


@pytest.mark.parametrize("pool", ["mean", "amax", "sum"])
def test_channels_are_followed_through_pooling_of_one_side(pool):
    """The image's columns become channels: 8 of them, as many as there are filters."""

    def body(net: Any, x: Tensor) -> Tensor:
        return net.last(getattr(net.conv(x), pool)(2).permute(0, 2, 1).unsqueeze(3))

    check_promises(Net(body, conv=conv(3, 8), last=nn.Conv2d(8, 8, 1)).eval(), "all")
