"""The network on which the method is tested."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.method import Gater, GateSite

SITES = (GateSite("bn1", "conv1", 0, 5), GateSite("bn2", "conv2", 5, 12))


class Toy(nn.Module):
    """Two convolutions with BatchNorm, 5 and 7 filters, all gated; 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 4)
        for norm in (self.bn1, self.bn2):  # a shift, that leaks if a gate sits before it
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def extractor() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gater(**options: Any) -> Gater:
    return Gater(extractor(), 6, 12, bottleneck=3, **options)
