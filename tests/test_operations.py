"""What gaternet believes of PyTorch's operations, as PyTorch computes them."""

from typing import Any

import pytest
import torch
from small_networks import seeded
from torch import Tensor

from gaternet.graph import _KEEP, _SHIFT
from gaternet.skipping.saved import _is_allowed
from gaternet.skipping.stacking import _BY_IMAGE

CHANNELS = 4
X = torch.randn(3, CHANNELS, 8, 8, generator=seeded(0))
WEIGHTS = [torch.rand(CHANNELS, generator=seeded(number)) + 0.5 for number in range(4)]
FILTERS = torch.randn(6, CHANNELS, 3, 3, generator=seeded(4))
ARGUMENTS: dict[str, tuple[Any, ...]] = {  # behind the tensor; of what needs none, none
    "prelu": (WEIGHTS[0],),
    "_prelu_kernel": (WEIGHTS[0].reshape(-1, 1, 1),),
    "dropout": (0.5, False),
    "feature_dropout": (0.5, False),
    "clamp": (-0.5, 0.5),
    "max_pool2d": ([3, 3], [2, 2], [1, 1]),
    "avg_pool2d": ([2, 2],),
    "adaptive_avg_pool2d": ([2, 2],),
    "adaptive_max_pool2d": ([2, 2],),
    "upsample_nearest2d": ([16, 16],),
    "upsample_bilinear2d": ([5, 5], False),
    "_upsample_bilinear2d_aa": ([5, 5], False),
    "upsample_bicubic2d": ([16, 16], False),
    "to": (torch.float64,),
    "reflection_pad2d": ([1, 1, 1, 1],),
    "replication_pad2d": ([1, 1, 1, 1],),
    "pad": ([1, 1, 1, 1],),
    "constant_pad_nd": ([1, 1, 1, 1],),
    "batch_norm": (*WEIGHTS, False, 0.1, 1e-5, False),
    "instance_norm": (*WEIGHTS[:2], None, None, True, 0.1, 1e-5, False),
    "group_norm": (2, *WEIGHTS[:2]),
    "linear": (torch.randn(5, 8, generator=seeded(5)),),
    "conv2d": (FILTERS,),
    "convolution": (FILTERS, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "pixel_shuffle": (2,),
    "pixel_unshuffle": (2,),
    "channel_shuffle": (2,),
}
ELSEWHERE = {"getitem"}  # which is Python's


def run(name: str, x: Tensor) -> Tensor:
    found = getattr(torch.ops.aten, name)(x, *ARGUMENTS.get(name, ()))
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", sorted(_KEEP | _SHIFT))
def test_what_acts_on_each_channel_by_itself_does(name):
    before = run(name, X)
    for channel in range(CHANNELS):
        changed = X.clone()
        changed[:, channel] = 0
        after = run(name, changed)
        others = [other for other in range(CHANNELS) if other != channel]
        assert torch.equal(after[:, others], before[:, others])
        assert bool(after[:, channel].any()) == (name in _SHIFT)


@pytest.mark.parametrize("name", sorted(_BY_IMAGE - ELSEWHERE))
def test_what_acts_on_each_image_by_itself_does(name):
    """Up to rounding: libraries choose their algorithms by the size of what they get."""
    each = [run(name, image) for image in X.abs().split(1)]  # sqrt is among them
    torch.testing.assert_close(run(name, X.abs()), torch.cat(each), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", sorted((_KEEP | _SHIFT | _BY_IMAGE) - ELSEWHERE))
def test_what_is_known_may_be_in_a_file(name):
    packet = getattr(torch.ops.aten, name)
    allowed = any(_is_allowed(getattr(packet, overload)) for overload in packet.overloads())
    assert allowed == (name not in {"_prelu_kernel", "_upsample_bilinear2d_aa"})  # PyTorch's own, within other ones
