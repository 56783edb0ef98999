"""Steps of a plan as operations of the C++ library, and where their values lie."""

import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaternet.skipping.kernels import Live
from gaternet.skipping.native import library as lib
from gaternet.skipping.plan import DENSE, ConvSpec, Plan, Step

_aten = torch.ops.aten
_FUNCTIONS: dict[Callable[..., Any], str] = {
    _aten.relu.default: "relu",
    _aten.relu6.default: "relu6",
    _aten.sigmoid.default: "sigmoid",
    _aten.silu.default: "silu",
    _aten.hardsigmoid.default: "hardsigmoid",
    _aten.hardswish.default: "hardswish",
}
_SAME = frozenset({_aten.dropout.default, _aten.contiguous.default, _aten.clone.default, _aten.detach.default})
_NO_SHAPE = (0,) * 14


def is_native(plan: Plan, step: Step) -> bool:
    """Whether the library can do the step."""
    shapes, call = plan.shapes, step.call
    if step.mask is not None or any(len(shapes.get(name, ())) != 3 for name in step.sources):
        return False
    if step.kind == "conv":
        return step.conv is not None and packs(step.conv)
    if step.kind == "scale":
        return shapes[step.sources[1]][1:] in ((1, 1), shapes[step.sources[0]][1:])
    if step.kind == "add":
        return True
    if call is None or (step.kind == "aten" and plan.pattern_of[step.sources[0]] != DENSE):
        return False
    if call.target is _aten.max_pool2d.default:
        return step.kind == "keep" and not (len(call.args) > 5 and call.args[5])
    return call.target in _FUNCTIONS or call.target in _SAME or _is_global_mean(step)


def _is_global_mean(step: Step) -> bool:
    """Whether the step is the mean over an image's pixels."""
    call = step.call
    assert call is not None
    if call.target is _aten.adaptive_avg_pool2d.default:
        return tuple(call.args[1]) == (1, 1)
    return call.target is _aten.mean.dim and {dim % 4 for dim in call.args[1]} == {2, 3} and not call.args[3:]


class Segment:
    """Steps that the C++ library does in one call.

    Args:
        plan: whose steps they are.
        library: the library.
        weights: packed weights and bias of each convolution.
        steps: consecutive ones.

    What is used inside only lies in an arena, which each thread has for itself, image by image; what is read or made
    for other parts is a tensor.
    """

    def __init__(
        self, plan: Plan, library: Any, weights: Mapping[str, tuple[Tensor, Tensor | None]], steps: Sequence[Step]
    ) -> None:
        self.plan, self._library, self._weights = plan, library, weights
        made = {step.out for step in steps}
        within = {id(step) for step in steps}
        outside = {name for step in self.plan.steps if id(step) not in within for name in step.sources}
        self._outputs = {name for name in made if name in outside or name == self.plan.output}
        self.free = [name for step in steps for name in step.free]
        self._root: dict[str, str] = {}  # in whose memory a value lies
        for step in steps:
            if (over := _overwritten(step)) is not None:
                self._root[step.out] = over
        # Memory is that of an output where any value in it is one.
        self._external = {self.root(name) for name in self._outputs}
        self._external |= {self.root(name) for step in steps for name in step.sources if name not in made}
        self._lanes = library.half_lanes()
        self._shapes = dict(plan.shapes)
        self._numbers: dict[str, int] = {}
        self._rooms: list[int] = []
        self._ops: list[lib.Op] = []
        self._workspace = 0
        self._uses: dict[str, list[int]] = {}
        for step in steps:
            self._add(step)
        self._lay_out()

    def root(self, name: str) -> str:
        """The first value that lay in the memory of this one."""
        while name in self._root:
            name = self._root[name]
        return name

    def run(self, values: dict[str, Any], live: Live, offsets: Tensor, arenas: threading.local) -> None:
        """Read and write values by name."""
        images, threads = len(live.counts), torch.get_num_threads()
        table = (lib.Value * len(self._numbers)).from_buffer_copy(self._table)
        held = []
        for name, number in self._numbers.items():
            if name not in self._external:
                continue
            if name in values:
                tensor = values[name].contiguous(memory_format=torch.channels_last)
            else:
                channels, *pixels = self.plan.shapes[name]
                tensor = torch.empty(images, *pixels, channels).movedim(-1, 1)
            held.append((name, tensor))
            table[number].data, table[number].step = tensor.data_ptr(), tensor[0].numel()
        arena = getattr(arenas, "memory", None)
        if arena is None or len(arena) < threads * self.arena_size:
            arena = arenas.memory = torch.empty(threads * self.arena_size)
        where = lib.Live(offsets.data_ptr(), len(offsets) - 1, live.numbers.data_ptr(), live.counts.data_ptr())
        self._library.run(
            self._array, len(self._ops), table, images, ctypes.byref(where), arena.data_ptr(), self.arena_size,
            self._workspace_start, threads,
        )  # fmt: skip
        tensors = dict(held)
        for name in self._outputs:
            values[name] = tensors[self.root(name)].view(images, *self.plan.shapes[name])

    def _add(self, step: Step) -> None:
        plan, patterns = self.plan, self.plan.pattern_of
        source = step.sources[0]
        held = [patterns[name] for name in step.sources]
        if step.kind == "conv":
            self._add_conv(step)
        elif step.kind == "add":
            self._add_sum(step)
        elif step.kind == "scale":
            factor = step.sources[1]
            if step.pattern != DENSE and held[1] == DENSE:
                factor = f"{step.out}.open"
                self._emit("compress", step.sources[1], factor, writes=step.pattern, like=step.sources[1])
            pixels = plan.shapes[step.sources[1]][1:]
            self._emit("scale", source, step.out, factor, writes=step.pattern, shape=(*pixels, 0, 0))
        else:
            assert step.call is not None
            target, args = step.call.target, step.call.args
            if target in _FUNCTIONS:
                self._emit(
                    "pointwise", source, step.out, writes=step.pattern, function=lib.FUNCTIONS[_FUNCTIONS[target]]
                )
            elif target is _aten.max_pool2d.default:
                kernel, stride, padding, dilation = _pool_options(args)
                size = (*plan.shapes[source][1:], 0, 0, 0, 0, *kernel, *stride, *padding, *dilation)
                self._emit("max_pool", source, step.out, writes=step.pattern, shape=size)
            elif _is_global_mean(step):
                self._emit("mean", source, step.out, writes=step.pattern, shape=(*plan.shapes[source][1:], 0, 0))
            else:
                self._emit("copy", source, step.out, writes=step.pattern)

    def _add_conv(self, step: Step) -> None:
        spec, source = step.conv, step.sources[0]
        assert spec is not None
        reads = self.plan.pattern_of[source]
        size = (*self.plan.shapes[source][1:], 0, 0, spec.in_channels, len(spec.weight))
        size += (*spec.weight.shape[2:], *spec.stride, *spec.padding, *spec.dilation)
        packed, bias = self._weights[step.out]
        if spec.depthwise:
            if reads != step.filters and reads != DENSE:
                source, reads = self._expanded(source), DENSE
            if reads != step.filters:
                source = self._emit("compress", source, f"{step.out}.open", writes=step.filters, like=source)
        else:
            margins = [size[i] + 2 * spec.padding[i] for i in (0, 1)]
            thin = spec.in_channels * spec.weight.shape[3] <= 64
            rows, panel = math.prod(spec.weight.shape[1:]), self._library.panel_lanes()
            needed = (rows + 1) * panel + thin * (math.prod(margins) * spec.in_channels + panel)
            self._workspace = max(self._workspace, needed)
        pointers = (packed.data_ptr(), None if bias is None else bias.data_ptr())
        kind = "depthwise" if spec.depthwise else "conv"
        options: dict[str, Any] = {"reads": reads, "writes": step.filters, "relu": step.relu}
        options |= {"shape": size, "pointers": pointers, "adds": step.adds is not None}
        self._emit(kind, source, step.out, **options)

    def _add_sum(self, step: Step) -> None:
        (first, second), patterns = step.sources, self.plan.pattern_of
        if patterns[first] == patterns[second]:
            self._emit("add", first, step.out, second, writes=step.pattern, relu=step.relu)
            return
        if patterns[second] == DENSE or step.in_place == 1:
            first, second = second, first
        if patterns[first] != DENSE:
            self._emit("expand", first, step.out, reads=patterns[first])
        elif step.in_place is None:
            self._emit("copy", first, step.out)
        self._emit("add_open", second, step.out, reads=patterns[second], relu=step.relu)

    def _expanded(self, name: str) -> str:
        return self._emit("expand", name, f"{name}.dense", reads=self.plan.pattern_of[name], like=name)

    def _emit(
        self,
        kind: str,
        source: str,
        target: str,
        other: str | None = None,
        *,
        function: int = 0,
        reads: int = DENSE,
        writes: int = DENSE,
        relu: bool = False,
        adds: bool = False,
        shape: Sequence[int] = (),
        pointers: tuple[int | None, int | None] = (None, None),
        like: str | None = None,
    ) -> str:
        """Append an operation; `like` names the value that a value without a name in the plan is shaped like."""
        if like is not None:
            self._shapes[target] = self._shapes[like]
        channels, *pixels = (*self._shapes[target], 1, 1)[:3]
        numbers = [self._number(name) for name in (source, other or source, target)]
        op = lib.Op(lib.KINDS[kind], function, *numbers, reads, writes, adds, relu)
        op.shape = lib.Conv(*(*shape, *_NO_SHAPE)[:14], *pointers)
        op.shape.out_height, op.shape.out_width = pixels
        op.shape.filters = channels
        self._ops.append(op)
        return target

    def _number(self, name: str) -> int:
        """A value's place in the table; used by the operation that comes next."""
        name = self.root(name)
        self._uses.setdefault(name, []).append(len(self._ops))
        if name not in self._numbers:
            self._numbers[name] = len(self._numbers)
            room = self._shapes[name][0]
            self._rooms.append(room if name in self._external else -(-room // self._lanes) * self._lanes)
        return self._numbers[name]

    def _lay_out(self) -> None:
        """Give each value that stays inside a place in the arena, those that live at the same time different ones."""
        self._table = (lib.Value * len(self._numbers))()
        placed: list[tuple[int, int, int, int]] = []  # start, stop, first use, last use
        for name, number in self._numbers.items():
            room, offset = self._rooms[number], 0
            if name not in self._external:
                pixels = (*self._shapes[name], 1, 1)[1:3]
                size = -(-room * pixels[0] * pixels[1] // 16) * 16
                first, last = min(self._uses[name]), max(self._uses[name])
                for start, stop, since, until in sorted(placed):
                    if since <= last and first <= until and start < offset + size and offset < stop:
                        offset = stop
                placed.append((offset, offset + size, first, last))
            self._table[number] = lib.Value(None, offset, room)
        self._workspace_start = max((stop for _, stop, _, _ in placed), default=0)
        self.arena_size = self._workspace_start + -(-self._workspace // 16) * 16 + 64
        self._array = (lib.Op * len(self._ops))(*self._ops)


def packs(spec: ConvSpec) -> bool:
    """Whether the library holds the convolution's weights."""
    return spec.groups == 1 or spec.depthwise


def _overwritten(step: Step) -> str | None:
    """The value in whose memory the step's value will lie."""
    if step.kind == "add" and step.in_place is not None:
        return step.sources[step.in_place]
    return step.adds


def _pool_options(args: Sequence[Any]) -> list[tuple[int, int]]:
    """Kernel, stride, padding and dilation of a max_pool2d, as pairs."""
    kernel, stride, padding, dilation = [*args[1:5], *[[], 0, 1][len(args[2:5]) :]]
    options = [kernel, stride or kernel, padding, dilation]
    return [(o, o) if isinstance(o, int) else (o[0], o[-1]) for o in options]
