"""Links of which tests build networks at random, and what of them is used elsewhere too."""

from collections.abc import Callable
from typing import Any

import torch
from small_networks import Block, FusedNorm, Net, conv, norm, squeeze_excite
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(Block):
    """Every pixel looks at every pixel."""

    def __init__(self) -> None:
        super().__init__(attend, q=conv(8, 8, 1), k=conv(8, 8, 1), v=conv(8, 8, 1), out=conv(8, 8, 1))


def attend(block: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).flatten(2) for part in (block.q, block.k, block.v))  # (B, 8, H W)
    weights = (q.transpose(1, 2) @ k).softmax(-1)  # (B, H W, H W)
    return block.out((v @ weights).reshape(x.shape))


def in_windows(block: Any, x: Tensor) -> Tensor:
    """The convolution sees windows of 4 by 4 pixels as images of their own."""
    b, c, h, w = x.shape
    windows = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
    windows = block.conv(windows).reshape(b, h // 4, w // 4, c, 4, 4)
    return windows.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def shuffled(block: Any, x: Tensor) -> Tensor:
    """ShuffleNetV2's unit: half of the channels pass by, then the halves are mixed."""
    left, right = x.chunk(2, 1)
    x = torch.cat([left, block.right(right)], 1)
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


def layers(*given: nn.Module) -> nn.Sequential:
    return nn.Sequential(*given)


LINKS: dict[str, Callable[[], nn.Module]] = {  # from 8 channels to 8 channels
    "conv and BatchNorm": lambda: layers(conv(8, 8), norm(), nn.ReLU()),
    "conv and fused norm": lambda: layers(conv(8, 8, bias=False), FusedNorm(8)),
    "conv alone": lambda: layers(conv(8, 8), nn.GELU()),
    "conv and shift": lambda: layers(conv(8, 8), nn.Sigmoid(), conv(8, 8)),
    "residual": lambda: Block(
        lambda u, x: (x + u.second(u.first(x).relu())).relu(),
        first=layers(conv(8, 6), norm(6)),
        second=layers(conv(6, 8), norm()),
    ),
    "residual in place": lambda: Block(
        lambda u, x: u.layers(x).add_(x).relu_(), layers=layers(conv(8, 5), nn.ReLU(True), conv(5, 8), norm())
    ),
    "residual with SE": lambda: Block(
        lambda u, x: x + u.layers(x), layers=layers(conv(8, 8), norm(), nn.SiLU(), squeeze_excite(), conv(8, 8), norm())
    ),
    "pre-activation": lambda: Block(
        lambda u, x: x + u.layers(x), layers=layers(norm(), nn.ReLU(), conv(8, 6), norm(6), nn.ReLU(), conv(6, 8))
    ),
    "inverted residual": lambda: Block(
        lambda u, x: x + u.layers(x),
        layers=layers(
            conv(8, 12, 1), norm(12), nn.Hardswish(), conv(12, 12, groups=12), norm(12), nn.ReLU6(), conv(12, 8, 1)
        ),
    ),
    "projection": lambda: Block(
        lambda u, x: u.main(x) + u.shortcut(x),
        main=layers(conv(8, 6), norm(6), nn.ReLU(), conv(6, 8)),
        shortcut=layers(conv(8, 8, 1), norm()),
    ),
    "depthwise": lambda: conv(8, 8, groups=8, bias=False),
    "depthwise, two filters a channel": lambda: layers(conv(8, 16, groups=8), nn.RReLU(), conv(16, 8, 1)),
    "depthwise, two channels a filter": lambda: layers(conv(8, 16, 1), conv(16, 8, groups=8), nn.ReLU()),
    "grouped": lambda: layers(conv(8, 12, groups=4), norm(12), nn.LeakyReLU(), conv(12, 8, groups=2)),
    "branches": lambda: Block(
        lambda u, x: torch.cat([u.one(x), u.two(x)], 1), one=layers(conv(8, 3), norm(3)), two=conv(8, 5, 1)
    ),
    "twice": lambda: Block(
        lambda u, x: u.down(torch.cat([u.more(x)] * 2, 1)), more=layers(conv(8, 6), nn.ReLU()), down=conv(12, 8)
    ),
    "dense": lambda: Block(
        lambda u, x: u.down(torch.cat([x, u.more(x)], 1)), more=layers(norm(), nn.ReLU(), conv(8, 4)), down=conv(12, 8)
    ),
    "shuffle": lambda: Block(shuffled, right=layers(conv(4, 4), norm(4), nn.ReLU())),
    "product": lambda: Block(lambda u, x: u.one(x) * u.two(x), one=layers(conv(8, 8), nn.ReLU()), two=conv(8, 8)),
    "mask": lambda: Block(lambda u, x: x * u.layers(x), layers=layers(conv(8, 1), nn.Sigmoid())),
    "max pooling": lambda: nn.MaxPool2d(3, 1, 1),
    "padding": lambda: layers(nn.ZeroPad2d(1), nn.AvgPool2d(3, 1)),
    "GroupNorm": lambda: layers(conv(8, 8), nn.GroupNorm(4, 8), nn.ReLU()),
    "LayerNorm": lambda: layers(LayerNorm2d(8), conv(8, 8, 1)),
    "windows": lambda: Block(in_windows, conv=conv(8, 8)),
    "attention": Attention,
}


def chain_of(names: list[str]) -> Net:
    return Net(lambda net, x: net.links(net.stem(x)), stem=conv(3, 8), links=layers(*[LINKS[name]() for name in names]))
