"""Steps of a plan as operations of the C++ library, and where their values lie."""

import ctypes
import math
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gaternet.skipping.native import library as lib
from gaternet.skipping.native.memory import large_pages, round_up
from gaternet.skipping.native.operations import (
    absorbed,
    channel_padding,
    function_name,
    operation,
    packed_spec,
    subsampling,
)
from gaternet.skipping.plan import DENSE, Plan, Step
from gaternet.skipping.program import Run


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
        self._absorbed = absorbed(plan, steps)
        done = {step.out for step in self._absorbed.values()}
        for step in steps:
            if step.out not in done:
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
        factors = torch.cat([run.gates, run.gates.new_ones(images, 1)], 1).float()
        factors = factors.index_select(1, self._where)
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

    @cached_property
    def _where(self) -> Tensor:
        return torch.tensor(self._columns, dtype=torch.long, device="cpu")

    def _add(self, step: Step) -> None:
        self._add_unmasked(step)
        if step.mask is not None:
            name, value = f"{step.out}.mask", self._absorbed.get(step.out, step).out
            self._masks[name] = len(self._columns)
            self._columns += step.mask
            self._shapes[name] = (len(step.mask), 1, 1)
            self._external.add(name)
            self._emit("scale", value, value, name, writes=step.pattern, shape=_shape((1, 1)))

    def _add_unmasked(self, step: Step) -> None:
        source, call, shapes, patterns = step.sources[0], step.call, self.plan.shapes, self.plan.pattern_of
        args = () if call is None else call.args
        pixels = (*shapes[source], 1, 1)[1:3]
        match operation(self.plan, step):
            case "conv":
                self._add_conv(step, self._absorbed.get(step.out))
            case "add":
                self._add_sum(step)
            case "cat":
                start = 0
                for name in step.sources:
                    channels = shapes[name][0]
                    part = {"channels": channels, "offset": start}
                    self._emit("cat", name, step.out, reads=patterns[name], writes=step.pattern, shape=part)
                    start += channels
            case "scale":
                factor = step.sources[1]
                size = _shape(shapes[factor][1:])
                if step.pattern != DENSE and patterns[factor] == DENSE:
                    factor = self._emit("compress", factor, f"{step.out}.open", writes=step.pattern, like=factor)
                self._emit("scale", source, step.out, factor, writes=step.pattern, shape=size)
            case "pointwise":
                self._emit("pointwise", source, step.out, writes=step.pattern, function=_function(step))
            case "max_pool":
                self._emit("max_pool", source, step.out, writes=step.pattern, shape=self._pool(source, *args[1:5]))
            case "average_pool":
                size, margins = self._pool(source, *args[1:4]), args[5] if len(args) > 5 else True
                self._emit("average_pool", source, step.out, writes=step.pattern, shape=size, function=int(margins))
            case "mean":
                compact = step.out if step.pattern == patterns[source] else f"{step.out}.open"
                self._shapes[compact] = shapes[source][:1]
                self._emit("mean", source, compact, writes=patterns[source], shape=_shape(pixels))
                if compact != step.out:
                    self._emit("expand", compact, step.out, reads=patterns[source])
            case "subsample":
                self._emit("subsample", source, step.out, shape=_shape(pixels, stride=subsampling(step) or (1, 1)))
            case "pad":
                part = {"channels": shapes[source][0], "offset": channel_padding(step) or 0}
                self._emit("pad", source, step.out, shape=part)
            case "flatten" if step.pattern != patterns[source]:
                self._emit("expand", source, step.out, reads=patterns[source])
            case _:
                self._emit("copy", source, step.out, writes=step.pattern)

    def _add_conv(self, step: Step, then: Step | None) -> None:
        """A convolution, and the activation behind it where there is one that it does as well."""
        source, spec = step.sources[0], packed_spec(self.plan, step)
        assert spec is not None
        reads = DENSE if step.held else self.plan.pattern_of[source]
        pixels = (*self.plan.shapes[source], 1, 1)[1:3]
        size = _shape(
            pixels, kernel=spec.weight.shape[2:], stride=spec.stride, pad=spec.padding, dilation=spec.dilation
        )
        size |= {"channels": spec.in_channels, "filters": len(spec.weight), "groups": spec.groups}
        packed, bias = self._weights[step.out]
        if spec.depthwise:
            if reads != step.filters and reads != DENSE:
                source, reads = self._expanded(source), DENSE
            if reads != step.filters:
                source = self._emit("compress", source, f"{step.out}.open", writes=step.filters, like=source)
        else:
            margins = [pixels[i] + 2 * spec.padding[i] for i in (0, 1)]
            thin = spec.groups == 1 and spec.in_channels * spec.weight.shape[3] <= 64
            rows, panel = math.prod(spec.weight.shape[1:]), self._library.panel_lanes()
            needed = (rows + 1) * panel + thin * (math.prod(margins) * spec.in_channels + panel)
            self._workspace = max(self._workspace, needed)
        pointers = (packed.data_ptr(), None if bias is None else bias.data_ptr())
        kind = "depthwise" if spec.depthwise else "conv"
        function = _relu(step) if then is None else _function(then)
        options: dict[str, Any] = {"reads": reads, "writes": step.filters, "function": function}
        options |= {"shape": size, "pointers": pointers}
        if step.adds is not None:
            options["adds"] = lib.ADDS_TO_VALUE
        elif step.pattern != step.filters and not spec.depthwise:  # dense, with zeros at closed filters
            self._emit("zeros", step.out, step.out, writes=step.filters)
            options["adds"] = lib.ADDS_TO_ZEROS
        self._emit(kind, source, then.out if then else step.out, **options)
        if step.adds is not None and step.relu and step.filters != DENSE and not self._positive(step.adds):
            self._emit("relu_closed", step.out, step.out, writes=step.filters)

    def _pool(self, source: str, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1) -> dict[str, int]:
        """The shape of a pooling operation with these options, each a number or one for each side."""
        options = {"kernel": kernel, "stride": stride or kernel, "pad": padding, "dilation": dilation}
        sides = {name: (o, o) if isinstance(o, int) else (o[0], o[-1]) for name, o in options.items()}
        return _shape(self.plan.shapes[source][1:], **sides)

    def _positive(self, name: str) -> bool:
        """Whether the value comes out of a ReLU."""
        return any(step.out == name and step.relu for step in self.plan.steps)

    def _add_sum(self, step: Step) -> None:
        (first, second), patterns = step.sources, self.plan.pattern_of
        if patterns[first] == patterns[second]:
            self._emit("add", first, step.out, second, writes=step.pattern, function=_relu(step))
            return
        if patterns[second] == DENSE or step.in_place == 1:
            first, second = second, first
        if patterns[first] != DENSE:
            self._emit("expand", first, step.out, reads=patterns[first])
        elif step.in_place is None:
            self._emit("copy", first, step.out)
        self._emit("add_open", second, step.out, reads=patterns[second], function=_relu(step))

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
        adds: int = 0,
        shape: Mapping[str, int] | None = None,
        pointers: tuple[int | None, int | None] = (None, None),
        like: str | None = None,
    ) -> str:
        """Append an operation; `like` names the value that a value without a name in the plan is shaped like."""
        if like is not None:
            self._shapes[target] = self._shapes[like]
        channels, *pixels = (*self._shapes[target], 1, 1)[:3]
        numbers = [self._number(name) for name in (source, other or source, target)]
        op = lib.Op(lib.KINDS.index(kind), function, *numbers, reads, writes, adds)
        op.shape = lib.Conv(**(shape or {}), weights=pointers[0], bias=pointers[1])
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


def _relu(step: Step) -> int:
    """The library's number of what the step does with its result."""
    return lib.FUNCTIONS.index("relu" if step.relu else "identity")


def _function(step: Step) -> int:
    """The library's number of an activation."""
    return lib.FUNCTIONS.index(str(function_name(step)))


def _shape(pixels: Sequence[int], **sides: Sequence[int]) -> dict[str, int]:
    """Fields of `lib.Conv`: height and width of what is read, and of "kernel", "stride", "pad" and "dilation"."""
    found: dict[str, int] = {"height": pixels[0], "width": pixels[1]}
    for name, pair in sides.items():
        found |= zip((f"{name}_height", f"{name}_width"), pair, strict=True)
    return found
