"""Steps of a plan as operations of the C++ library, and where their values lie."""

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaternet.skipping.native import library as lib
from gaternet.skipping.native.memory import large_pages, round_up
from gaternet.skipping.plan import DENSE, ConvSpec, Plan, Ref, Step
from gaternet.skipping.program import Run

_aten = torch.ops.aten
_FUNCTIONS: dict[Callable[..., Any], str] = {
    _aten.relu.default: "relu",
    _aten.relu6.default: "relu6",
    _aten.sigmoid.default: "sigmoid",
    _aten.silu.default: "silu",
    _aten.hardsigmoid.default: "hardsigmoid",
    _aten.hardswish.default: "hardswish",
    _aten.gelu.default: "gelu",
}
_SAME = frozenset({_aten.dropout.default, _aten.contiguous.default, _aten.clone.default, _aten.detach.default})
_NO_SHAPE = (0,) * 15


def is_native(plan: Plan, step: Step) -> bool:
    """Whether the library can do the step."""
    shapes, call = plan.shapes, step.call
    if step.out not in shapes or not step.sources or (call is not None and [*call.args][:1] != [Ref(step.sources[0])]):
        return False
    ranks = {len(shapes.get(name, ())) for name in step.sources}
    if packed_spec(plan, step) is not None:
        return ranks <= {1, 3}
    if call is not None and ranks == {1}:
        return _function(step) is not None or _keeps_all(step)
    if ranks != {3} or step.kind == "conv":
        return False
    if step.kind == "scale":
        return shapes[step.sources[1]][1:] in ((1, 1), shapes[step.sources[0]][1:])
    if step.kind in ("add", "cat"):
        return True
    if call is None:
        return False
    if call.target in (_aten.flatten.using_ints, _aten.reshape.default) and not call.kwargs:
        return len(shapes.get(step.out, ())) == 1 and shapes[step.sources[0]][1:] == (1, 1)
    if not call.kwargs and _is_global_mean(step):
        return True
    if step.kind == "aten" and plan.pattern_of[step.sources[0]] != DENSE:
        return False
    if _keeps_all(step):
        return True
    if call.kwargs:
        return False
    if call.target is _aten.max_pool2d.default:
        return step.kind == "keep" and not (len(call.args) > 5 and call.args[5])
    if call.target is _aten.avg_pool2d.default:
        return step.kind == "keep" and [*call.args[4:5]] in ([], [False]) and [*call.args[6:]] in ([], [None])
    if _function(step) is not None:
        return True
    return _subsampling(step) is not None or _channel_padding(step) is not None


def packed_spec(plan: Plan, step: Step) -> ConvSpec | None:
    """The convolution whose weights the library holds: the step's own, or that which its linear layer is."""
    spec, call = step.conv, step.call
    if spec is not None:
        return spec
    if call is None or call.target is not _aten.linear.default or len(plan.shapes.get(step.sources[0], ())) != 1:
        return None
    if call.kwargs or call.args[0] != Ref(step.sources[0]) or step.sources[1:]:  # the image makes more than its source
        return None
    weight, bias = (plan.constants.get(getattr(arg, "name", "")) for arg in (*call.args, None)[1:3])
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    if any(tensor.dtype != torch.float32 for tensor in (weight, bias) if tensor is not None):
        return None
    return ConvSpec(step.out, weight[:, :, None, None], bias, (1, 1), (0, 0), (1, 1), 1)


def _function(step: Step) -> str | None:
    """The library's name of the activation that the step is, if it has that."""
    call = step.call
    assert call is not None
    if call.target in (_aten.hardtanh.default, _aten.clamp.default) and [*call.args[1:]] == [0, 6]:
        return "relu6"
    return _FUNCTIONS.get(call.target) if not call.args[1:] and not call.kwargs else None


def _keeps_all(step: Step) -> bool:
    """Whether the step changes nothing."""
    call = step.call
    if call is None or call.target not in _SAME:
        return False
    return call.target is not _aten.dropout.default or call.args[2:] in ([False], (False,))


def _subsampling(step: Step) -> tuple[int, int] | None:
    """(down, right) where the step takes every so many rows or columns."""
    call = step.call
    if call is None or call.target is not _aten.slice.Tensor:
        return None
    dim, start, end, stride = [*call.args[1:], *[0, None, None, 1][len(call.args) - 1 :]]
    whole = start in (0, None) and (end is None or end >= 2**31)
    return {2: (stride, 1), 3: (1, stride)}.get(dim % 4) if whole else None


def _channel_padding(step: Step) -> int | None:
    """How many channels of zeros the step puts in front, where it adds such and nothing else."""
    call = step.call
    if call is None or call.target not in (_aten.pad.default, _aten.constant_pad_nd.default):
        return None
    margins, *rest = call.args[1:]
    zeros = all(value in ("constant", 0, None) for value in rest)
    return margins[4] if zeros and len(margins) == 6 and margins[:4] == [0] * 4 and min(margins) >= 0 else None


def _is_global_mean(step: Step) -> bool:
    """Whether the step is the mean over an image's pixels."""
    call = step.call
    assert call is not None
    if call.target is _aten.adaptive_avg_pool2d.default:
        return call.args[1] in ([1, 1], (1, 1))
    return call.target is _aten.mean.dim and {dim % 4 for dim in call.args[1] or ()} == {2, 3} and not call.args[3:]


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
            if (over := step.overwrites) is not None:
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
        self._masks: dict[str, int] = {}  # where each mask begins in the columns of all
        self._columns: list[int] = []
        for step in steps:
            self._add(step)
        self._lay_out()

    def root(self, name: str) -> str:
        """The first value that lay in the memory of this one."""
        while name in self._root:
            name = self._root[name]
        return name

    def run(self, run: Run, offsets: Tensor, arenas: threading.local) -> None:
        """Read and write the run's values."""
        values, live, images, threads = run.values, run.live, len(run.gates), torch.get_num_threads()
        table = (lib.Value * len(self._numbers)).from_buffer_copy(self._table)
        held = []
        for name, number in self._numbers.items():
            if name not in self._external or name in self._masks:
                continue
            if name in values:
                tensor = values[name]
                if tensor.shape != (images, *self.plan.shapes[name]) or tensor.dtype != torch.float32:
                    raise RuntimeError(f"{name} is {tensor.dtype}, {tuple(tensor.shape)}, which was not planned")
                image_like = tensor.ndim == 4
                tensor = tensor.contiguous(memory_format=torch.channels_last if image_like else torch.contiguous_format)
            else:
                channels, *pixels = self.plan.shapes[name]
                tensor = torch.empty(images, *pixels, channels, dtype=torch.float32, device="cpu").movedim(-1, 1)
            held.append((name, tensor))
            table[number].data, table[number].step = tensor.data_ptr(), tensor[0].numel()
        factors = torch.cat([run.gates, run.gates.new_ones(images, 1)], 1).float()[:, self._columns].contiguous()
        for name, offset in self._masks.items():
            number = self._numbers[name]
            table[number].data, table[number].step = factors.data_ptr() + 4 * offset, len(self._columns)
        arena = getattr(arenas, "memory", None)
        if arena is None or len(arena) < threads * self.arena_size:
            arena = arenas.memory = large_pages(threads * self.arena_size)
        where = lib.Live(offsets.data_ptr(), len(offsets) - 1, live.numbers.data_ptr(), live.counts.data_ptr())
        self._library.run(
            self._array, len(self._ops), table, images, ctypes.byref(where), arena.data_ptr(), self.arena_size,
            self._workspace_start, threads,
        )  # fmt: skip
        tensors = dict(held)
        for name in self._outputs:
            values[name] = tensors[self.root(name)].view(images, *self.plan.shapes[name])

    def _add(self, step: Step) -> None:
        self._add_unmasked(step)
        if step.mask is not None:
            name = f"{step.out}.mask"
            self._masks[name] = len(self._columns)
            self._columns += step.mask
            self._shapes[name] = (len(step.mask), 1, 1)
            self._external.add(name)
            self._emit("scale", step.out, step.out, name, writes=step.pattern, shape=(1, 1, 0, 0))

    def _add_unmasked(self, step: Step) -> None:
        plan, patterns = self.plan, self.plan.pattern_of
        source = step.sources[0]
        held = [patterns[name] for name in step.sources]
        spec = packed_spec(self.plan, step)
        if spec is not None:
            self._add_conv(step, spec)
        elif step.kind == "add":
            self._add_sum(step)
        elif step.kind == "cat":
            start = 0
            for name in step.sources:
                channels = plan.shapes[name][0]
                size = (0, 0, 0, 0, channels, 0, 0, 0, 0, 0, 0, start)
                self._emit("cat", name, step.out, reads=patterns[name], writes=step.pattern, shape=size)
                start += channels
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
            if (name := _function(step)) is not None:
                self._emit("pointwise", source, step.out, writes=step.pattern, function=lib.FUNCTIONS.index(name))
            elif target is _aten.max_pool2d.default:
                self._emit("max_pool", source, step.out, writes=step.pattern, shape=self._pool(source, *args[1:5]))
            elif target is _aten.avg_pool2d.default:
                size, margins = self._pool(source, *args[1:4]), args[5] if len(args) > 5 else True
                self._emit("average_pool", source, step.out, writes=step.pattern, shape=size, function=int(margins))
            elif _is_global_mean(step):
                compact = f"{step.out}.open" if step.pattern != held[0] else step.out
                self._shapes[compact] = plan.shapes[source][:1]
                self._emit("mean", source, compact, writes=held[0], shape=(*plan.shapes[source][1:], 0, 0))
                if compact != step.out:
                    self._emit("expand", compact, step.out, reads=held[0])
            elif (strides := _subsampling(step)) is not None:
                size = (*plan.shapes[source][1:], 0, 0, 0, 0, 0, 0, *strides)
                self._emit("subsample", source, step.out, shape=size)
            elif (front := _channel_padding(step)) is not None:
                size = (0, 0, 0, 0, plan.shapes[source][0], 0, 0, 0, 0, 0, 0, front)
                self._emit("pad", source, step.out, shape=size)
            elif step.pattern != held[0]:  # a single pixel is made flat
                self._emit("expand", source, step.out, reads=held[0])
            else:
                self._emit("copy", source, step.out, writes=step.pattern)

    def _add_conv(self, step: Step, spec: ConvSpec) -> None:
        source = step.sources[0]
        reads = DENSE if step.held else self.plan.pattern_of[source]
        size = (*(*self.plan.shapes[source], 1, 1)[1:3], 0, 0, spec.in_channels, len(spec.weight))
        size += (*spec.weight.shape[2:], *spec.stride, *spec.padding, *spec.dilation, spec.groups)
        packed, bias = self._weights[step.out]
        if spec.depthwise:
            if reads != step.filters and reads != DENSE:
                source, reads = self._expanded(source), DENSE
            if reads != step.filters:
                source = self._emit("compress", source, f"{step.out}.open", writes=step.filters, like=source)
        else:
            margins = [size[i] + 2 * spec.padding[i] for i in (0, 1)]
            thin = spec.groups == 1 and spec.in_channels * spec.weight.shape[3] <= 64
            rows, panel = math.prod(spec.weight.shape[1:]), self._library.panel_lanes()
            needed = (rows + 1) * panel + thin * (math.prod(margins) * spec.in_channels + panel)
            self._workspace = max(self._workspace, needed)
        pointers = (packed.data_ptr(), None if bias is None else bias.data_ptr())
        kind = "depthwise" if spec.depthwise else "conv"
        options: dict[str, Any] = {"reads": reads, "writes": step.filters, "relu": step.relu}
        options |= {"shape": size, "pointers": pointers}
        if step.adds is not None:
            options["adds"] = lib.ADDS_TO_VALUE
        elif step.pattern != step.filters and not spec.depthwise:  # dense, with zeros at closed filters
            self._emit("zeros", step.out, step.out, writes=step.filters)
            options["adds"] = lib.ADDS_TO_ZEROS
        self._emit(kind, source, step.out, **options)
        if step.adds is not None and step.relu and step.filters != DENSE and not self._positive(step.adds):
            self._emit("relu_closed", step.out, step.out, writes=step.filters)

    def _pool(self, source: str, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1) -> tuple[int, ...]:
        """The shape of a pooling operation with these options, each a number or one for each side."""
        options = (kernel, stride or kernel, padding, dilation)
        sides = [(o, o) if isinstance(o, int) else (o[0], o[-1]) for o in options]
        return (*self.plan.shapes[source][1:], 0, 0, 0, 0, *itertools.chain(*sides))

    def _positive(self, name: str) -> bool:
        """Whether the value comes out of a ReLU."""
        return any(step.out == name and step.relu for step in self.plan.steps)

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
        adds: int = 0,
        shape: Sequence[int] = (),
        pointers: tuple[int | None, int | None] = (None, None),
        like: str | None = None,
    ) -> str:
        """Append an operation; `like` names the value that a value without a name in the plan is shaped like."""
        if like is not None:
            self._shapes[target] = self._shapes[like]
        channels, *pixels = (*self._shapes[target], 1, 1)[:3]
        numbers = [self._number(name) for name in (source, other or source, target)]
        op = lib.Op(lib.KINDS.index(kind), function, *numbers, reads, writes, adds, relu)
        op.shape = lib.Conv(*(*shape, *_NO_SHAPE)[:15], *pointers)
        op.shape.out_height, op.shape.out_width = pixels
        if kind not in ("conv", "depthwise"):
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
                size = round_up(room * pixels[0] * pixels[1])
                first, last = min(self._uses[name]), max(self._uses[name])
                for start, stop, since, until in sorted(placed):
                    if since <= last and first <= until and start < offset + size and offset < stop:
                        offset = stop
                placed.append((offset, offset + size, first, last))
            self._table[number] = lib.Value(None, offset, room)
        self._workspace_start = max((stop for _, stop, _, _ in placed), default=0)
        self.arena_size = self._workspace_start + round_up(self._workspace) + 64
        self._array = (lib.Op * len(self._ops))(*self._ops)
