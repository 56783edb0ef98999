"""Carrying out a plan on batches of images, each under its own gates."""

from typing import Any

import torch
from torch import Tensor

from gaternet.skipping.kernels import Kernels, Live
from gaternet.skipping.plan import DENSE, Plan, Step


class PerImage(list[Any]):
    """A value that cannot be stacked along the batch: one for each image."""


class Program:
    """A plan and the kernels that carry it out.

    Args:
        plan: of a network.
        kernels: how convolutions and moves between dense and compact tensors are done.
    """

    def __init__(self, plan: Plan, kernels: type[Kernels]) -> None:
        self.plan = plan
        self.kernels = kernels(plan)

    def whole_plan(self) -> Plan:
        """The plan with its weights."""
        return self.plan

    @torch.no_grad()
    def __call__(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        """The network's output for images (B, channels, H, W) under gates (B, C), each 0 or 1."""
        if gates is None:
            gates = images.new_ones(len(images), self.plan.num_gates)
        run = Run(self.plan, self.kernels, images, gates, self.kernels.open_channels(gates))
        for step in self.plan.steps:
            run.values[step.out] = run.step(step)
            for name in step.free:
                del run.values[name]
        return run.dense(self.plan.output)


class Run:
    """One batch's way through a plan."""

    def __init__(self, plan: Plan, kernels: Kernels, images: Tensor, gates: Tensor, live: Live) -> None:
        self.plan, self.kernels, self.gates, self.live = plan, kernels, gates, live
        self.values: dict[str, Any] = {self.plan.input: images.contiguous(memory_format=torch.channels_last)}

    def step(self, step: Step) -> Any:
        """The value of a step."""
        if step.kind == "conv":
            value = self._conv(step)
        elif step.kind == "add":
            value = self._add(step)
        elif step.kind == "scale":
            value = self._scale(step)
        elif step.kind == "cat":
            value = self._cat(step)
        elif step.kind == "keep":
            value = self._call(step, {name: self.values[name] for name in step.sources})
        else:
            value = self._call(step, {name: self.dense(name) for name in step.sources})
        if step.mask is not None:
            gates = torch.cat([self.gates, self.gates.new_ones(len(self.gates), 1)], 1)  # ALIVE is the last one
            value = value * gates[:, step.mask, None, None].to(value.dtype)
        return value.relu_() if step.relu and step.mask is not None else value

    def dense(self, name: str) -> Any:
        """A value with all its channels, zeros in the closed ones."""
        value, pattern = self.values[name], self.plan.pattern_of[name]
        return value if pattern == DENSE else self.kernels.expand(value, pattern, self.live)

    def _conv(self, step: Step) -> Tensor:
        source = step.sources[0]
        x, reads = self.values[source], self.plan.pattern_of[source]
        assert step.conv is not None
        relu = step.relu and step.mask is None
        if step.adds is not None:
            target = self.values[step.adds]
            if step.held:
                added = self.kernels.grouped(step, x, relu=False)
            else:
                added = self.kernels.conv(step, x, reads, self.live, relu=False)
            if step.filters != DENSE:
                return self.kernels.add_open(target, added, step.filters, self.live, relu)
            total = target.add_(added)
            return total.relu_() if relu else total
        if step.held:
            return self.kernels.grouped(step, x, relu)
        if step.conv.groups == 1:
            value = self.kernels.conv(step, x, reads, self.live, relu)
            return self.kernels.expand(value, step.filters, self.live) if step.pattern != step.filters else value
        if step.conv.depthwise and step.filters != DENSE:
            if reads != step.filters:
                x = self.kernels.compress(self.dense(source), step.filters, self.live)
            return self.kernels.depthwise(step, x, self.live, relu)
        value = self.kernels.grouped(step, self.dense(source), relu)
        return value if step.filters == DENSE else self.kernels.compress(value, step.filters, self.live)

    def _add(self, step: Step) -> Tensor:
        (first, second), kernels = step.sources, self.kernels
        if self.plan.pattern_of[first] == self.plan.pattern_of[second]:
            total = torch.add(self.values[first], self.values[second])
            return total.relu_() if step.relu else total
        if self.plan.pattern_of[second] == DENSE or step.in_place == 1:
            first, second = second, first
        target = self.dense(first)
        if self.plan.pattern_of[first] == DENSE and step.in_place is None:
            target = target.clone(memory_format=torch.channels_last)
        return kernels.add_open(target, self.values[second], self.plan.pattern_of[second], self.live, step.relu)

    def _scale(self, step: Step) -> Tensor:
        x, factor = (self.values[name] for name in step.sources)
        if step.pattern != DENSE and self.plan.pattern_of[step.sources[1]] == DENSE:
            factor = self.kernels.compress(factor, step.pattern, self.live)
        return x * factor

    def _cat(self, step: Step) -> Tensor:
        values = [self.values[name] for name in step.sources]
        if step.pattern == DENSE:
            return torch.cat(values, 1)
        patterns = [self.plan.pattern_of[name] for name in step.sources]
        return self.kernels.cat(values, patterns, step.pattern, self.live)

    def _call(self, step: Step, sources: dict[str, Any]) -> Any:
        assert step.call is not None
        constants = self.plan.constants
        if step.stacked and not any(isinstance(value, PerImage) for value in sources.values()):
            return step.call({**constants, **sources})
        each = [
            step.call({**constants, **{n: _of_image(v, i) for n, v in sources.items()}}) for i in range(self._batch)
        ]
        return _stacked(each)

    @property
    def _batch(self) -> int:
        return len(self.gates)


def _of_image(value: Any, i: int) -> Any:
    """Image i's part of a value."""
    if isinstance(value, PerImage):
        return value[i]
    return [part[i : i + 1] for part in value] if isinstance(value, list | tuple) else value[i : i + 1]


def _stacked(each: list[Any]) -> Any:
    """One tensor, or a list of such, for all images where theirs have a batch dimension of one."""
    first = each[0]
    if isinstance(first, Tensor):
        return torch.cat(each) if first.ndim and len(first) == 1 else PerImage(each)
    if all(isinstance(part, Tensor) and part.ndim and len(part) == 1 for part in first):
        return [torch.cat(parts) for parts in zip(*each, strict=True)]
    return PerImage(each)
