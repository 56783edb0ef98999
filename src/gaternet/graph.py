"""A network's exported graph, read channel by channel.

`torch.export` traces any CNN into ATen operations (torch.fx does not: timm's control flow stops it). `Graph` answers
what gating, counting and skipping ask of it: what each convolution is called, what happens to a channel on its way, and
which module gives out which tensor, since gates act on the outputs of modules.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from gaternet.aliasing import in_place, read_what_was_written
from gaternet.errors import fills_memory, first_line
from gaternet.modes import evaluation_mode, quiet, trial_copy, without_autocast
from gaternet.wrapping import require_network, uncompiled

# What an operation does to the channels (dimension 1) of a tensor: "keep" acts on each by itself and turns a channel of
# zeros into one of zeros; "shift" acts on each by itself, but zeros become something else; "view" only moves values.
_KEEP = frozenset(
    {"relu", "relu6", "leaky_relu", "rrelu", "prelu", "_prelu_kernel", "elu", "selu", "celu", "silu", "gelu", "mish"}
    | {"tanh", "hardswish", "abs", "neg", "square", "dropout", "feature_dropout", "max_pool2d", "avg_pool2d"}
    | {"adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"}
    | {"_upsample_bilinear2d_aa", "clone", "contiguous", "to", "_to_copy", "detach", "alias"}
    | {"reflection_pad2d", "replication_pad2d"}
)
_SHIFT = frozenset({"batch_norm", "instance_norm", "sigmoid", "hardsigmoid", "softplus"})
_VIEW = frozenset(
    {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "expand_as"}
    | {"split", "split_with_sizes", "chunk", "unbind", "getitem", "slice", "select", "narrow", "roll"}
    | {"channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}
)
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"})
_MIXERS = frozenset({"softmax", "unfold", "im2col"})
CONVS = frozenset({"conv2d", "convolution"})
LAYERS = CONVS | {"conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "linear", "addmm", "embedding"}
# PyTorch exports these under the name by which they were called
_ALIASES = {"concat": "cat", "concatenate": "cat", "multiply": "mul", "subtract": "sub", "divide": "div"}
_ALIASES |= {"true_divide": "div", "clip": "clamp", "negative": "neg", "absolute": "abs", "special_expit": "sigmoid"}
_ALIASES |= {"swapaxes": "transpose", "swapdims": "transpose"}
_HELD = ("_parameters", "_buffers", "_modules")  # where an nn.Module has these


def op(node: Node) -> str:
    """The operation's usual name, without overload and in-place mark: "relu" for aten.relu_.default; "" for none."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.removeprefix("aten::") if schema is not None else getattr(node.target, "__name__", "")
    name = name.rstrip("_") or name
    return _ALIASES.get(name, name)


def shape(node: Node) -> tuple[int, ...]:
    """Of the node's tensor; () where it is none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


@dataclass(frozen=True)
class Conv:
    """One run of a 2-D convolution.

    Attributes:
        name: its module, "" where a function computes it outside of an nn.Conv2d.
        node: its output (B, out_channels, H, W).
        source: its input (B, in_channels, H, W).
        groups: as in nn.Conv2d.
        kernel: (height, width).
        bias: whether it has one.
    """

    name: str
    node: Node
    source: Node
    groups: int
    kernel: tuple[int, int]
    bias: bool

    @property
    def in_channels(self) -> int:
        return shape(self.source)[1]

    @property
    def out_channels(self) -> int:
        return shape(self.node)[1]

    @property
    def depthwise(self) -> bool:
        """Whether channel c of the output reads channel c of the input, and nothing else."""
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def macs_per_pair(self) -> int:
        """Multiply-accumulates of one image for one filter and one of the channels that it reads."""
        return math.prod(self.kernel) * math.prod(shape(self.node)[2:])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.macs_per_pair * self.out_channels * self.in_channels // self.groups


class Graph:
    """The operations of one evaluation-mode run of `backbone`.

    Attributes:
        backbone: the network, with its modules' names.
        example_input: the images (B, channels, H, W) that it was traced with.
        nodes: operations, in the order in which they run.
        convs: its 2-D convolutions, by their nodes.
        result: the tensor that it gives; None where it gives something else, or several, or one that no image changes.
        several: names of the modules that give something else than one tensor.
        rewritten: nodes that are read after something wrote to their tensor's memory: what they hold then is not known.
        constants: the weights, running statistics and other tensors that it reads, by their nodes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        program: torch.export.ExportedProgram,
        example_input: Tensor,
        several: frozenset[str] = frozenset(),
    ) -> None:
        self.backbone, self.example_input, self.several = backbone, example_input, several
        self.modules = dict(backbone.named_modules())
        first = {module: name for name, module in self.modules.items()}
        # A module that lies in two places is known by the first, whichever it was called by.
        self._names = {name: first[module] for name, module in backbone.named_modules(remove_duplicate=False)}
        inputs = set(program.graph_signature.user_inputs)
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.rewritten = read_what_was_written(self.nodes)
        self.constants = _constants(program)
        self.input = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
        self.output = next(node for node in program.graph.nodes if node.op == "output")
        self._varying = {self.input}
        for node in self.nodes:
            if any(source in self._varying for source in node.all_input_nodes):
                self._varying.add(node)
        given: Any = self.output.args[0]
        alone = program.call_spec.out_spec is not None and program.call_spec.out_spec.is_leaf()
        one = alone and self.varies(given[0]) and isinstance(given[0].meta.get("val"), Tensor)
        self.result: Node | None = given[0] if one else None
        self._exits = self._find_exits()
        self.convs = {node: self._conv(node) for node in self.nodes if self._convolves(node)}
        last = {self._stack(node)[-1]: node for node in self.convs if self.is_layer(node)}
        for node, conv in self.convs.items():  # a module that convolves twice has its name for the last, which it gates
            if last.get(self._stack(node)[-1], node) is not node:
                self.convs[node] = replace(conv, name="")

    def varies(self, node: Any) -> bool:
        """Whether the node's value depends on the image; weights, and what is made of them alone, do not."""
        return node in self._varying

    def runs(self, name: str) -> int:
        """How often the module of that name runs."""
        return len(self._exits.get(name, []))

    def sources(self, node: Node) -> list[Node]:
        """The inputs of a node that depend on the image."""
        return [source for source in node.all_input_nodes if self.varies(source)]

    def effect(self, node: Node, source: Node) -> Literal["keep", "shift"] | None:
        """What `node` does to the channels of its input `source`; None for anything but "keep" and "shift"."""
        name, before, after = op(node), shape(source), shape(node)
        args: list[Any] = list(node.args)
        others = [arg for arg in args if isinstance(arg, Node) and arg is not source]
        if len(before) < 2 or len(after) < 2 or before[1] != after[1] or source in self.rewritten:
            return None
        if name in _KEEP:
            return "keep"
        if name in _SHIFT:
            return "shift"
        if name in ("clamp", "hardtanh", "clamp_min", "clamp_max"):
            bounds = (None, args[1]) if name == "clamp_max" else (*args[1:3], None, None)
            if any(isinstance(bound, Node) for bound in bounds):
                return None
            return "keep" if (bounds[0] or 0) <= 0 <= (bounds[1] or 0) else "shift"
        if name in ("pad", "constant_pad_nd"):
            value = args[-1] if isinstance(args[-1], int | float) else 0
            return "keep" if value == 0 and len(args[1]) <= 4 and len(before) == 4 else None
        if name in ("mean", "sum", "amax") and len(before) == 4 and len(args) > 1:
            dims = [args[1]] if isinstance(args[1], int) else args[1] or range(4)
            return "keep" if {dim % 4 for dim in dims} <= {2, 3} else None
        if name == "mul":
            return "keep"
        if name == "div":
            return "keep" if args[0] is source and not any(map(self.varies, others)) else None
        if name == "pow":
            return "keep" if isinstance(args[1], int | float) and args[1] > 0 else None
        if name in ("add", "sub"):
            if any(isinstance(arg, int | float) and arg == 0 for arg in args[:2]):
                return "keep"
            return "shift" if not any(map(self.varies, others)) and len(args) > 1 else None
        if name in CONVS and node in self.convs:  # a fixed blur, channel by channel
            conv = self.convs[node]
            return "keep" if conv.depthwise and not conv.bias and not self._learns(node) else None
        return None

    def is_layer(self, node: Node) -> bool:
        """Whether the node is a layer with weights that mixes channels: where the way of a channel ends."""
        return op(node) in LAYERS and not (node in self.convs and self.effect(node, self.convs[node].source) == "keep")

    def is_view(self, node: Node) -> bool:
        """Whether the node only moves, splits or repeats values."""
        return op(node) in _VIEW and node.target is not torch.ops.aten.view.dtype

    def is_attention(self, node: Node) -> bool:
        """Whether the node mixes positions or channels with weights that come from the image."""
        if op(node) in _PRODUCTS:
            return len(self.sources(node)) > 1
        return op(node) in _MIXERS or any(op(step) in _PRODUCTS for step in _inner_nodes(node))

    @cached_property
    def inner_convs(self) -> set[str]:
        """The modules that convolve within a graph inside of this one, such as under an autocast of their own."""
        inner = (step for node in self.nodes for step in _inner_nodes(node))
        return {self.module_of(step) for step in inner if op(step) in CONVS}

    @cached_property
    def attention_modules(self) -> set[str]:
        """The modules, but not the whole network, that multiply features by features in a matrix product."""
        products = [node for node in self.nodes if self.is_attention(node) and op(node) not in _MIXERS]
        return {self.module_of(node) for node in products} - {""}

    def module_of(self, node: Node) -> str:
        """Name of the innermost module that computes the node; "" for the network itself."""
        return self._stack(node)[-1][1]

    def module_type(self, node: Node) -> str:
        """Class name of that module."""
        return type(self.modules.get(self.module_of(node), self.backbone)).__name__

    def writes_to_its_input(self, name: str, node: Node) -> bool:
        """Whether what the module gives out, this node, is its input, changed in place.

        Then it may be read as either, and the graph does not tell as which.
        """
        source = node.args[0] if node.args else None
        return in_place(node) and isinstance(source, Node) and name not in {path for _, path in self._stack(source)}

    def output_of(self, name: str) -> Node | None:
        """The tensor that the module gives out, where it runs once and gives out one."""
        match self._exits.get(name):
            case [[node]]:
                return node
        return None

    def shares_weights(self, conv: Conv) -> bool:
        """Whether another operation reads the weights of the convolution, too."""
        weight = conv.node.args[1]
        return isinstance(weight, Node) and len(weight.users) > 1

    def _convolves(self, node: Node) -> bool:
        """Whether the node is a 2-D convolution of what depends on the image, and no transposed one."""
        transposed = op(node) == "convolution" and node.args[6]
        return op(node) in CONVS and self.varies(node) and len(shape(node)) == 4 and not transposed

    def _learns(self, node: Node) -> bool:
        weight = node.args[1]
        return isinstance(weight, Node) and not weight.name.startswith("b_")

    def _conv(self, node: Node) -> Conv:
        args: list[Any] = [*node.args, *[None] * 9]
        groups = (args[8] if op(node) == "convolution" else args[6]) or 1
        name = self.module_of(node)
        name = name if isinstance(self.modules.get(name), nn.Conv2d) else ""
        height, width = shape(args[1])[2:]
        return Conv(name, node, args[0], groups, (height, width), args[2] is not None)

    def _stack(self, node: Node) -> list[tuple[str, str]]:
        """(call, module) from the network inwards; calls of one module differ."""
        stack = node.meta.get("nn_module_stack", {})
        return [(key, self._names.get(str(path), str(path))) for key, (path, _) in stack.items()] or [("", "")]

    def _find_exits(self) -> dict[str, list[list[Node]]]:
        """For each module, by name, and each of its runs the nodes whose tensors leave it."""
        runs: dict[str, tuple[str, list[Node]]] = {}  # by what tells them apart: the module's name, and the nodes
        inside = {node: {key for key, _ in self._stack(node)} for node in self.nodes}
        for node in self.nodes:
            for key, name in self._stack(node):
                _, exits = runs.setdefault(key, (name, []))
                if any(key not in inside.get(user, ()) for user in node.users):
                    exits.append(node)
        found: dict[str, list[list[Node]]] = {}
        for name, exits in runs.values():
            found.setdefault(name, []).append(exits)
        return found


def read_graph(backbone: nn.Module, example_input: Tensor) -> Graph:
    """Export a network in evaluation mode, and leave it as it was; other threads may run it meanwhile.

    Args:
        backbone: maps images to logits.
        example_input: images (B, channels, H, W), such as it is to be used with; their values do not matter.

    Raises:
        ValueError: the network cannot be exported, or does not take such images.
        TypeError: it is no module.
    """
    require_network(backbone, "backbone")
    if uncompiled(backbone) is not backbone:
        raise ValueError("the backbone is compiled by itself: let torch.compile take the GaterNet around it")
    if not isinstance(example_input, Tensor) or example_input.ndim != 4:
        given = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(f"the example must be one tensor of images (B, channels, H, W), not {given}")
    if not example_input.numel():
        raise ValueError(f"the example must have images, but is {tuple(example_input.shape)}: pass one at least")
    for name, module in backbone.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the backbone'} is a ScriptModule: pass the module that it was made from")
    precision, twin = without_autocast(example_input.device.type), trial_copy(backbone)
    try:
        with quiet(), precision, evaluation_mode(twin), _as_it_was(twin), _several(twin) as several, torch.no_grad():
            program = torch.export.export(twin, (example_input,), strict=False)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        if fills_memory(error):
            raise
        raise ValueError(
            f"{type(backbone).__name__} cannot be exported with images {tuple(example_input.shape)} "
            f"({first_line(error)}): try "
            "torch.export.export on it, and mend what that names or give images of another shape"
        ) from error
    graph = Graph(backbone, program, example_input, frozenset(several))
    for conv in graph.convs.values():  # the export lets it pass
        given, weights = (source.meta["val"].dtype for source in conv.node.all_input_nodes[:2])
        if given != weights:
            where = conv.name or "a convolution"
            raise ValueError(f"{where} takes {given} with weights of {weights}: give images of the weights' precision")
    return graph


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """What a network adds to itself in a run goes when that is over: in an export it holds no numbers."""
    before = [(vars(module), set(vars(module))) for module in network.modules()]
    held = [(own[name], dict(own[name])) for own, _ in before for name in _HELD]
    try:
        yield
    finally:
        for own, names in before:
            for name in own.keys() - names:
                own.pop(name)
        for items, entries in held:
            items.clear()
            items.update(entries)


@contextmanager
def _several(network: nn.Module) -> Iterator[set[str]]:
    """Names of the modules that in a run give something else than one tensor; the graph does not tell."""
    found = set[str]()

    def look(name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            found.add(name)

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in network.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def walk(node: Node) -> Iterator[Node]:
    """The chain of single users behind a node, up to a tensor that is used more than once, or not at all."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node


def _constants(program: torch.export.ExportedProgram) -> dict[Node, Tensor]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    found: dict[Node, Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and (name := names.get(node.name)) is not None:
            value = program.state_dict.get(name, program.constants.get(name))
            assert isinstance(value, Tensor)
            found[node] = value
    return found


def _inner_nodes(node: Node) -> list[Node]:
    """The operations of a node that runs a whole graph, such as one under another autocast."""
    names = [str(arg.target) for arg in node.args if isinstance(arg, Node) and arg.op == "get_attr"]
    graphs = [getattr(getattr(node.graph.owning_module, name, None), "graph", None) for name in names]
    return [step for graph in graphs if graph is not None for step in graph.nodes]
