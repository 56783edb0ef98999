"""A plan: a network's operations as a list of steps, with what closed gates allow to leave out. Plain data.

A tensor is *compact* where gates decide its channels: then only the open ones are held. Its *pattern* says which gate
decides each channel. A convolution that writes and reads compact tensors uses those rows and columns of its weights
that belong to open channels. Whatever cannot be done on compact tensors is done on dense ones, with zeros in the closed
channels: that is always right, and saves nothing.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from gaternet.channels import ALIVE

Kind = Literal["conv", "keep", "add", "scale", "cat", "aten"]
DENSE = -1  # the pattern of a tensor that holds all its channels
NEVER = -2  # in a pattern, of a channel that no gate opens
_OF_LAYOUT = (torch.ops.aten.view_as_complex.default, torch.ops.aten.view.dtype)  # want numbers in their order
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Ref:
    """In an operation's arguments, the value or constant of that name."""

    name: str


@dataclass(frozen=True)
class Call:
    """An operation of PyTorch and its arguments."""

    target: Callable[..., Any]
    args: Any
    kwargs: Any

    def __reduce__(self) -> tuple[Callable[..., "Call"], tuple[Any, ...]]:
        """By the operation's name, for PyTorch's cannot be pickled."""
        name = str(self.target) if isinstance(self.target, torch._ops.OpOverload) else self.target
        return _call, (name, self.args, self.kwargs)

    @property
    def reads(self) -> list[str]:
        """Names of the values and constants that it reads."""
        found: list[str] = []

        def note(arg: Any) -> None:
            if isinstance(arg, Ref):
                found.append(arg.name)

        map_aggregate([self.args, self.kwargs], note)
        return found

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Run it on values by name."""

        def value(arg: Any) -> Any:
            return values[arg.name] if isinstance(arg, Ref) else arg

        args, kwargs = map_aggregate(self.args, value), map_aggregate(self.kwargs, value)
        if self.target in _OF_LAYOUT:
            args = (args[0].contiguous(), *args[1:])
        if self.target is _ATTENTION:
            _check_keys(*args, **kwargs)
        return self.target(*args, **kwargs)

    def to(self, device: torch.device) -> "Call":
        """The same on another device."""

        def moved(arg: Any) -> Any:
            return device if isinstance(arg, torch.device) else arg

        return replace(self, args=map_aggregate(self.args, moved), kwargs=map_aggregate(self.kwargs, moved))


def _call(target: str | Callable[..., Any], args: Any, kwargs: Any) -> Call:
    """A call of an operation that is given by its name, such as "aten.add.Tensor", if it has one."""
    if isinstance(target, str):
        namespace, packet, overload = target.split(".")
        target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    assert not isinstance(target, str)
    return Call(target, args, kwargs)


@dataclass(frozen=True)
class ConvSpec:
    """A 2-D convolution with the BatchNorm behind it folded in.

    Attributes:
        name: its module, or its node where it has none.
        weight: (out_channels, in_channels / groups, height, width).
        bias: (out_channels,) or None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def depthwise(self) -> bool:
        """Whether channel c of the output reads channel c of the input, and nothing else."""
        return self.groups > 1 and self.groups == len(self.weight) and self.weight.shape[1] == 1

    @property
    def is_scale(self) -> bool:
        """Whether each number of the output is one of the input, multiplied and shifted."""
        alone = self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return self.depthwise and alone

    @property
    def in_channels(self) -> int:
        """Channels that it reads."""
        return self.weight.shape[1] * self.groups


@dataclass
class Step:
    """One operation, or several that are done as one.

    Attributes:
        kind: "conv"; "keep", an operation on each channel by itself; "add" and "scale", of two tensors; "cat", of
            channels; "aten", all else.
        out: name of the value that it computes.
        sources: names of the values that it reads.
        pattern: of its value, an index into the plan's patterns, or `DENSE`.
        filters: of a "conv", the pattern of the filters that it computes. Another than `pattern` where its value is
            dense all the same: because it is added to a dense one, or holds zeros at closed filters.
        adds: of a "conv", the value that it adds to, in place; also the last of its sources.
        held: whether the weights of a "conv" were pruned to what is held of its source, so that none are gathered.
        relu: whether a ReLU follows.
        mask: the gates' column of each channel to multiply with, `ALIVE` for one: at a site whose filters run whether
            open or not.
        in_place: "add" may overwrite its source of this number.
        stacked: whether the operation treats the images of a batch as one would treat them one by one.
        free: values that nothing reads after this step.
        conv: of a "conv".
        call: of a "keep" or "aten".
    """

    kind: Kind
    out: str
    sources: list[str]
    pattern: int = DENSE
    filters: int = DENSE
    adds: str | None = None
    held: bool = False
    relu: bool = False
    mask: list[int] | None = None
    in_place: int | None = None
    stacked: bool = True
    free: list[str] = field(default_factory=list)
    conv: ConvSpec | None = None
    call: Call | None = None

    @property
    def overwrites(self) -> str | None:
        """The value in whose memory its own will lie."""
        if self.kind == "add" and self.in_place is not None:
            return self.sources[self.in_place]
        return self.adds


@dataclass
class Plan:
    """Steps in execution order, made by `make_plan` for single images.

    Attributes:
        input, output: names of the images and of what comes out.
        input_shape: (channels, height, width) of the images.
        num_gates: C; 0 for a network without sites.
        steps: the operations.
        shapes: of each tensor of the images' precision with one image in front, without that: (channels, height,
            width).
        patterns: for each pattern, the column of the gates for each channel, `ALIVE` for none, `NEVER` for channels
            that are not held for any gates; (channels,).
        constants: values that do not depend on the images.
    """

    input: str
    output: str
    input_shape: tuple[int, int, int]
    num_gates: int
    steps: list[Step]
    shapes: dict[str, tuple[int, ...]]
    patterns: list[Tensor]
    constants: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.pattern_of = {step.out: step.pattern for step in self.steps}
        self.pattern_of[self.input] = DENSE

    def __str__(self) -> str:
        """A line for each convolution: what it may skip."""
        lines = []
        for step in self.steps:
            if step.conv is None:
                continue
            reads = self.pattern_of[step.sources[0]]
            skips = reads != DENSE and (not step.conv.depthwise or reads == step.filters)
            parts = [f"reads {'open channels' if skips else 'all'} of {step.conv.in_channels}"]
            parts += [f"writes {'open filters' if step.filters != DENSE else 'all'} of {len(step.conv.weight)}"]
            parts += ["masked"] if step.mask else []
            lines.append(f"{step.conv.name}: {', '.join(parts)}")
        kinds = Counter(step.kind for step in self.steps)
        lines.append(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        return "\n".join(lines)

    @property
    def _weights(self) -> list[Tensor]:
        return [*(step.conv.weight for step in self.steps if step.conv), *self.constants.values()]

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU where they are held elsewhere."""
        held = [tensor for tensor in self._weights if not tensor.is_meta]
        # A number that the network's code makes may lie on the CPU in any case.
        return next((tensor.device for tensor in sorted(held, key=lambda t: t.ndim == 0)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return next((tensor.dtype for tensor in self._weights if tensor.is_floating_point()), torch.float32)

    @property
    def weight_bytes(self) -> int:
        """What the convolutions' weights, without their biases, and other constants take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._weights if not tensor.is_meta)

    def to(self, device: torch.device) -> "Plan":
        """The same on another device."""
        steps = []
        for step in self.steps:
            if step.conv is not None:
                bias = None if step.conv.bias is None else step.conv.bias.to(device)
                step = replace(step, conv=replace(step.conv, weight=step.conv.weight.to(device), bias=bias))
            if step.call is not None:
                step = replace(step, call=step.call.to(device))
            steps.append(step)
        constants = {name: tensor.to(device) for name, tensor in self.constants.items()}
        return replace(self, steps=steps, constants=constants)


def is_dense(pattern: Tensor) -> bool:
    """Whether no gate decides any of the channels."""
    return bool((pattern == ALIVE).all())


def _check_keys(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> None:
    """For PyTorch does not on CPUs, and reads beyond keys that are fewer than the values."""
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"attention needs as many keys as values, but has {key.shape[-2]} and {value.shape[-2]}")
