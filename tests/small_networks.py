"""Tiny networks for the tests, each written on a few lines as a function of its parts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """`body(block, x)`; the parts, modules or parameters or tensors (its buffers), are the block's attributes."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # parts are what the test made them
            ...


class Net(Block):
    """A block with 8 channels, and a classifier of 4 classes behind it."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__(body, **parts)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(super().forward(x).mean((2, 3)))


class FusedNorm(nn.BatchNorm2d):
    """Normalises and activates, as timm's BatchNormAct2d does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return F.relu(super().forward(input))


def conv(in_channels: int, out_channels: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Keeps the image's size."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **options)


def norm(channels: int = 8) -> nn.BatchNorm2d:
    """As after some training: it turns zeros into something else."""
    made = nn.BatchNorm2d(channels)
    for tensor in (made.weight, made.bias, made.running_mean):
        assert tensor is not None
        nn.init.normal_(tensor, 0.5, 0.5)
    return made


def squeeze_excite(channels: int = 8) -> Block:
    return Block(
        lambda se, x: x * se.fc2(F.relu(se.fc1(x.mean((2, 3), keepdim=True)))).sigmoid(),
        fc1=conv(channels, 2, 1),
        fc2=conv(2, channels, 1),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_stem(unit: nn.Module) -> Net:
    """Reads the image with a convolution of 8 filters; what it gives is used by whatever the unit holds first."""
    return Net(lambda net, x: net.unit(net.stem(x)), stem=conv(3, 8), unit=unit)


PIXELS = torch.rand(2, 3, 64, 64, generator=seeded(1))  # for networks that shrink them 32 times


def custom() -> Net:
    """A stem of 8 filters and two residual units, the first of which runs 6 inner ones: 16 gates."""
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.two(net.one(net.stem(x))),
        stem=nn.Sequential(conv(3, 8), norm(), nn.ReLU()),
        one=Block(
            lambda u, x: x + u.layers(x), layers=nn.Sequential(conv(8, 6), norm(6), nn.ReLU(), conv(6, 8), norm())
        ),
        two=Block(lambda u, x: x + u.layers(x), layers=nn.Sequential(conv(8, 8), norm())),
    ).eval()


def features(channels: int = 3, width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def replaced(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    module.set_submodule(name, part)
    return module
