"""Plans as files: JSON in the header of a safetensors file, and PyTorch's operations by name.

Files come from anywhere. So a plan names operations that compute tensors from tensors and do nothing else, and it is
checked before it runs, for compiled code trusts its shapes.
"""

import dataclasses
import json
import operator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from gaternet.skipping.checks import check_plan
from gaternet.skipping.plan import Call, ConvSpec, Plan, Ref, Step

FORMAT = 1


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan with its weights to a safetensors file.

    Raises:
        ValueError: it has an operation that a file must not name.
    """
    tensors = {f"constant.{name}": tensor for name, tensor in plan.constants.items()}
    tensors |= {f"pattern.{i}": tensor for i, tensor in enumerate(plan.patterns)}
    steps = []
    for step in plan.steps:
        fields = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
        if step.conv is not None:
            spec = {f.name: getattr(step.conv, f.name) for f in dataclasses.fields(step.conv)}
            tensors[f"weight.{step.out}"] = spec.pop("weight")
            if (bias := spec.pop("bias")) is not None:
                tensors[f"bias.{step.out}"] = bias
            fields["conv"] = spec
        if step.call is not None:
            fields["call"] = [_op_name(step.call.target), _plain(step.call.args), _plain(step.call.kwargs)]
        steps.append(fields)
    header = {name: getattr(plan, name) for name in ("input", "output", "input_shape", "num_gates", "shapes")}
    text = json.dumps({"format": FORMAT, **header, "steps": steps})
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, {"plan": text})


def load_plan(path: Path, device: str | torch.device = "cpu") -> Plan:
    """Read a plan that `save_plan` wrote; its weights come to `device`.

    Raises:
        OSError: there is no such file.
        ValueError: the file is no plan, or of another format, or damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("plan")
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a plan: {error}") from error
    try:
        data = json.loads(text) if text else {}
        if data.pop("format", None) != FORMAT:
            raise ValueError("it is of another version")
        plan = _read(data, tensors)
        check_plan(plan)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a plan of this version ({error}): save it anew with skip(...).save") from error
    return plan.to(torch.device(device))


def _read(data: dict[str, Any], tensors: dict[str, Any]) -> Plan:
    steps = []
    for fields in data.pop("steps"):
        if fields["conv"] is not None:
            spec: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields["conv"].items()}
            weight, bias = tensors[f"weight.{fields['out']}"], tensors.get(f"bias.{fields['out']}")
            fields["conv"] = ConvSpec(weight=weight, bias=bias, **spec)
        if fields["call"] is not None:
            name, args, kwargs = fields["call"]
            fields["call"] = Call(_op(name), _filled_in(args), _filled_in(kwargs))
        steps.append(Step(**fields))
    count = sum(name.startswith("pattern.") for name in tensors)
    patterns = [tensors[f"pattern.{i}"] for i in range(count)]
    prefix = "constant."
    constants = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    data["input_shape"] = tuple(data["input_shape"])
    data["shapes"] = {name: tuple(size) for name, size in data["shapes"].items()}
    return Plan(**data, steps=steps, patterns=patterns, constants=constants)


_PLAIN = (torch.dtype, torch.memory_format, torch.layout)


def _plain(args: Any) -> Any:
    """Arguments as JSON holds them."""
    if isinstance(args, Ref):
        return {"ref": args.name}
    if isinstance(args, list | tuple):
        return [_plain(arg) for arg in args]
    if isinstance(args, dict):
        return {"dict": {name: _plain(arg) for name, arg in args.items()}}
    if isinstance(args, _PLAIN):
        return {"torch": str(args).removeprefix("torch.")}
    if isinstance(args, torch.device):
        return {"device": str(args)}
    if args is None or isinstance(args, bool | int | float | str):
        return args
    raise ValueError(f"a plan with {args!r} in it cannot be saved")


def _filled_in(args: Any) -> Any:
    """What `_plain` took apart."""
    if isinstance(args, list):
        return [_filled_in(arg) for arg in args]
    if not isinstance(args, dict):
        return args
    ((kind, value),) = args.items()
    if kind == "dict":
        return {name: _filled_in(arg) for name, arg in value.items()}
    if kind == "ref":
        return Ref(value)
    if kind == "device":
        return torch.device(value)
    found = getattr(torch, value, None)
    if not isinstance(found, _PLAIN):
        raise ValueError(f"it names torch.{value}")
    return found


def _op_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if _is_harmless(target):
        return str(target).removeprefix("aten.")
    raise ValueError(f"a plan with the operation {target} cannot be saved")


def _op(name: str) -> Any:
    """An operation by the name that `_op_name` gave it."""
    if name == "getitem":
        return operator.getitem
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not _is_harmless(found):
        raise ValueError(f"it names the operation {name!r}, which is none of PyTorch's that a plan may hold")
    return found


def _is_harmless(target: Any) -> bool:
    """Whether it is an operation that computes tensors from tensors, and neither writes to them nor reads files."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    schema = target._schema
    internal = schema.name.startswith("aten::_") and torch.Tag.core not in target.tags
    return not schema.is_mutable and not internal and any("Tensor" in str(arg.type) for arg in schema.arguments)
