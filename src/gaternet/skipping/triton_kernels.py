"""Kernels in Triton, for CUDA: all images of a batch in one launch, each with its own open channels.

Tensors lie channels-last. A program works on a tile of an image's pixels and channels, and ends at once where the image
has no open channels there. Of the fillers behind the open channels, those up to a multiple of `FILLED` are zeros, so
that whole vectors can be read and multiplied; the others are never written.
"""
# ruff: noqa: N803 (in Triton, arguments that are known when a kernel is compiled have names in capitals)

from collections.abc import Sequence
from functools import partial
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.testing import do_bench

from gaternet.skipping.kernels import Kernels, Live
from gaternet.skipping.plan import DENSE, Step

FILLED = tl.constexpr(16)
LISTS = ["counts", "numbers", "read_counts", "read_numbers"]  # begin anywhere in memory: no reason to compile anew


class TritonKernels(Kernels):
    """Convolutions and moves of whole batches; the open filters' weights are read where they lie, by number."""

    def prepare(self) -> None:
        """Lay weights out as (taps, channels, filters): those of open filters lie close to each other."""
        self._laid_out: dict[str, Tensor] = {}
        for step in self.plan.steps:
            if step.conv is None or (step.conv.groups > 1 and not step.conv.depthwise):
                continue
            reads = self.plan.pattern_of[step.sources[0]] if step.conv.groups == 1 else DENSE
            if step.filters != DENSE or reads != DENSE:
                self._laid_out[step.out] = step.conv.weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()

    def conv(self, step: Step, x: Tensor, reads: int, live: Live, relu: bool) -> Tensor:
        """Convolution of x, whose pattern is `reads`, with the step's weights."""
        if reads == step.filters == DENSE:  # nothing to skip
            return self.grouped(step, x, relu)
        return self._convolved(step, x, self._lists(reads, live), live, relu)

    def depthwise(self, step: Step, x: Tensor, live: Live, relu: bool) -> Tensor:
        """Depthwise convolution of x, which has the step's pattern."""
        return self._convolved(step, x, (None, None), live, relu)

    def expand(self, x: Tensor, pattern: int, live: Live) -> Tensor:
        """A compact x as a dense one, (B, channels, H, W), zeros in the closed channels."""
        dense = _empty(x, self.sizes[pattern], *x.shape[2:])
        return self._spread(dense, x, pattern, live, ADD=False, RELU=False)

    def add_open(self, dense: Tensor, x: Tensor, pattern: int, live: Live, relu: bool) -> Tensor:
        """Add a compact x to the open channels of a dense tensor, in place."""
        if not dense.is_contiguous(memory_format=torch.channels_last):
            return super().add_open(dense, x, pattern, live, relu)
        return self._spread(dense, x, pattern, live, ADD=True, RELU=relu)

    def compress(self, x: Tensor, pattern: int, live: Live) -> Tensor:
        """The open channels of a dense x, as a compact one."""
        y = _empty(x, live.room[pattern], *x.shape[2:]).zero_()
        return _copy_to(y, x, None, *self._lists(pattern, live), live)

    def cat(self, values: Sequence[Tensor], patterns: Sequence[int], pattern: int, live: Live) -> Tensor:
        """Tensors behind each other, some compact, as a compact one of a pattern of its own."""
        whole = _empty(values[0], live.room[pattern], *values[0].shape[2:]).zero_()
        starts = torch.zeros_like(live.counts[:, 0])
        for value, part in zip(values, patterns, strict=True):
            counts, _ = self._lists(part, live)
            _copy_to(whole, value, starts, counts, None, live)
            starts = starts + (value.shape[1] if counts is None else counts)
        return whole

    def _lists(self, pattern: int, live: Live) -> tuple[Tensor | None, Tensor | None]:
        """How many channels are open, (B,), and their numbers, (B, ...); None for all."""
        if pattern == DENSE:
            return None, None
        return live.counts[:, pattern], live.numbers[:, self.offsets[pattern] :]

    def _convolved(
        self, step: Step, x: Tensor, reads: tuple[Tensor | None, Tensor | None], live: Live, relu: bool
    ) -> Tensor:
        assert step.conv is not None
        spec, kernel = step.conv, tuple(step.conv.weight.shape[2:])
        windows = zip(x.shape[2:], kernel, spec.stride, spec.padding, spec.dilation, strict=True)
        size = [(n + 2 * pad - gap * (k - 1) - 1) // stride + 1 for n, k, stride, pad, gap in windows]
        x, y = _laid(x), _empty(x, len(spec.weight) if step.filters == DENSE else live.room[step.filters], *size)
        pixels = size[0] * size[1]
        _launch(
            _conv,
            lambda tile: (triton.cdiv(y.shape[1], tile["FILTERS"]) * triton.cdiv(pixels, tile["PIXELS"]) * len(x),),
            *(x, self._laid_out[step.out], spec.bias, y, *self._lists(step.filters, live), *reads, *_strides(live)),
            *(*x.shape[2:], size[1], pixels, x.shape[1], y.shape[1], spec.weight.shape[1], len(spec.weight)),
            triton.next_power_of_2(len(x) * pixels),
            KERNEL=kernel,
            STRIDE=spec.stride,
            PADDING=spec.padding,
            DILATION=spec.dilation,
            DEPTHWISE=spec.depthwise,
            RELU=relu,
            # The switch of cuDNN's convolutions, so that both are as precise
            PRECISION="tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee",  # pyright: ignore[reportAttributeAccessIssue]
        )
        return y

    def _spread(self, dense: Tensor, x: Tensor, pattern: int, live: Live, **options: bool) -> Tensor:
        grid, tile = _tiles(dense)
        sizes = _pixels(dense), x.shape[1], dense.shape[1], dense.shape[1].bit_length()
        lists = self._lists(pattern, live)
        _launch(_spread, grid, _laid(x), dense, *lists, *_strides(live), *sizes, **options, **tile)
        return dense


def _copy_to(
    y: Tensor, x: Tensor, starts: Tensor | None, counts: Tensor | None, numbers: Tensor | None, live: Live
) -> Tensor:
    """y, with those channels of x from channel `starts` on."""
    grid, tile = _tiles(x)
    _launch(
        _copy, grid, _laid(x), y, starts, counts, numbers, *_strides(live), _pixels(x), x.shape[1], y.shape[1], **tile
    )
    return y


def _launch(kernel: Any, grid: Any, x: Tensor, *args: Any, **options: Any) -> None:
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **options, enable_fp_fusion=True)  # the default is about to change, and warns


def _laid(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    size = len(x), channels, height, width
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _strides(live: Live) -> tuple[int, int]:
    return live.counts.stride(0), live.numbers.stride(0)


def _tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of a kernel that only moves what it reads."""
    channels = min(64, triton.next_power_of_2(x.shape[1]))
    pixels = 2048 // channels
    grid = (triton.cdiv(x.shape[1], channels) * triton.cdiv(_pixels(x), pixels) * len(x),)
    return grid, {"PIXELS": pixels, "CHANNELS": channels}


# The kernels. Grids have one axis, for the others end at 65,535: tiles follow each other by channels, then by pixels,
# then by images. Widths are channels of the tensors in memory; `patterns` and `places` lie between the lists of one
# image and the next. A list that is None stands for all channels. Triton reads the functions' source, which the
# wrappers that tests put around annotated functions would hide: hence @no_type_check.

_TILES = [(64, 32, 32), (128, 32, 32), (128, 64, 32), (64, 64, 64), (64, 16, 16)]
_CONFIGS = [triton.Config({"PIXELS": p, "FILTERS": f, "CHANNELS": c}, num_warps=4, num_stages=3) for p, f, c in _TILES]


@triton.autotune(
    _CONFIGS[:1] if knobs.runtime.interpret else _CONFIGS,
    key=["work", "KERNEL", "channels", "filters", "DEPTHWISE"],
    do_bench=partial(do_bench, warmup=5, rep=20),
)
@triton.jit(do_not_specialize_on_alignment=LISTS)
@no_type_check
def _conv(
    x, weight, bias, y,  # (B, height, width, x_width), (taps, channels, filters), (filters,), (B, pixels, y_width)
    counts, numbers, read_counts, read_numbers, patterns, places,
    height, width, row_length, pixels, x_width, y_width, channels, filters, work,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    DEPTHWISE: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = x * weight + bias: for each tap of the window a product of (PIXELS, CHANNELS) and (CHANNELS, FILTERS)."""
    rows, columns = (pixels + PIXELS - 1) // PIXELS, (y_width + FILTERS - 1) // FILTERS
    tile = tl.program_id(0)
    image = (tile // columns // rows).to(tl.int64)
    count = filters if counts is None else tl.load(counts + image * patterns)
    start = tile % columns * FILTERS
    if start >= count:
        return
    place = start + tl.arange(0, FILTERS)
    filled = (place < (count + FILLED - 1) // FILLED * FILLED) & (place < y_width)
    is_open = place < count
    number = place if numbers is None else tl.load(numbers + image * places + place, mask=is_open, other=0)
    pixel = tile // columns % rows * PIXELS + tl.arange(0, PIXELS)
    top = pixel // row_length * STRIDE[0] - PADDING[0]
    left = pixel % row_length * STRIDE[1] - PADDING[1]
    x += image * height * width * x_width
    read = CHANNELS if DEPTHWISE else channels if read_counts is None else tl.load(read_counts + image * patterns)
    total = tl.full((PIXELS, FILTERS), 0.0, tl.float32)
    for step in range((read + CHANNELS - 1) // CHANNELS * (KERNEL[0] * KERNEL[1])):
        tap = step % (KERNEL[0] * KERNEL[1])
        row = top + tap // KERNEL[1] * DILATION[0]
        column = left + tap % KERNEL[1] * DILATION[1]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        source = (x + (row * width + column) * x_width)[:, None]
        if DEPTHWISE:
            a = tl.load(source + place[None, :], mask=inside[:, None] & filled[None, :], other=0.0)
            b = tl.load(weight + tap * filters + number, mask=is_open, other=0.0)
            total += a.to(tl.float32) * b.to(tl.float32)[None, :]
        else:
            k = step // (KERNEL[0] * KERNEL[1]) * CHANNELS + tl.arange(0, CHANNELS)
            held = (k < (read + FILLED - 1) // FILLED * FILLED) & (k < x_width)
            channel = k if read_numbers is None else tl.load(read_numbers + image * places + k, mask=k < read, other=0)
            a = tl.load(source + k[None, :], mask=inside[:, None] & held[None, :], other=0.0)
            b = weight + (tap * channels + channel)[:, None] * filters + number[None, :]
            b = tl.load(b, mask=(k < read)[:, None] & is_open[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + number, mask=is_open, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    target = y + (image * pixels + pixel)[:, None] * y_width + place[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(pixel < pixels)[:, None] & filled[None, :])


@triton.jit(do_not_specialize_on_alignment=LISTS)
@no_type_check
def _spread(
    x, dense,  # (B, pixels, x_width), (B, pixels, channels)
    counts, numbers, patterns, places, pixels, x_width, channels, halvings,
    ADD: tl.constexpr, RELU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add x to a dense tensor, or make one of it: each channel looks for its number in the list of open ones."""
    rows, columns = (pixels + PIXELS - 1) // PIXELS, (channels + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0)
    image = (tile // columns // rows).to(tl.int64)
    count = tl.load(counts + image * patterns)
    numbers += image * places
    channel = tile % columns * CHANNELS + tl.arange(0, CHANNELS)
    low = tl.full((CHANNELS,), 0, tl.int32)  # where in the list the channel is, if it is open
    high = low + count
    for _ in range(halvings):
        middle = (low + high) // 2
        smaller = tl.load(numbers + middle, mask=middle < high, other=channels) < channel
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    is_open = tl.load(numbers + low, mask=low < count, other=-1) == channel
    pixel = tile // columns % rows * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    source = x + (image * pixels + pixel)[:, None] * x_width + low[None, :]
    value = tl.load(source, mask=inside & is_open[None, :], other=0.0).to(tl.float32)
    target = dense + (image * pixels + pixel)[:, None] * channels + channel[None, :]
    if ADD:
        if not RELU:
            inside = inside & is_open[None, :]
        value += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    tl.store(target, value.to(dense.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["starts", *LISTS])
@no_type_check
def _copy(
    x, y,  # (B, pixels, x_width), (B, pixels, y_width)
    starts, counts, numbers, patterns, places, pixels, x_width, y_width,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The channels of x of these numbers, or its first ones, become those of y from `starts` on."""
    rows, columns = (pixels + PIXELS - 1) // PIXELS, (x_width + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0)
    image = (tile // columns // rows).to(tl.int64)
    place = tile % columns * CHANNELS + tl.arange(0, CHANNELS)
    count = x_width if counts is None else tl.load(counts + image * patterns)
    is_open = place < count
    number = place if numbers is None else tl.load(numbers + image * places + place, mask=is_open, other=0)
    start = 0 if starts is None else tl.load(starts + image)
    pixel = tile // columns % rows * PIXELS + tl.arange(0, PIXELS)
    mask = (pixel < pixels)[:, None] & is_open[None, :]
    value = tl.load(x + (image * pixels + pixel)[:, None] * x_width + number[None, :], mask=mask)
    tl.store(y + (image * pixels + pixel)[:, None] * y_width + (start + place)[None, :], value, mask=mask)
