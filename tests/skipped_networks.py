"""What tests of skipping share: gated networks, their plans, gates at random, and the comparison with masking."""

from typing import Any

import torch
from small_networks import IMAGES, Net, conv, norm, seeded
from torch import Tensor, nn

import gaternet
from gaternet.graph import read_graph
from gaternet.method import GaterNet
from gaternet.skipping.engines import KernelName
from gaternet.skipping.plan import Plan
from gaternet.skipping.planner import make_plan

THREE = torch.cat([IMAGES, IMAGES[:1].flip(3)])
KERNELS: list[KernelName] = ["torch", "native"]


def gated(backbone: nn.Module, images: Tensor = IMAGES, sites: Any = "all") -> GaterNet:
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return gaternet.gate(backbone.eval(), images, gater=extractor, sites=sites).eval()


def random_gates(model: GaterNet, density: float, seed: int = 0, batch: int = 3) -> Tensor:
    return (torch.rand(batch, model.num_gates, generator=seeded(seed)) < density).float()


def plan_of(model: GaterNet, images: Tensor = IMAGES) -> Plan:
    return make_plan(read_graph(model.backbone, images[:1]), model.sites)


@torch.no_grad()
def assert_skips_exactly(model: GaterNet, images: Tensor, gates: Tensor) -> None:
    expected = model.forward_gated(images, gates)
    scale = expected.abs().max().item()
    for name in KERNELS:
        fast = gaternet.skip(model, images, "slice", kernels=name)
        for count in (1, len(images)):
            found = fast.forward_gated(images[:count], gates[:count])
            torch.testing.assert_close(found, expected[:count], rtol=1e-4, atol=1e-4 * scale)


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
