"""Skipping where an image makes weights, biases or norms, and where precisions are mixed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipped_networks import THREE, assert_skips_exactly, gated, random_gates
from small_networks import IMAGES, Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

import gaternet
from gaternet.method import GaterNet
from gaternet.skipping import Skipper


def grouped(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each image under weights and a bias of its own."""
    bias = None if bias is None else bias.reshape(-1)
    return F.conv2d(y.reshape(1, -1, *y.shape[2:]), weight, bias, groups=len(y)).reshape(len(y), -1, *y.shape[2:])


VARYING: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {  # of what a convolution gives, and its means
    "bias of a linear layer": lambda net, y, h: y * F.linear(h, net.linear.weight, net.other(h))[:, :, None, None],
    "the same, normalised": lambda net, y, h: (
        y * net.norm(F.linear(h, net.linear.weight, net.other(h)))[:, :, None, None]
    ),
    "a convolution of one filter": lambda net, y, h: y * grouped(y, net.other(h)[:, :, None, None]),
    "bias of a convolution": lambda net, y, h: grouped(y, net.last.weight.repeat(len(y), 1, 1, 1), net.linear(h)),
}


@pytest.mark.parametrize("name", VARYING)
def test_weights_that_the_image_makes_are_kept(name):
    def body(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x).relu()
        return VARYING[name](net, y, y.mean((2, 3)))

    parts = {"conv": conv(3, 8), "last": conv(8, 8, 1), "linear": nn.Linear(8, 8), "other": nn.Linear(8, 8)}
    model = gated(Net(body, **parts, norm=nn.BatchNorm1d(8)), sites=lambda name, module: name == "conv")
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


def test_norms_over_the_batch_are_refused():
    """Not in the gater, which then runs as it is."""
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model = gated(Net(lambda net, x: net.last(net.norm(net.conv(x))), conv=conv(3, 8), norm=norm, last=conv(8, 8)))
    with pytest.raises(
        ValueError, match=r"norm normalises with the statistics of the batch.*give it running statistics"
    ):
        gaternet.skip(model, IMAGES)
    model = gated(Net(lambda net, x: net.last(net.conv(x)), conv=conv(3, 8), last=conv(8, 8)))
    gater = nn.Sequential(conv(3, 8), norm, nn.Flatten(), nn.Linear(512, model.num_gates), Hard())
    model = GaterNet(model.ungate(), gater, model.sites)
    fast = gaternet.skip(model, IMAGES, "slice")
    with torch.no_grad():
        torch.testing.assert_close(fast(IMAGES), model(IMAGES))


class Hard(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return (logits > 0).to(logits.dtype)


def test_a_norm_whose_scales_the_image_makes_stays_by_itself():
    def body(net: Any, x: Tensor) -> Tensor:
        scales = net.shrink(x).flatten()  # of a single image
        return F.batch_norm(net.conv(x), net.mean, net.var, scales, scales)

    parts = {"conv": conv(3, 8), "shrink": nn.Conv2d(3, 8, 8), "mean": torch.rand(8), "var": torch.rand(8)}
    model = gated(Net(body, **parts), IMAGES[:1], sites=lambda name, module: name == "conv")
    assert_skips_exactly(model, IMAGES[:1], random_gates(model, 0.5, batch=1))


def test_a_norm_of_rows_stays_behind_its_linear_layer():
    """It has a scale for each filter, and the layer a row of weights for each feature: as many."""
    norm = nn.BatchNorm1d(8)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        assert tensor is not None
        nn.init.normal_(tensor)
    parts = {"conv": conv(3, 8), "linear": nn.Linear(64, 8), "norm": norm}
    model = gated(Net(lambda net, x: net.norm(net.linear(net.conv(x).flatten(2)))[..., None], **parts))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a sum": lambda net, x: net.low(net.conv(x).bfloat16().add_(net.other(x))).float(),
    "a sum of constants": lambda net, x: net.low(
        net.conv(x).bfloat16() + net.pixels.bfloat16().add_(net.pixels)
    ).float(),
    "bits": lambda net, x: net.last((net.conv(x).view(torch.int32) >> 16 << 16).view(torch.float32)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_writes_in_place_keeps_its_precision(name, tmp_path):
    parts = {"conv": conv(3, 8), "other": conv(3, 8), "last": conv(8, 8), "low": conv(8, 8).bfloat16()}
    model = gated(Net(IN_PLACE[name], **parts, pixels=torch.rand(1, 8, 8, 8)))
    gates, fast = random_gates(model, 0.5), gaternet.skip(model, THREE, "slice")
    with torch.no_grad():
        expected = model.forward_gated(THREE, gates)
    torch.testing.assert_close(fast.forward_gated(THREE, gates), expected, rtol=1e-4, atol=1e-4)
    if name != "bits":  # shifts are not for files
        fast.save(tmp_path)
        torch.testing.assert_close(Skipper.load(tmp_path).forward_gated(THREE, gates), expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_twin_that_makes_a_new_tensor_is_refused():
    parts = {"conv": conv(3, 8), "last": conv(8, 8), "step": torch.tensor(0.5)}
    model = gated(Net(lambda net, x: net.last(net.conv(x).relu().floor_divide_(net.step)), **parts))
    with pytest.raises(ValueError, match=r"floor_divide_.*leave its underscore out"):
        gaternet.skip(model, IMAGES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_may_be_more_precise_than_what_they_normalise(dtype):
    layers = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8))
    model = gated(Net(lambda net, x: net.layers(x), layers=layers)).to(dtype)
    for module in layers:
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    images, gates = THREE.to(dtype), random_gates(model, 0.5).to(dtype)
    with torch.no_grad():
        expected = model.forward_gated(images, gates)
    found = gaternet.skip(model, images, "slice").forward_gated(images, gates)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
