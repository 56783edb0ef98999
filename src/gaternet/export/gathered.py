"""The skipping form: a backbone that gathers its open filters, in operations that exporters know, one image at a time.

It carries out the plan that `gaternet.skip` makes. How many filters are open is known only when it runs: the tensors'
sizes are symbols when it is traced, each at least two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.graph import read_graph
from gaternet.method import GaterNet
from gaternet.skipping.kernels import Kernels, Live
from gaternet.skipping.plan import DENSE, NEVER, Call, Step
from gaternet.skipping.planner import make_plan
from gaternet.skipping.program import Run
from gaternet.wrapping import require_closed

_POOL = torch.ops.aten.adaptive_avg_pool2d.default


@dataclass(frozen=True)
class LiveOfOne(Live):
    """Which channels of each pattern are open, for one image.

    Attributes:
        indices: their numbers, for each pattern. Fewer than two are filled up with the number of channels: there,
            weights have a row and a column of zeros, and compact tensors a channel of zeros.
    """

    indices: list[Tensor]


class TraceableKernels(Kernels):
    """`Kernels` for one image, without a look at a tensor's values."""

    def prepare(self) -> None:
        """Give the weights a row of zeros if filters may be closed, and a column if channels that they read may."""
        self._weights = {}
        for step in self.plan.steps:
            if step.conv is not None and step.conv.groups == 1:
                row, column = step.filters != DENSE, self.plan.pattern_of[step.sources[0]] != DENSE
                weight, bias = F.pad(step.conv.weight, (0, 0, 0, 0, 0, int(column), 0, int(row))), step.conv.bias
                self._weights[step.out] = weight, None if bias is None else F.pad(bias, (0, int(row)))

    def open_channels(self, gates: Tensor) -> LiveOfOne:
        """What the gates (1, C) leave open."""
        extended = torch.cat([gates[0], gates.new_tensor([0, 1])])  # ALIVE is the last one, NEVER that before
        indices = []
        for pattern, fixed in zip(self.plan.patterns, self.fixed, strict=True):
            if fixed:
                indices.append((pattern != NEVER).nonzero()[:, 0])
                continue
            alive = extended[pattern] > 0
            filler = alive.sum() < torch.tensor([1, 2])  # torch 2.11 traces convolutions of two filters and more
            index = torch.cat([alive, filler]).nonzero()[:, 0]
            torch._check(index.shape[0] >= 2)
            torch._check(index.shape[0] <= max(2, len(pattern)))
            indices.append(index.clamp(max=len(pattern)))
        return LiveOfOne(gates, gates, [], indices)

    def conv(self, step: Step, x: Tensor, reads: int, live: Live, relu: bool) -> Tensor:
        assert step.conv is not None
        spec, (weight, bias) = step.conv, self._weights[step.out]
        if step.filters != DENSE:
            index = _open(step.filters, live)
            weight, bias = weight.index_select(0, index), None if bias is None else bias.index_select(0, index)
        if reads != DENSE:
            weight = weight.index_select(1, _open(reads, live))
        value = F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation)
        return value.relu() if relu else value

    def depthwise(self, step: Step, x: Tensor, live: Live, relu: bool) -> Tensor:
        """In full, for a file must say how many groups there are."""
        dense = self.grouped(step, self.expand(x, step.filters, live), relu)
        return self.compress(dense, step.filters, live)

    def expand(self, x: Tensor, pattern: int, live: Live) -> Tensor:
        dense = x.new_zeros(1, self.sizes[pattern], *x.shape[2:])
        return self.add_open(dense, x, pattern, live, relu=False)

    def compress(self, x: Tensor, pattern: int, live: Live) -> Tensor:
        index = _open(pattern, live)
        value = x.index_select(1, index.clamp(max=self.sizes[pattern] - 1))
        return value * (index < self.sizes[pattern]).to(x.dtype)[:, None, None]

    def add_open(self, dense: Tensor, x: Tensor, pattern: int, live: Live, relu: bool) -> Tensor:
        index = _open(pattern, live).clamp(max=self.sizes[pattern] - 1)
        total = dense.squeeze(0).index_put((index,), x.squeeze(0), accumulate=True).unsqueeze(0)
        return total.relu() if relu else total

    def cat(self, values: Sequence[Tensor], patterns: Sequence[int], pattern: int, live: Live) -> Tensor:
        assert isinstance(live, LiveOfOne)
        indices, start, size = [], 0, self.sizes[pattern]
        for value, part in zip(values, patterns, strict=True):
            length = value.shape[1] if part == DENSE else self.sizes[part]
            index = torch.arange(length, device=value.device) if part == DENSE else _open(part, live)
            indices.append(torch.where(index < length, index + start, size))
            start += length
        live.indices[pattern] = torch.cat(indices)
        return torch.cat(list(values), 1)


def _open(pattern: int, live: Live) -> Tensor:
    assert isinstance(live, LiveOfOne)
    return live.indices[pattern]


class OpenFilters(nn.Module):
    """A GaterNet's backbone for one image (1, channels, H, W) and its gates (1, C), each 0 or 1.

    Args:
        model: in evaluation mode, on the CPU.
        example_input: an image as it takes them.

    Raises:
        ValueError: its backbone cannot be exported, or has a hook behind its gates.
    """

    def __init__(self, model: GaterNet, example_input: Tensor) -> None:
        super().__init__()
        self.plan = make_plan(read_graph(model.backbone, example_input[:1]), model.sites)
        require_closed(model, example_input[:1])
        for step in self.plan.steps:
            if step.call is not None and step.call.target is _POOL and list(step.call.args[1]) == [1, 1]:
                # The same, but PyTorch cannot trace the pooling of a number of channels that it does not know.
                step.call = Call(torch.ops.aten.mean.dim, (step.call.args[0], [2, 3], True), {})
        self._kernels = TraceableKernels(self.plan)

    def forward(self, images: Tensor, gates: Tensor) -> Tensor:
        """Logits (1, K)."""
        run = Run(self.plan, self._kernels, images, gates, self._kernels.open_channels(gates))
        for step in self.plan.steps:
            run.values[step.out] = run.step(step)
        return run.values[self.plan.output]
