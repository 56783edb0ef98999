"""What a plan from a file must satisfy: files come from anywhere, and compiled code trusts a plan's shapes."""

from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional as F

from gaternet.channels import ALIVE
from gaternet.skipping.plan import DENSE, Plan, Step


def check_plan(plan: Plan) -> None:
    """Carry the plan out on tensors without data, and compare what comes out with what it says.

    Raises:
        ValueError: a shape, a pattern or a reference is not what the operations give.
    """
    for part in (plan, *plan.steps, *(step.conv for step in plan.steps if step.conv is not None)):
        for name, hint in get_type_hints(type(part)).items():
            _require(_is_of(getattr(part, name), hint), name)
    for pattern in plan.patterns:
        _require(pattern.ndim == 1 and pattern.dtype == torch.int64, "patterns")
        _require(bool(((pattern >= ALIVE) & (pattern < plan.num_gates)).all()), "patterns")
    _require(plan.shapes.get(plan.input) == plan.input_shape, plan.input)
    for name in (*plan.shapes, *(step.out for step in plan.steps)):
        _require("." not in name, name)  # such names are given to what a program makes of a plan
        _require(name not in plan.constants, name)
    constants: dict[str, Any] = {name: _without_data(tensor) for name, tensor in plan.constants.items()}
    values = {plan.input: torch.empty(1, *plan.input_shape, dtype=plan.dtype, device="meta")}
    made = {plan.input}
    own: set[str] = set()  # values whose memory no other shares
    for step in plan.steps:
        _require(step.out not in made, step.out)
        made.add(step.out)
        try:
            value = _value(plan, step, values, constants)
        except (RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its step {step.out} does not fit those before it ({error})") from error
        single = isinstance(value, Tensor) and value.shape[:1] == (1,) and value.dtype == plan.dtype
        _require(plan.shapes.get(step.out) == (tuple(value.shape[1:]) if single else None), step.out)
        _check_channels(plan, step, value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else 0)
        values[step.out] = value
        _check_memory(step, own)
        for name in step.free:
            _require(name in values, name)
            del values[name]
    _require(plan.output in values, plan.output)


def _value(plan: Plan, step: Step, values: dict[str, Any], constants: dict[str, Any]) -> Any:
    sources = [values[name] for name in step.sources]
    _require((step.conv is not None) == (step.kind == "conv"), step.out)
    _require((step.call is not None) == (step.kind in ("keep", "aten")), step.out)
    if step.conv is not None:
        conv, added = step.conv, sources[1:]
        bias = conv.bias
        _require(conv.weight.dtype == plan.dtype and (bias is None or bias.dtype == plan.dtype), step.out)
        _require(bias is None or bias.shape == conv.weight.shape[:1], step.out)
        _require(not step.held and step.sources[1:] == ([] if step.adds is None else [step.adds]), step.out)
        _require(min(*conv.stride, *conv.dilation) >= 1 and min(conv.padding) >= 0, step.out)
        options = (conv.stride, conv.padding, conv.dilation, conv.groups)
        value = F.conv2d(sources[0], _without_data(conv.weight), None, *options)
        _require(min(*conv.weight.shape, *sources[0].shape) >= 1, step.out)  # without data, these pass
        _require(value.shape[1] == len(conv.weight) and len(conv.weight) % conv.groups == 0, step.out)
        _require(all(other.shape == value.shape for other in added), step.out)
        return value
    if step.kind in ("add", "scale"):
        first, second = sources
        value = first + second if step.kind == "add" else first * second
        alike = first.shape == second.shape if step.kind == "add" else first.shape[1] == second.shape[1]
        _require(alike and value.shape == first.shape, step.out)
        return value
    if step.kind == "cat":
        return torch.cat(sources, 1)
    assert step.call is not None
    return step.call.to(torch.device("meta"))({**constants, **dict(zip(step.sources, sources, strict=True))})


def _check_channels(plan: Plan, step: Step, channels: int) -> None:
    """That each channel which is held is decided by the gate that the step's sources say."""
    for number in (step.pattern, step.filters):
        if number != DENSE:
            _require(0 <= number < len(plan.patterns) and len(plan.patterns[number]) == channels, step.out)
    if step.mask is not None:
        _require(len(step.mask) == channels, step.out)
        _require(all(ALIVE <= column < plan.num_gates for column in step.mask), step.out)
    reads = [plan.pattern_of[name] for name in step.sources]
    if step.kind == "conv":
        assert step.conv is not None
        allowed = {step.filters} if step.conv.groups > 1 else {DENSE, step.filters}
        _require(step.adds is None or (step.conv.groups == 1 and step.pattern == reads[1] == DENSE), step.out)
    elif step.kind == "keep":
        allowed = {reads[0]}
    elif step.kind == "scale":
        allowed = {reads[0]} if reads[1] in (DENSE, reads[0]) else set[int]()
    elif step.kind == "add":
        allowed = {reads[0]} if reads[0] == reads[1] else {DENSE}
    elif step.kind == "cat" and {step.pattern, *reads} != {DENSE}:
        _require(step.pattern != DENSE, step.out)
        parts = [
            torch.full(plan.shapes[name][:1], ALIVE) if number == DENSE else plan.patterns[number]
            for name, number in zip(step.sources, reads, strict=True)
        ]
        _require(torch.equal(torch.cat(parts), plan.patterns[step.pattern]), step.out)
        return
    else:
        allowed = {DENSE}
    _require(step.pattern in allowed, step.out)
    _require(step.kind == "conv" or step.filters == DENSE, step.out)


def _check_memory(step: Step, own: set[str]) -> None:
    """That a step writes over nothing but what a step before it made, and no other value needs or shares."""
    _require(step.adds is None or step.kind == "conv", step.out)
    _require(step.in_place is None or (step.kind == "add" and step.in_place in (0, 1)), step.out)
    target = step.overwrites
    _require(target is None or (target in own and target in step.free and step.sources.count(target) == 1), step.out)
    if step.kind not in ("conv", "add"):  # they may give a view
        own.difference_update(step.sources)
    elif step.pattern == DENSE:
        own.add(step.out)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that its field is said to have."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is UnionType:
        return any(_is_of(value, part) for part in parts)
    if kind is tuple:  # whose members are of one type
        right = isinstance(value, tuple) and (parts[-1] is ... or len(value) == len(parts))
        return right and all(_is_of(member, parts[0]) for member in value)
    if kind is list:
        return isinstance(value, list) and all(_is_of(member, parts[0]) for member in value)
    if kind is dict:
        members = [*value.values()] if isinstance(value, dict) else [None]
        return all(_is_of(member, parts[1]) for member in members)
    return hint is Any or isinstance(value, hint)


def _without_data(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _require(condition: bool, name: str) -> None:
    if not condition:
        raise ValueError(f"what it says of {name} contradicts its operations")
