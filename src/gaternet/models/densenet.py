"""DenseNet-BC for small images (Huang et al., 2017): 3x3 stem, three dense blocks, bottlenecks, compression by half.

What the paper gates is `dense_sites`: the k new filters of each layer, before they are concatenated. A closed gate
leaves zeros there, which the BatchNorms of later layers shift.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.method import GateSite
from gaternet.models.common import initialize_, number_sites


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 conv to 4k, BN, ReLU, 3x3 conv to k; its input with the k new channels behind it."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h w"]:
        new = self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(new)))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """BN, ReLU, 1x1 conv to half of the channels, 2x2 average pooling."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Images (B, in_chans, H, W), usually 32x32, to logits (B, num_classes).

    Args:
        depth: L, layers with weights; (L - 4) / 6 dense layers in each of the three blocks.
        growth: k, the new channels of each dense layer.
        num_classes: outputs; 0 leaves the classifier out and gives the pooled features (B, num_features).
        in_chans: image channels.
    """

    def __init__(self, depth: int, growth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        for number in (1, 2, 3):
            layers = []
            for _ in range((depth - 4) // 6):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            self.add_module(f"block{number}", nn.Sequential(*layers))
            if number < 3:
                self.add_module(f"transition{number}", Transition(channels))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialize_(self)

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch outputs"]:
        x = self.conv1(images)
        for name in ("block1", "transition1", "block2", "transition2", "block3"):
            x = self.get_submodule(name)(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1), 1))


def dense_sites(backbone: DenseNet) -> list[GateSite]:
    """The new filters of each dense layer but the last of each block, in execution order.

    The paper's counts of gates leave one layer of each block out; which one is not published.
    """
    convs: list[str] = []
    for block in ("block1", "block2", "block3"):
        layers = backbone.get_submodule(block)
        assert isinstance(layers, nn.Sequential)
        convs += [f"{block}.{number}.conv2" for number in range(len(layers) - 1)]
    return number_sites(backbone, [(conv, conv, "dense") for conv in convs])
