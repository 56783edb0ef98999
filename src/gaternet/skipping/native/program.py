"""Carrying out a plan on the CPU: as many steps as can be in one call of the C++ library, the others in PyTorch."""

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gaternet.skipping.kernels import Kernels, Live
from gaternet.skipping.native import library as lib
from gaternet.skipping.native.memory import large_pages, round_up
from gaternet.skipping.native.operations import operation, packed_spec
from gaternet.skipping.native.segment import Segment
from gaternet.skipping.plan import ConvSpec, Plan, Step
from gaternet.skipping.program import Run


class _Moves(Kernels):
    """What steps that are left to PyTorch need: these are no convolutions with gathered weights."""

    def prepare(self) -> None:
        pass


class NativeProgram:
    """A plan as the C++ library carries it out. It holds the weights once, in the layout that the library wants.

    Args:
        plan: with float32 weights on the CPU.

    Attributes:
        plan: the same without the weights that the library holds; `whole_plan` has them.

    Raises:
        NativeUnavailableError: there is no C++ compiler, or weights are of another kind.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.device.type != "cpu" or plan.dtype != torch.float32:
            raise lib.NativeUnavailableError("native code is for float32 weights on the CPU")
        self._library = lib.load_library()
        uses = Counter(name for step in plan.steps if step.call is not None for name in step.call.reads)
        specs = {step.out: spec for step in plan.steps if (spec := packed_spec(plan, step)) is not None}
        # Weights of linear layers that nothing else reads: step -> constant
        self._linear = {s.out: s.call.reads[1] for s in plan.steps if s.call and s.out in specs}
        self._linear = {step: name for step, name in self._linear.items() if uses[name] == 1}
        held = {name: plan.constants[name].to("meta") for name in self._linear.values()}
        steps = [_without_weights(step) for step in plan.steps]
        self.plan = replace(plan, steps=steps, constants=plan.constants | held)
        self.kernels = _Moves(self.plan)
        sizes = self.kernels.sizes
        self._offsets = torch.tensor([*self.kernels.offsets, sum(sizes)], device="cpu")
        self._weights = self._pack(specs)
        self._arenas = threading.local()
        self._parts = self._split()

    @torch.no_grad()
    def __call__(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        """The network's output for images (B, channels, H, W) under gates (B, C), each 0 or 1."""
        if gates is None:
            gates = images.new_ones(len(images), self.plan.num_gates)
        run = Run(self.plan, self.kernels, images, gates, self._open_channels(gates))
        for part in self._parts:
            if isinstance(part, Segment):
                part.run(run, self._offsets, self._arenas)
            else:
                run.values[part.out] = run.step(part)
            for name in part.free:
                run.values.pop(name, None)
        return run.dense(self.plan.output)

    @property
    def weight_bytes(self) -> int:
        """What weights, biases and other constants take."""
        packed = [tensor for pair in self._weights.values() for tensor in pair if tensor is not None]
        return self.plan.weight_bytes + sum(tensor.numel() * 4 for tensor in packed)

    @property
    def arena_bytes(self) -> int:
        """What one thread that calls it keeps for values and gathered weights."""
        sizes = [part.arena_size for part in self._parts if isinstance(part, Segment)]
        return 4 * torch.get_num_threads() * max(sizes, default=0)

    def whole_plan(self) -> Plan:
        """The plan with its weights, as for `NativeProgram(plan)`."""
        steps, constants = [], dict(self.plan.constants)
        for name, constant in self._linear.items():
            spec = ConvSpec(name, constants[constant][:, :, None, None], None, (1, 1), (0, 0), (1, 1), 1)
            constants[constant] = self._unpacked(self._weights[name][0], spec).flatten(1)
        for step in self.plan.steps:
            spec = step.conv
            if spec is not None and step.out in self._weights:
                packed, bias = self._weights[step.out]
                step = replace(step, conv=replace(spec, weight=self._unpacked(packed, spec), bias=bias))
            steps.append(step)
        return replace(self.plan, steps=steps, constants=constants)

    def __reduce__(self) -> tuple[type["NativeProgram"], tuple[Plan]]:
        """A copy is made from the plan, for the library has memory of its own."""
        return NativeProgram, (self.whole_plan(),)

    def _pack(self, specs: Mapping[str, ConvSpec]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weights as the library wants them, all in one block, and biases."""
        half = self._library.half_lanes()
        sizes = {}
        for name, spec in specs.items():
            rows, filters = math.prod(spec.weight.shape[1:]), len(spec.weight) // spec.groups
            sizes[name] = round_up(spec.groups * rows * (1 if spec.depthwise else -(-filters // half) * half))
        block = large_pages(sum(sizes.values()) + half)  # the library reads whole vectors, so some beyond the last
        packed = {}
        for (name, spec), weights in zip(
            specs.items(), block[: sum(sizes.values())].split(list(sizes.values())), strict=True
        ):
            weight = spec.weight.contiguous()
            if spec.depthwise:
                weights = weights[: weight.numel()].view(-1, len(weight)).copy_(weight.flatten(1).t())
            else:
                self._library.pack_weights(weight.data_ptr(), *_sizes(spec), weights.data_ptr())
            packed[name] = weights, None if spec.bias is None else spec.bias.contiguous()
        return packed

    def _unpacked(self, packed: Tensor, spec: ConvSpec) -> Tensor:
        if spec.depthwise:
            return packed.t().reshape(spec.weight.shape)
        weight = torch.empty(spec.weight.shape, dtype=torch.float32, device="cpu")
        self._library.unpack_weights(packed.data_ptr(), *_sizes(spec), weight.data_ptr())
        return weight

    def _open_channels(self, gates: Tensor) -> Live:
        gates = gates.float().contiguous()
        sizes, kernels = self.kernels.sizes, self.kernels
        counts = torch.zeros(len(gates), len(sizes), dtype=torch.int32, device="cpu")
        memory = torch.zeros(len(gates) * sum(sizes) + 1, dtype=torch.int32, device="cpu")
        where = kernels.columns.data_ptr(), self._offsets.data_ptr(), len(sizes), counts.data_ptr(), memory.data_ptr()
        self._library.open_channels(gates.data_ptr(), len(gates), gates.shape[1], *where)
        return Live(counts, memory[:-1].view(len(gates), sum(sizes)), sizes)

    def _split(self) -> list["Segment | Step"]:
        """The plan's steps, runs of those that the library can do as segments."""
        groups: list[list[Step] | Step] = []
        for step in self.plan.steps:
            if operation(self.plan, step) is None:
                groups.append(step)
            elif groups and isinstance(groups[-1], list):
                groups[-1].append(step)
            else:
                groups.append([step])
        return [
            Segment(self.plan, self._library, self._weights, group) if isinstance(group, list) else group
            for group in groups
        ]


def _without_weights(step: Step) -> Step:
    if step.conv is None:
        return step
    return replace(step, conv=replace(step.conv, weight=step.conv.weight.to("meta"), bias=None))


def _sizes(spec: ConvSpec) -> tuple[int, int, int, int]:
    """Groups, and of each filters, channels and taps."""
    filters, channels, height, width = spec.weight.shape
    return spec.groups, filters // spec.groups, channels, height * width
