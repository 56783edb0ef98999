"""What the graph does not show: a network that reads what filters compute past their gates is refused when it runs."""

import threading
from typing import Any

import pytest
import torch
from small_networks import IMAGES, Block, Net, conv, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gaternet import find_sites, gate


class KeepingConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        self.last = super().forward(input)
        return self.last


class KeepingNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        self.last = super().forward(input)
        return self.last


def leaking() -> Net:
    """The last convolution reads the first one's output, and that of its ReLU's successor as it was before its gate."""
    return Net(
        lambda net, x: net.c(net.b(F.relu(net.a(x))) + net.a.last),
        a=KeepingConv(3, 8, 3, padding=1),
        b=conv(8, 8),
        c=conv(8, 8),
    ).eval()


def test_a_module_that_hands_its_output_on_by_an_attribute_is_refused_and_the_backbone_stays_plain():
    backbone = leaking()
    assert [site.conv for site in find_sites(backbone, IMAGES, "all")] == ["a", "b", "c"]  # the graph shows no fault
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"closed filters of a would still be felt, for the Net reads .*: leave them"):
        gate(backbone, IMAGES, sites="all")
    assert not any(module._forward_hooks for module in backbone.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    model = gate(backbone, IMAGES, sites=lambda name, module: name != "a")  # the mend that the message names
    assert [site.conv for site in model.sites] == ["b", "c"]


@pytest.mark.parametrize("group_size", [1, 8])
def test_a_leak_of_a_unit_that_begins_as_zeros_is_found_too(group_size):
    last = KeepingNorm(8)
    nn.init.zeros_(last.weight)
    unit = Block(lambda u, x: x + u.norm(u.conv(x)), conv=conv(8, 8), norm=last)
    backbone = Net(lambda net, x: net.after(net.unit(net.stem(x)) * net.unit.norm.last), stem=conv(3, 8), unit=unit)
    backbone.add_module("after", norm())
    with pytest.raises(ValueError, match=r"closed filters of unit\.conv would still be felt"):
        gate(backbone.eval(), IMAGES, group_size=group_size)


class ScaledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return self._conv_forward(input, self.weight / self.weight.abs().max(), self.bias)


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm])
def test_weights_that_all_filters_scale_are_no_leak_and_hide_none(wrap):
    scaled = Net(lambda net, x: net.c(net.b(net.a(x))), a=conv(3, 8), b=wrap(conv(8, 8)), c=ScaledConv(8, 8, 1))
    assert gate(scaled.eval(), IMAGES, sites="all").num_gates == 24
    backbone = leaking()
    backbone.a = wrap(backbone.a)
    with pytest.raises(ValueError, match="closed filters of a would still be felt"):
        gate(backbone.eval(), IMAGES, sites="all")


class TwiceConv(nn.Conv2d):
    """Its gates act on what it computes last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return super().forward(F.conv2d(input, torch.ones(8, 8, 1, 1)))


def test_a_convolution_that_computes_several_is_not_taken_for_a_leaking_one():
    backbone = Net(lambda net, x: net.c(net.b(net.a(x))), a=conv(3, 8), b=TwiceConv(8, 8, 1), c=conv(8, 8)).eval()
    assert gate(backbone, IMAGES, sites="all").num_gates == 24


def test_a_network_that_draws_numbers_is_not_taken_for_a_leaking_one():
    backbone = Net(lambda net, x: net.b(net.a(x) * torch.rand(1)), a=conv(3, 8), b=conv(8, 8)).eval()
    assert gate(backbone, IMAGES, sites="all").num_gates == 16


def test_a_network_without_copies_is_gated_unchecked_and_stays_as_it_is():
    backbone = leaking()
    vars(backbone)["lock"] = threading.Lock()
    weight = backbone.a.weight
    assert gate(backbone, IMAGES, sites="all").num_gates == 24
    assert backbone.a.weight is weight


def test_the_weights_that_other_threads_see_stay_as_they_are(monkeypatch):
    backbone = leaking()
    weights = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    runs = []
    forward = nn.Conv2d.forward

    def watching(conv: nn.Conv2d, images: Tensor) -> Tensor:
        runs.append(all(torch.equal(parameter, weights[name]) for name, parameter in backbone.named_parameters()))
        return forward(conv, images)

    monkeypatch.setattr(nn.Conv2d, "forward", watching)
    gate(backbone, IMAGES, sites=lambda name, module: name != "a")
    assert len(runs) > 12
    assert all(runs)


def test_every_filter_is_closed_once_where_sites_have_but_one_gate():
    def body(net: Net, x: Tensor) -> Tensor:
        run = net.d(net.c(net.b(net.a(x))))
        return net.e(run + sum(part.last for part in (net.a, net.b, net.c, net.d)))

    parts = {name: KeepingConv(3 if name == "a" else 8, 8, 3, padding=1) for name in "abcd"}
    backbone = Net(body, **parts, e=conv(8, 8)).eval()
    with pytest.raises(ValueError, match="closed filters of") as refusal:
        gate(backbone, IMAGES, sites=lambda name, module: name != "e", group_size=8)
    named = str(refusal.value).removeprefix("closed filters of ").split(" would")[0]
    assert sorted(named.split(", ")) == list("abcd")


@pytest.mark.parametrize("give", [lambda out, aux: (out, aux), lambda out, aux: {"out": out, "aux": [aux]}])
def test_leaks_into_one_of_several_outputs_are_found(give, unchecked_types):
    def body(net: Net, x: Tensor) -> Any:
        out = net.fc(net.b(net.a(x)).mean((2, 3)))
        return give(out, net.fc(net.c(net.a.last).mean((2, 3))))

    parts = {"a": KeepingConv(3, 8, 3, padding=1), "b": conv(8, 8), "c": conv(8, 8), "fc": nn.Linear(8, 4)}
    network = Block(body, **parts).eval()
    with pytest.raises(ValueError, match="closed filters of a would still be felt"):
        gate(network, IMAGES, sites="all")


def test_a_network_that_fails_when_gates_close_is_left_without_hooks():
    def body(net: Net, x: Tensor) -> Tensor:
        found = net.a(x)
        if not torch.compiler.is_compiling() and found[:, :1].eq(0).all():
            raise RuntimeError("the first feature map is dead")
        return net.b(found)

    network = Net(body, a=conv(3, 8), b=conv(8, 8)).eval()
    for _ in range(2):  # not "gated already"
        with pytest.raises(RuntimeError, match="the first feature map is dead"):
            gate(network, IMAGES, sites="all")
