"""CIFAR ResNets in the paper's form (its Table 1; He et al., 2016): 3x3 stem, three stages, conv+BN shortcuts.

Module names are torchvision's (`conv1`, `layer1.0.bn2`, `fc`). A gated unit is one whose last BatchNorm is a site: see
`residual_sites`. The gate acts on the filters of the unit's last conv, after its BatchNorm and before SE and addition.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.method import GateSite
from gaternet.models.common import initialize_, number_sites


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al., 2018): x * sigmoid(FC2(ReLU(FC1(pool(x))))); `reduction` narrows its middle."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Float[Tensor, "batch chans h w"]) -> Float[Tensor, "batch chans h w"]:
        scale = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.fc2(F.relu(self.fc1(scale))).sigmoid()


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convs (ResNet-20/56/110)."""

    last_conv, last_norm = "conv2", "bn2"

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int, se_reduction: int | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcite(out_channels, se_reduction) if se_reduction else nn.Identity()
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.se(self.bn2(self.conv2(y)))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convs (ResNet-164)."""

    last_conv, last_norm = "conv3", "bn3"

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int, se_reduction: int | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcite(out_channels, se_reduction) if se_reduction else nn.Identity()
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.se(self.bn3(self.conv3(y)))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class CifarResNet(nn.Module):
    """Images (B, in_chans, H, W), usually 32x32, to logits (B, num_classes).

    Args:
        block: kind of residual unit.
        depth: residual units per stage.
        stem: filters of the first conv.
        inner: filters of the units' inner convs, one number per stage.
        widths: filters of the units' last convs, one number per stage.
        num_classes: outputs; 0 leaves the classifier out and gives the pooled features (B, num_features).
        in_chans: image channels.
        se_reduction: squeeze-and-excitation in each unit, with this reduction; None for none.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depth: int,
        stem: int,
        inner: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        se_reduction: int | None = None,
    ) -> None:
        super().__init__()
        self.num_features = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        stages, in_channels = [], stem
        for stride, middle, width in zip((1, 2, 2), inner, widths, strict=True):
            units = []
            for index in range(depth):
                units.append(block(in_channels, middle, width, stride if index == 0 else 1, se_reduction))
                in_channels = width
            stages.append(nn.Sequential(*units))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        initialize_(self)

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch outputs"]:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def residual_sites(backbone: CifarResNet) -> list[GateSite]:
    """The published sites: the last conv of each residual unit, gated after its BatchNorm, in execution order."""
    units = [(name, unit) for name, unit in backbone.named_modules() if isinstance(unit, BasicBlock | Bottleneck)]
    places = [(f"{name}.{unit.last_norm}", f"{name}.{unit.last_conv}", "residual") for name, unit in units]
    return number_sites(backbone, places)
