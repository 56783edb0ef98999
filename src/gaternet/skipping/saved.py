"""Plans as files: JSON in the header of a safetensors file, and PyTorch's operations by name.

Files come from anywhere. So a plan names operations of a list alone, and it is checked before it runs, for compiled
code trusts its shapes.
"""

import dataclasses
import json
import operator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from gaternet.files import write_atomically
from gaternet.skipping.checks import check_plan
from gaternet.skipping.plan import Call, ConvSpec, Plan, Ref, Step

FORMAT = 1
# What networks compute going forward, with an overload where not all will do. These check what they are given, sizes
# and indices included, before they read any of it. Many others of PyTorch do not: backward passes trust indices, which
# a file could choose, and upsampling trusts scales beside sizes. Division with rounding can end the process.
_OPERATIONS = """
relu relu6 leaky_relu rrelu prelu elu selu celu silu gelu mish tanh hardswish hardtanh hardsigmoid sigmoid softplus glu
log_sigmoid threshold hardshrink softshrink softmax log_softmax dropout feature_dropout
add sub rsub mul div.Tensor div.Scalar addcmul addcdiv lerp pow square sqrt rsqrt reciprocal exp log sin cos erf
abs neg sign floor ceil round clamp clamp_min clamp_max minimum maximum where masked_fill
eq ne gt ge lt le logical_not logical_and logical_or
mean sum prod amax amin max min var std var_mean std_mean logsumexp cumsum norm linalg_vector_norm argmax topk sort
matmul mm bmm addmm baddbmm einsum linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d convolution
scaled_dot_product_attention embedding index index_select gather
batch_norm instance_norm group_norm layer_norm rms_norm
max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec
pad constant_pad_nd reflection_pad2d replication_pad2d im2col col2im unfold
pixel_shuffle pixel_unshuffle channel_shuffle
view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze expand
expand_as split split_with_sizes chunk unbind slice select narrow diagonal roll flip repeat repeat_interleave.self_int
tile cat stack tril triu
clone copy contiguous detach alias to _to_copy type_as zeros_like ones_like full_like new_zeros new_ones new_full
"""
_LISTED = frozenset(_OPERATIONS.split())


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
    held = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(held, temporary, {"plan": text}))


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
    if _is_allowed(target):
        return str(target).removeprefix("aten.")
    raise ValueError(f"a plan with the operation {target} cannot be saved: save the model with save_pretrained")


def _op(name: str) -> Any:
    """An operation by the name that `_op_name` gave it."""
    if name == "getitem":
        return operator.getitem
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not _is_allowed(found):
        raise ValueError(f"it names the operation {name!r}, which is none of PyTorch's that a plan may hold")
    return found


def _is_allowed(target: Any) -> bool:
    """Whether it is an operation of the list, in a form that reads tensors and writes to none."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    name, schema = str(target).removeprefix("aten."), target._schema
    listed = not _LISTED.isdisjoint((name, name.partition(".")[0]))
    return listed and not schema.is_mutable and any("Tensor" in str(arg.type) for arg in schema.arguments)
