"""Networks that tests export, and what their files are told."""

import dataclasses

import torch
from small_networks import IMAGES, Net, conv, norm, squeeze_excite
from torch import Tensor, nn
from torch.nn import functional as F

import gaternet
from gaternet.data import Preprocessing

METADATA = {
    "classes": ["a", "b", "c", "d"],
    "preprocessing": dataclasses.asdict(Preprocessing(8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), 1.0)),
}


PIXELS = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


class Features(nn.Module):
    """A gater's extractor, (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.conv(images)).mean((2, 3))


class SoftGater(nn.Module):
    """A gater whose gates lie between 0 and 1 in evaluation, too."""

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        self.features, self.fc = Features(), nn.Linear(6, num_gates)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(self.features(images)))


def residual() -> Net:
    def body(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.bn0(net.conv0(x)))
        return F.relu(x + net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x))))))

    return Net(body, conv0=conv(3, 8), bn0=norm(), conv1=conv(8, 8), bn1=norm(), conv2=conv(8, 8), bn2=norm())


def depthwise() -> Net:
    def body(net: Net, x: Tensor) -> Tensor:
        x = F.hardswish(net.bn1(net.expand(F.relu(net.stem(x)))))
        x = net.se(F.hardswish(net.bn2(net.depthwise(x))))
        return F.adaptive_avg_pool2d(net.bn3(net.project(x)), 1)

    parts = {
        "stem": conv(3, 8),
        "expand": conv(8, 16, 1),
        "depthwise": conv(16, 16, groups=16),
        "se": squeeze_excite(16),
    }
    return Net(body, **parts, project=conv(16, 8, 1), bn1=norm(16), bn2=norm(16), bn3=norm())


def concatenated() -> Net:
    def body(net: Net, x: Tensor) -> Tensor:
        left, right = F.relu(net.bn1(net.left(x))), F.relu(net.bn2(net.right(x)))
        return F.relu(net.bn3(net.joined(torch.cat([left, x, right], 1))))

    return Net(body, left=conv(3, 5), bn1=norm(5), right=conv(3, 6), bn2=norm(6), joined=conv(14, 8), bn3=norm())


def gated(network: nn.Module, seed: int = 0) -> gaternet.GaterNet:
    """With gates that differ from image to image."""
    torch.manual_seed(seed)
    model = gaternet.gate(network.eval(), IMAGES, sites="all", gater=Features())
    nn.init.normal_(model.gater.get_submodule("fc1").weight, std=5)  # pyright: ignore[reportArgumentType]
    nn.init.normal_(model.gater.get_submodule("fc2").bias, std=0.5)  # pyright: ignore[reportArgumentType]
    return model.eval()
