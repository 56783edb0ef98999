"""Shake-Shake 26 2xKd for small images (Gastaldi, 2017): residual units of two branches, mixed at random in training.

What the paper gates is `branch_sites`: the last conv of both branches of each unit, after its BatchNorm.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.method import GateSite
from gaternet.models.common import initialize_, number_sites


class Branch(nn.Module):
    """ReLU, 3x3 conv, BN, ReLU, 3x3 conv, BN."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class Shortcut(nn.Module):
    """Two 1x1 convs of half of the filters each, the second on the image moved by a pixel; BN."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        x = F.relu(x)
        moved = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        parts = [x[:, :, :: self.stride, :: self.stride], moved[:, :, :: self.stride, :: self.stride]]
        return self.bn(torch.cat([self.conv1(parts[0]), self.conv2(parts[1])], 1))


class ShakeUnit(nn.Module):
    """The shortcut plus a mixture of both branches: half of each, or in training random shares."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch1 = Branch(in_channels, out_channels, stride)
        self.branch2 = Branch(in_channels, out_channels, stride)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else Shortcut(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        first, second = self.branch1(x), self.branch2(x)
        if not self.training:
            return self.shortcut(x) + (first + second) / 2
        shares = torch.rand(2, len(x), 1, 1, 1, device=x.device, dtype=first.dtype)
        return self.shortcut(x) + shake(first, second, shares[0], shares[1])


def shake(
    first: Float[Tensor, "batch c h w"],
    second: Float[Tensor, "batch c h w"],
    forward: Float[Tensor, "batch 1 1 1"],
    backward: Float[Tensor, "batch 1 1 1"],
) -> Float[Tensor, "batch c h w"]:
    """first * forward + second * (1 - forward), with the gradients of `backward` in its place."""
    difference = first - second
    return second + difference * backward + (difference * (forward - backward)).detach()


class ShakeShake(nn.Module):
    """Images (B, in_chans, H, W), usually 32x32, to logits (B, num_classes).

    Args:
        width: K, filters of the stem and of the first stage's convs; the others have twice and four times as many. The
            original's stem has 16: that of the paper must be wider, by its counts of parameters.
        num_classes: outputs; 0 leaves the classifier out and gives the pooled features (B, num_features).
        in_chans: image channels.
    """

    def __init__(self, width: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for number, (factor, stride) in enumerate(((1, 1), (2, 2), (4, 2)), start=1):
            units = []
            for index in range(4):
                units.append(ShakeUnit(channels, factor * width, stride if index == 0 else 1))
                channels = factor * width
            self.add_module(f"layer{number}", nn.Sequential(*units))
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialize_(self)

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch outputs"]:
        x = self.bn1(self.conv1(images))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), 1), 1))


def branch_sites(backbone: ShakeShake) -> list[GateSite]:
    """The published sites: the last conv of both branches of each unit, after its BatchNorm, in execution order."""
    branches = [name for name, module in backbone.named_modules() if isinstance(module, Branch)]
    return number_sites(backbone, [(f"{name}.bn2", f"{name}.conv2", "residual") for name in branches])
