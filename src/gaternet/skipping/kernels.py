"""Kernels in plain PyTorch: they run on any device, and faster ones are tested against them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gaternet.skipping.plan import DENSE, Plan, Step

MULTIPLE = 16  # compact tensors have room for a multiple of this many channels


@dataclass(frozen=True)
class Live:
    """Which channels of each pattern are open, for each image of a batch.

    A compact tensor is (B, room, H, W): an image's open channels in ascending order, then fillers, whose values do not
    matter.

    Attributes:
        counts: number of open channels, (B, patterns), int32.
        numbers: their numbers, pattern behind pattern, each with a place for all its channels, (B, places), int32.
        room: channels of a compact tensor of each pattern.
    """

    counts: Tensor
    numbers: Tensor
    room: list[int]


class Kernels:
    """Convolutions with gathered weights, image by image, and moves between dense and compact tensors.

    Args:
        plan: whose patterns and weights to work with.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sizes = [len(pattern) for pattern in plan.patterns]
        self.offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.fixed = [not (pattern >= 0).any() for pattern in plan.patterns]  # whether they are the same for all gates
        self.bounds = torch.tensor([*self.offsets, sum(self.sizes)], device=plan.device)
        self.columns = torch.cat([*plan.patterns, torch.zeros(0, dtype=torch.long, device="cpu")]).to(plan.device)
        self.prepare()

    def prepare(self) -> None:
        """Lay the weights out as the kernels want them: here with a row and a column of zeros, which fillers take."""
        self._weights = {s.out: _padded(s) for s in self.plan.steps if s.conv and s.conv.groups == 1}

    def open_channels(self, gates: Tensor) -> Live:
        """What gates (B, C) leave open."""
        ends = gates.new_tensor([0, 1]).expand(len(gates), 2)
        extended = torch.cat([gates, ends], 1)  # ALIVE is the last one, NEVER that before
        alive = extended[:, self.columns] > 0  # (B, places)
        before = F.pad(alive.cumsum(1), (1, 0))
        counts = before[:, self.bounds].diff(dim=1)
        starts, sizes = (
            values.repeat_interleave(self.bounds.diff()) for values in (self.bounds[:-1], self.bounds.diff())
        )
        local = torch.arange(len(sizes), device=sizes.device) - starts
        # Each open channel's number goes to the place after those before it; what is left holds the number of channels.
        places = torch.where(alive, before[:, :-1] - before[:, starts] + starts, len(sizes))
        numbers = F.pad(sizes, (0, 1)).repeat(len(gates), 1).scatter_(1, places, local.expand_as(places))[:, :-1]
        most = counts.amax(0).tolist()
        return Live(counts.int(), numbers.int().contiguous(), [self.room(m, p) for p, m in enumerate(most)])

    def room(self, most: int, pattern: int) -> int:
        """Channels that a compact tensor needs where an image has at most `most` open ones."""
        if self.fixed[pattern]:
            return most
        return min(self.sizes[pattern], max(1, -(-most // MULTIPLE)) * MULTIPLE)

    def conv(self, step: Step, x: Tensor, reads: int, live: Live, relu: bool) -> Tensor:
        """Convolution of x, whose pattern is `reads`, with the step's weights."""
        assert step.conv is not None
        spec = step.conv
        outputs = []
        for i in range(len(x)):
            weight, bias = self._weights[step.out]
            rows, columns = self._places(step.filters, live, i), self._places(reads, live, i)
            weight = weight[:-1] if rows is None else weight[rows]
            weight = weight[:, :-1] if columns is None else weight[:, columns]
            if bias is not None:
                bias = bias[:-1] if rows is None else bias[rows]
            image = x[i : i + 1, : weight.shape[1]]
            outputs.append(F.conv2d(image, weight, bias, spec.stride, spec.padding, spec.dilation))
        value = self._stacked(outputs, step.filters, live)
        return value.relu_() if relu else value

    def depthwise(self, step: Step, x: Tensor, live: Live, relu: bool) -> Tensor:
        """Depthwise convolution of x, which has the step's pattern."""
        assert step.conv is not None
        spec = step.conv
        outputs = []
        for i in range(len(x)):
            index = self._places(step.filters, live, i)
            assert index is not None
            index = index.clamp(max=len(spec.weight) - 1)
            weight, bias = spec.weight[index], None if spec.bias is None else spec.bias[index]
            image = x[i : i + 1, : len(index)]
            outputs.append(F.conv2d(image, weight, bias, spec.stride, spec.padding, spec.dilation, len(index)))
        value = self._stacked(outputs, step.filters, live)
        return value.relu_() if relu else value

    def grouped(self, step: Step, x: Tensor, relu: bool) -> Tensor:
        """Convolution in groups of a dense x, in full."""
        assert step.conv is not None
        spec = step.conv
        if spec.is_scale:
            value = x * spec.weight[:, 0]
            value = value if spec.bias is None else value + spec.bias[:, None, None]
        else:
            value = F.conv2d(x, spec.weight, spec.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        return value.relu_() if relu else value

    def expand(self, x: Tensor, pattern: int, live: Live) -> Tensor:
        """A compact x as a dense one, (B, channels, H, W), zeros in the closed channels."""
        dense = x.new_zeros(len(x), self.sizes[pattern], *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        return self.add_open(dense, x, pattern, live, relu=False)

    def compress(self, x: Tensor, pattern: int, live: Live) -> Tensor:
        """The open channels of a dense x, as a compact one."""
        index = self._numbers(pattern, live).clamp(max=x.shape[1] - 1)
        index = index[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return x.gather(1, index).contiguous(memory_format=torch.channels_last)

    def add_open(self, dense: Tensor, x: Tensor, pattern: int, live: Live, relu: bool) -> Tensor:
        """Add a compact x to the open channels of a dense tensor, in place."""
        for i, index in self._open(pattern, live):
            dense[i].index_add_(0, index, x[i, : len(index)])
        return dense.relu_() if relu else dense

    def cat(self, values: Sequence[Tensor], patterns: Sequence[int], pattern: int, live: Live) -> Tensor:
        """Tensors behind each other, some compact, as a compact one of a pattern of its own."""
        whole = values[0].new_zeros(len(values[0]), live.room[pattern], *values[0].shape[2:])
        whole = whole.contiguous(memory_format=torch.channels_last)
        counts = live.counts.tolist()
        for i in range(len(whole)):
            start = 0
            for value, part in zip(values, patterns, strict=True):
                count = value.shape[1] if part == DENSE else counts[i][part]
                whole[i, start : start + count] = value[i, :count]
                start += count
        return whole

    def _numbers(self, pattern: int, live: Live) -> Tensor:
        """The channels' numbers that fill the room of a pattern, (B, room)."""
        start = self.offsets[pattern]
        return live.numbers[:, start : start + live.room[pattern]].long()

    def _places(self, pattern: int, live: Live, i: int) -> Tensor | None:
        """Image i's open channels and its fillers: their number depends on this image alone."""
        if pattern == DENSE:
            return None
        count = self.room(int(live.counts[i, pattern]), pattern)
        return self._numbers(pattern, live)[i, :count]

    def _stacked(self, outputs: list[Tensor], pattern: int, live: Live) -> Tensor:
        """Images' compact tensors, each brought to the common room."""
        if pattern == DENSE or len(outputs) == 1:
            return torch.cat(outputs)
        room = live.room[pattern]
        return torch.cat([F.pad(output, (0, 0, 0, 0, 0, room - output.shape[1])) for output in outputs])

    def _open(self, pattern: int, live: Live) -> Iterator[tuple[int, Tensor]]:
        for i, count in enumerate(live.counts[:, pattern].tolist()):
            yield i, self._numbers(pattern, live)[i, :count]


def _padded(step: Step) -> tuple[Tensor, Tensor | None]:
    assert step.conv is not None
    weight = F.pad(step.conv.weight, (0, 0, 0, 0, 0, 1, 0, 1))
    return weight, None if step.conv.bias is None else F.pad(step.conv.bias, (0, 1))
