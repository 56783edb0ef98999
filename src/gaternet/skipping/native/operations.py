"""Which steps of a plan the C++ library can do, and as which operation."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from gaternet.skipping.plan import DENSE, Call, ConvSpec, Plan, Ref, Step

Operation = Literal[
    "conv",
    "add",
    "scale",
    "cat",
    "pointwise",
    "max_pool",
    "average_pool",
    "mean",
    "subsample",
    "pad",
    "flatten",
    "copy",
]
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


def operation(plan: Plan, step: Step) -> Operation | None:
    """What the library does for the step; None where that is left to PyTorch."""
    shapes, call = plan.shapes, step.call
    if step.out not in shapes or not step.sources:
        return None
    ranks = {len(shapes.get(name, ())) for name in step.sources}
    if call is not None:
        return _called(plan, step, call, ranks)
    if step.kind == "conv":
        return "conv" if ranks <= {1, 3} else None
    if ranks != {3}:
        return None
    if step.kind == "scale":
        return "scale" if shapes[step.sources[1]][1:] in ((1, 1), shapes[step.sources[0]][1:]) else None
    return step.kind if step.kind in ("add", "cat") else None


def _called(plan: Plan, step: Step, call: Call, ranks: set[int]) -> Operation | None:
    source, target = step.sources[0], call.target
    if [*call.args][:1] != [Ref(source)]:
        return None
    if packed_spec(plan, step) is not None:
        return "conv"
    if ranks == {1}:
        return "pointwise" if function_name(step) is not None else "copy" if _keeps_all(step) else None
    if ranks != {3}:
        return None
    if target in (_aten.flatten.using_ints, _aten.reshape.default) and not call.kwargs:
        return "flatten" if len(plan.shapes[step.out]) == 1 and plan.shapes[source][1:] == (1, 1) else None
    if not call.kwargs and _is_global_mean(step):
        return "mean"
    if step.kind == "aten" and plan.pattern_of[source] != DENSE:
        return None
    if _keeps_all(step):
        return "copy"
    if call.kwargs:
        return None
    if target is _aten.max_pool2d.default:
        return "max_pool" if step.kind == "keep" and not (len(call.args) > 5 and call.args[5]) else None
    if target is _aten.avg_pool2d.default:
        plain = [*call.args[4:5]] in ([], [False]) and [*call.args[6:]] in ([], [None])
        return "average_pool" if step.kind == "keep" and plain else None
    if function_name(step) is not None:
        return "pointwise"
    if subsampling(step) is not None:
        return "subsample"
    return "pad" if channel_padding(step) is not None else None


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


def absorbed(plan: Plan, steps: Sequence[Step]) -> dict[str, Step]:
    """Activations that convolutions do as well, where nothing else reads their values: convolution's value -> step.

    What gates multiply behind the convolution, they may multiply behind these: of what has gates, they keep zeros.
    """
    readers = Counter(name for step in plan.steps for name in step.sources)
    found = {}
    for step, then in pairwise(steps):
        if operation(plan, step) != "conv" or operation(plan, then) != "pointwise" or then.mask is not None:
            continue
        plain = step.adds is None and not step.relu and (step.held or step.pattern == step.filters)
        if plain and then.sources == [step.out] and readers[step.out] == 1 and step.out != plan.output:
            found[step.out] = then
    return found


def function_name(step: Step) -> str | None:
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


def subsampling(step: Step) -> tuple[int, int] | None:
    """(down, right) where the step takes every so many rows or columns."""
    call = step.call
    if call is None or call.target is not _aten.slice.Tensor:
        return None
    dim, start, end, stride = [*call.args[1:], *[0, None, None, 1][len(call.args) - 1 :]]
    whole = start in (0, None) and (end is None or end >= 2**31)
    return {2: (stride, 1), 3: (1, stride)}.get(dim % 4) if whole else None


def channel_padding(step: Step) -> int | None:
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
