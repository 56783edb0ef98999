"""Engines: ways to carry out a plan. Each computes what the masked backbone computes."""

import math
from collections import ChainMap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from gaternet.graph import shape
from gaternet.skipping.plan import DENSE, Plan, Step, call


class Live(NamedTuple):
    """The open channels of a pattern: their `numbers`, of which those after the first `real` ones are fillers."""

    numbers: Tensor
    real: int


class SliceEngine(nn.Module):
    """Computes each image with those rows and columns of the weights that its open filters have.

    Args:
        plan: of the backbone, for single images.
        multiple: open channels are rounded up to a multiple of this, with channels of zeros: kernel libraries prepare
            anew for each shape, and like some numbers better than others.
    """

    def __init__(self, plan: Plan, multiple: int = 16) -> None:
        super().__init__()
        self.plan, self.multiple = plan, multiple
        self._columns = torch.cat([*plan.patterns, torch.zeros(0, dtype=torch.long)])
        self._sizes = [len(pattern) for pattern in plan.patterns]
        # A row and a column of zeros behind each weight are what a filler reads and writes.
        self._weights = {s.node: _padded(s) for s in plan.steps if s.weight is not None}

    def forward(self, image: Tensor, gates: Tensor) -> Tensor:
        """Logits (1, K) of one image (1, channels, H, W) under its gates (C,), each 0 or 1."""
        run = _Run(self, image, gates)
        for step in self.plan.steps:
            run.values[step.node] = run.step(step)
            for node in step.free:
                del run.values[node]
        outputs: Any = map_arg(self.plan.graph.output.args[0], run.dense)
        return outputs[0]

    def open_channels(self, gates: Tensor) -> list[Live]:
        """What is open of each pattern."""
        extended = torch.cat([gates, gates.new_ones(1)])  # ALIVE is the last one
        found = []
        for alive in (extended[self._columns] > 0).split(self._sizes):
            index = alive.nonzero()[:, 0]
            count = len(index)
            rounded = min(len(alive), max(1, math.ceil(count / self.multiple)) * self.multiple)
            found.append(Live(F.pad(index, (0, rounded - count), value=len(alive)), count))
        return found


class _Run:
    """One image's way through the plan."""

    def __init__(self, engine: SliceEngine, image: Tensor, gates: Tensor) -> None:
        self.engine, self.plan, self.gates = engine, engine.plan, gates
        self.live = engine.open_channels(gates)
        self.values: dict[Node, Any] = {self.plan.graph.input: image.contiguous(memory_format=torch.channels_last)}

    def step(self, step: Step) -> Any:
        """The value of a step: a tensor, or a list of them."""
        if step.kind == "conv":
            return self._conv(step)
        held = [self.values[self.plan.resolve(source)] for source in step.sources]
        patterns = [self.plan.pattern_of(source) for source in step.sources]
        if step.kind == "keep":
            return call(step.node, ChainMap(dict(zip(step.sources, held, strict=True)), self.plan.constants))
        if step.kind == "add" and patterns.count(DENSE) == 1:
            first, second = held if patterns[0] == DENSE else held[::-1]
            live = self.live[max(patterns)]
            return first.index_add(1, live.numbers[: live.real], second[:, : live.real])
        if step.kind == "add" and patterns[0] == patterns[1]:
            return held[0] + held[1]
        if step.kind == "scale":
            if step.pattern != DENSE and patterns[1] == DENSE:
                held[1] = held[1].index_select(1, self._index(step.pattern))
            return held[0] * held[1]
        if step.kind == "cat" and step.pattern != DENSE:
            return self._cat(step)
        value = call(step.node, ChainMap({node: self.dense(node) for node in step.sources}, self.plan.constants))
        return value if step.mask is None else self._masked(value, step.mask)

    def dense(self, node: Node) -> Any:
        """A node's value with all its channels, zeros in the closed ones."""
        value, pattern = self.values[self.plan.resolve(node)], self.plan.pattern_of(node)
        if pattern == DENSE:
            return value
        live = self.live[pattern]
        full = value.new_zeros(1, shape(node)[1], *value.shape[2:]).contiguous(memory_format=torch.channels_last)
        return full.index_copy_(1, live.numbers[: live.real], value[:, : live.real])

    def _conv(self, step: Step) -> Tensor:
        conv = step.conv
        assert conv is not None
        weight, bias = self.engine._weights[step.node]
        reads = self.plan.pattern_of(conv.source)
        x = self.values[self.plan.resolve(conv.source)]
        args: list[Any] = [*conv.node.args[3:6]]
        groups = conv.groups
        if conv.groups == 1:
            weight = weight[:-1] if step.pattern == DENSE else weight.index_select(0, self.live[step.pattern].numbers)
            weight = weight[:, :-1] if reads == DENSE else weight.index_select(1, self.live[reads].numbers)
        elif conv.depthwise and step.pattern != DENSE:
            if reads != step.pattern:
                x = self.dense(conv.source).index_select(1, self._index(step.pattern))
            weight = weight.index_select(0, self.live[step.pattern].numbers)
            groups = len(weight)
        else:
            x, weight = self.dense(conv.source), weight[:-1]
        if bias is not None:
            bias = bias[:-1] if step.pattern == DENSE else bias.index_select(0, self.live[step.pattern].numbers)
        stride, padding, dilation = [*args, *[1, 0, 1][len(args) :]]
        value = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        value = value if step.mask is None else self._masked(value, step.mask)
        return value.relu_() if step.relu else value

    def _cat(self, step: Step) -> Tensor:
        parts = []
        for source in step.sources:
            value, pattern = self.values[self.plan.resolve(source)], self.plan.pattern_of(source)
            parts.append(value if pattern == DENSE else value[:, : self.live[pattern].real])
        live = self.live[step.pattern]
        fillers = parts[0].new_zeros(1, len(live.numbers) - live.real, *parts[0].shape[2:])
        return torch.cat([*parts, fillers], 1)

    def _masked(self, value: Tensor, mask: slice) -> Tensor:
        return value * self.gates[None, mask, None, None].to(value.dtype)

    def _index(self, pattern: int) -> Tensor:
        """For reading a dense tensor: fillers read the last channel, and what they read is multiplied by zero."""
        return self.live[pattern].numbers.clamp(max=self.engine._sizes[pattern] - 1)


def _padded(step: Step) -> tuple[Tensor, Tensor | None]:
    assert step.weight is not None
    assert step.conv is not None
    columns = 1 if step.conv.groups == 1 else 0
    weight = F.pad(step.weight, (0, 0, 0, 0, 0, columns, 0, 1))
    return weight, None if step.bias is None else F.pad(step.bias, (0, 1))
