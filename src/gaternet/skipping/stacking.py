"""Which operations of a graph of one image may run on a whole batch at once.

A graph that was read with a single image has its batch size, 1, in the arguments of views and elsewhere. An operation
is *stacked* where running it on the stacked values of several images gives the stacked results.
"""

from typing import Any

import torch
from torch.fx import Node

from gaternet.graph import CONVS, Graph, op, shape

_BY_IMAGE = (
    {"relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "silu", "gelu", "mish", "tanh", "hardswish"}
    | {"hardtanh", "sigmoid", "hardsigmoid", "softplus", "clamp", "abs", "neg", "square", "exp", "sqrt", "rsqrt"}
    | {"prelu", "_prelu_kernel", "dropout", "feature_dropout", "clone", "contiguous", "to", "_to_copy", "detach"}
    | {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "pad", "constant_pad_nd"}
    | {"upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad2d", "replication_pad2d"}
    | {"batch_norm", "group_norm", "linear", "getitem", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "alias"}
    | CONVS
)
_PAIRS = frozenset({"add", "sub", "mul", "div", "minimum", "maximum", "pow", "gt", "ge", "lt", "le"})
_ALONG = {"mean": 1, "sum": 1, "amax": 1, "softmax": 1, "chunk": 2, "split": 2, "split_with_sizes": 2, "slice": 1}
_ALONG |= {"select": 1, "unbind": 1, "cat": 1, "flatten": 1}
_REDUCTIONS = frozenset(
    {"mean", "sum", "prod", "amax", "amin", "aminmax", "max", "min", "median", "std", "std_mean", "var", "var_mean"}
    | {"norm", "linalg_vector_norm", "logsumexp", "softmax", "log_softmax", "cumsum", "argmax", "argmin", "sort"}
)
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def is_stacked(graph: Graph, node: Node) -> bool:
    """Whether the node's operation, with `stacked_args`, treats a batch as it would treat its images one by one."""
    name, sources = op(node), graph.sources(node)
    args: Any = node.args
    if not all(map(_one, [node, *sources])):
        return False
    size = shape(sources[0])
    if name in _BY_IMAGE:
        return sources == [args[0]]  # no weights that the image makes
    if name in _PAIRS:
        ranks = {len(shape(value)) for value in [node, *sources]}
        others = [shape(arg) for arg in node.all_input_nodes if arg not in sources]
        return len(ranks) == 1 and all(len(other) < len(size) or other[0] == 1 for other in others)
    if name == "cat" and any(arg not in sources for arg in node.all_input_nodes):
        return False  # a constant, one for all images
    if name in _ALONG:
        dims: Any = (*args, *[None] * 3)[_ALONG[name]]
        dims = dims if isinstance(dims, list | tuple) else [0 if dims is None else dims]
        rank = len(size) or len(shape(node))
        return bool(dims) and rank > 1 and all(dim % rank != 0 for dim in dims)
    if name == "permute":
        return args[1][0] == 0
    if name == "transpose":
        return all(dim % len(size) != 0 for dim in args[1:3])
    return node.target in _RESHAPES


def stacked_args(node: Node) -> tuple[Any, ...]:
    """The node's arguments, for any number of images."""
    if node.target in _RESHAPES:
        return (node.args[0], [-1, *shape(node)[1:]])
    return node.args


def over_batch(node: Node) -> bool:
    """Whether the node sums, averages or compares over the images of a batch, its tensors' first dimension.

    It is not seen where that was merged with another one.
    """
    schema = getattr(node.target, "_schema", None)
    if op(node) not in _REDUCTIONS or schema is None or not isinstance(source := node.args[0], Node):
        return False
    place = next((i for i, argument in enumerate(schema.arguments) if argument.name == "dim"), None)
    if place is None:  # over all dimensions, or one of two tensors
        return len(node.all_input_nodes) == 1
    default = schema.arguments[place].default_value
    given: Any = node.kwargs.get("dim", node.args[place] if len(node.args) > place else default)
    dims = [given] if isinstance(given, int) else given
    rank = len(shape(source))
    return not dims or (shape(source)[:1] == (1,) and any(dim % rank == 0 for dim in dims))


def _one(node: Node) -> bool:
    """Whether the node has one image's tensor, or a list of such."""
    value: Any = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return all(getattr(part, "ndim", 0) > 0 and part.shape[0] == 1 for part in parts)
