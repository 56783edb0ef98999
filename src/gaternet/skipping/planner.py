"""Making a plan: from a network's exported graph to steps that may leave closed filters out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from gaternet.aliasing import in_place
from gaternet.channels import ChannelFlow
from gaternet.graph import Conv, Graph, op, shape, walk
from gaternet.method import GateSite
from gaternet.skipping.lifetimes import finish
from gaternet.skipping.plan import DENSE, Call, ConvSpec, Kind, Plan, Ref, Step, is_dense
from gaternet.skipping.stacking import is_stacked, over_batch, stacked_args


def make_plan(graph: Graph, sites: Sequence[GateSite] = ()) -> Plan:
    """The plan of a network whose graph was read with a single image.

    Args:
        graph: of the network, in evaluation mode.
        sites: where gates act on it; none for a network that only is to run fast.

    Raises:
        ValueError: the network writes to a tensor through a view of it, which the graph does not show, or in a way
            that has no twin, or its images change each other's results, or it gives other than one tensor (B, ...).
    """
    _refuse(graph)
    return _Planner(graph, sites).plan()


def _refuse(graph: Graph) -> None:
    """ValueError for a network that has no plan; see `make_plan`."""
    if graph.rewritten:
        name = min(graph.module_of(node) or type(graph.backbone).__name__ for node in graph.rewritten)
        raise ValueError(
            f"a part of what {name} gives is overwritten in place: make a new tensor there, to skip filters"
        )
    for node in graph.nodes:
        if op(node) == "batch_norm" and graph.varies(node) and node.args[5]:
            name = graph.module_of(node) or type(graph.backbone).__name__
            raise ValueError(
                f"{name} normalises with the statistics of the batch, by which images change each other's results: "
                "give it running statistics, to skip filters"
            )
        if node.users and over_batch(node) and graph.varies(node):
            name = graph.module_of(node) or type(graph.backbone).__name__
            raise ValueError(
                f"{name} computes {op(node)} over the images of a batch, by which they change each other's "
                "results: leave the batch's dimension out, to skip filters"
            )
    if graph.result is None:
        raise ValueError(f"{type(graph.backbone).__name__} must give one tensor, to skip filters: wrap it so")
    if shape(graph.result)[:1] != (1,):
        raise ValueError(
            f"{type(graph.backbone).__name__} gives {shape(graph.result)} for one image, without the batch's "
            "dimension: use flatten(1) where it has squeeze(), to skip filters"
        )


class _Planner:
    def __init__(self, graph: Graph, sites: Sequence[GateSite]) -> None:
        self.graph, self.sites = graph, sites
        self.constants: dict[Node, Any] = dict(graph.constants)
        self._made: dict[str, Tensor] = {}  # constants that no node has
        self.patterns: list[Tensor] = []
        self.steps: list[Step] = []
        self._flow = ChannelFlow(graph)
        self._places = {graph.output_of(site.name): site for site in sites}
        self._owners = {site.conv: site for site in sites}
        self._values: dict[Node, str] = {graph.input: graph.input.name}  # which value stands for a node's
        self._pattern_of: dict[str, int] = {graph.input.name: DENSE}
        self._shapes: dict[str, tuple[int, ...]] = {graph.input.name: shape(graph.input)}
        self._dtype = _dtype(graph.input)

    def plan(self) -> Plan:
        graph = self.graph
        for node in graph.nodes:
            if node in self._values or not node.users:  # checks of types and the like have no users
                continue
            if not graph.varies(node):
                self.constants[node] = _evaluate(node, self.constants)
            elif self._is_norm(node):
                self._add_norm(node)
            elif node in graph.convs:
                self._add_conv(graph.convs[node], self._owners.get(graph.convs[node].name))
            else:
                self._add(node)
        if self._places:
            name = next(iter(self._places.values())).name
            raise ValueError(
                f"the gates at {name} cannot be followed: gate what gaternet.find_sites finds, to skip filters"
            )
        assert graph.result is not None
        output = self._values[graph.result]
        steps = finish(self.steps, output)
        channels, height, width = shape(graph.input)[1:]
        return Plan(
            input=graph.input.name,
            output=output,
            input_shape=(channels, height, width),
            num_gates=max((site.stop for site in self.sites), default=0),
            steps=steps,
            shapes={name: size[1:] for name, size in self._shapes.items() if size[:1] == (1,)},
            patterns=self.patterns,
            constants=self._used_constants(),
        )

    def _add_conv(self, conv: Conv, site: GateSite | None) -> None:
        weight, bias = (self._constant(arg) for arg in (*conv.node.args, None)[1:3])
        varies = any(map(self.graph.varies, conv.node.args[1:3]))
        sides = _sides(conv)
        if weight is None or varies or sides is None or shape(conv.source)[0] != 1:  # the image makes them, is cut up
            return self._add(conv.node)
        if weight.dtype != self._dtype:  # no kernels but PyTorch's own mix precisions
            return self._add(conv.node)
        step = Step("conv", conv.node.name, [self._values[conv.source]])
        end = conv.node
        self._flow.run(end)
        norm = self._norm_behind(end)
        if norm is not None:
            weight, bias = self._folded(norm, weight, bias)
            end = self._absorb(norm, step)
        else:  # copied: the network may go on learning
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        if site is not None and self._take_site(end, site):
            self._flow.set_gates(end, site.columns)
            step.pattern = self._pattern(end)
        elif site is None and conv.depthwise and bias is None:
            step.pattern = self._pattern(end)
        step.filters = step.pattern
        self._absorb_relu(end, step)
        name, bias = conv.name or conv.node.name, None if bias is None else bias.detach()
        stride, padding, dilation = sides
        step.conv = ConvSpec(name, weight.detach(), bias, stride, padding, dilation, conv.groups)
        self._append(step, conv.node)
        return None

    def _take_site(self, node: Node, site: GateSite) -> bool:
        """Let the gates act on the node itself, where nothing but what keeps zeros stands between it and the site."""
        if self._places.get(node) != site:
            for user in walk(node):
                if self.graph.effect(user, node) != "keep":
                    return False
                node = user
                if self._places.get(node) == site:
                    break
            else:
                return False
        del self._places[node]
        return True

    def _add_norm(self, norm: Node) -> None:
        """A BatchNorm that no layer before it does, as a depthwise convolution of single pixels."""
        self._flow.run(norm)
        ones = torch.ones_like(self._constant(norm.args[4]), dtype=self._dtype)
        weight, bias = self._folded(norm, ones.reshape(-1, 1, 1, 1), None)
        step = Step("conv", norm.name, [self._values[self.graph.sources(norm)[0]]])
        name = self.graph.module_of(norm) or norm.name
        step.conv = ConvSpec(name, weight.detach(), bias.detach(), (1, 1), (0, 0), (1, 1), len(weight))
        self._absorb_relu(norm, step)
        self._append(step, norm)

    def _is_norm(self, node: Node) -> bool:
        """Whether the node is a BatchNorm of an image's channels, of the images' precision, by constants."""
        if op(node) != "batch_norm" or node in self._places or any(map(self.graph.varies, node.args[1:5])):
            return False
        (source,) = self.graph.sources(node)
        return len(shape(node)) == 4 and shape(node)[0] == 1 and _dtype(node) == _dtype(source) == self._dtype

    def _add(self, node: Node) -> None:
        self._flow.run(node)
        step = self._step(node)
        site = self._places.pop(node, None)
        if site is not None:  # a site that no convolution could take along
            self._flow.set_gates(node, site.columns)
            step.kind, step.pattern, step.mask = "aten", DENSE, site.columns.tolist()
        if step.kind == "add":
            self._absorb_relu(node, step)
        if step.kind in ("keep", "aten"):
            step.stacked = is_stacked(self.graph, node)
            args = stacked_args(node) if step.stacked else node.args
            step.call = Call(_target(node), self._refs(args), self._refs(dict(node.kwargs)))
            if op(node) == "linear" and site is None:
                self._fold_linear(node, step)
            self._cast_back(node, step)
        self._append(step, node)

    def _cast_back(self, node: Node, step: Step) -> None:
        """Where an operation in place kept its tensor's precision, and its twin does not, let another step do that."""
        values: Any = map_arg((node.args, node.kwargs), lambda arg: arg.meta.get("val"))
        if not in_place(node) or (found := _target(node)(*values[0], **values[1])).dtype == _dtype(node):
            return
        twin = replace(step, out=f"{step.out}_twin", mask=None, free=[])
        self._pattern_of[twin.out] = DENSE
        if found.dtype == self._dtype:
            self._shapes[twin.out] = tuple(found.shape)
        self.steps.append(twin)
        step.sources = [twin.out]
        step.call = Call(torch.ops.aten.to.dtype, [Ref(twin.out), _dtype(node)], {})

    def _fold_linear(self, node: Node, step: Step) -> None:
        """Let a linear layer do the BatchNorm behind it."""
        norm, (weight, bias) = self._norm_behind(node), map(self._constant, (*node.args, None)[1:3])
        if norm is None or weight is None or len(shape(node)) != 2 or len(step.sources) > 1:
            return
        weight, bias = self._folded(norm, weight, bias)
        self._made |= {f"{step.out}.weight": weight.detach(), f"{step.out}.bias": bias.detach()}
        source = Ref(step.sources[0])
        step.call = Call(_target(node), [source, Ref(f"{step.out}.weight"), Ref(f"{step.out}.bias")], {})
        self._absorb(norm, step)

    def _step(self, node: Node) -> Step:
        graph, name = self.graph, op(node)
        args: Any = node.args
        sources = graph.sources(node)
        held = [self._pattern_of[self._values[source]] for source in sources]
        step = Step("aten", node.name, list(dict.fromkeys(self._values[source] for source in sources)))
        if any(len(shape(n)) != 4 or shape(n)[0] != 1 or _dtype(n) != self._dtype for n in [node, *sources]):
            return step
        pair = len(sources) == 2 and len(node.args) == 2 and not node.kwargs
        kind: Kind = "aten"
        if len(sources) == 1 == len(node.all_input_nodes) and graph.effect(node, sources[0]) == "keep":
            kind, step.pattern = "keep", held[0]
        elif name == "add" and pair and shape(sources[0]) == shape(sources[1]) == shape(node):
            kind, step.pattern = "add", held[0] if held[0] == held[1] else DENSE
        elif name == "mul" and pair:
            if shape(sources[0]) != shape(node) or (held[0] == DENSE and shape(sources[1]) == shape(node)):
                sources, held = sources[::-1], held[::-1]  # a factor of 1 x 1 pixels may stand on either side
            factor = shape(sources[0]) == shape(node) and shape(sources[1])[1] == shape(node)[1]
            # Of two that have gates the flow follows the first: the product's channels must be those that are held.
            known = held[0] == DENSE or torch.equal(self.patterns[held[0]], self._flow.of(node))
            if factor and known and held[1] in (DENSE, held[0]):
                kind, step.pattern = "scale", held[0]
        elif name == "cat" and (*args, 0)[1] in (1, -3) and list(args[0]) == sources:
            # A part that is held dense must have no gates, else the open channels of the whole are not those held.
            kinds = [p != DENSE or self._pattern(s) == DENSE for p, s in zip(held, sources, strict=True)]
            kind, step.pattern = ("cat", self._pattern(node)) if all(kinds) else (kind, DENSE)
        if kind in ("add", "scale", "cat"):
            step.sources = [self._values[source] for source in sources]
        step.kind = kind
        return step

    def _append(self, step: Step, node: Node) -> None:
        self._values[node] = step.out
        self._pattern_of[step.out] = step.pattern
        if _dtype(node) == self._dtype:
            self._shapes[step.out] = shape(node)
        self.steps.append(step)

    def _pattern(self, node: Node) -> int:
        """Index of the pattern of a node's channels; `DENSE` where no gate decides any."""
        columns = self._flow.of(node)
        if is_dense(columns):
            return DENSE
        for index, known in enumerate(self.patterns):
            if torch.equal(known, columns):
                return index
        self.patterns.append(columns)
        return len(self.patterns) - 1

    def _only_user(self, node: Node, name: str) -> Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and op(users[0]) == name else None

    def _norm_behind(self, node: Node) -> Node | None:
        """The BatchNorm that alone reads the node, where the image makes none of what it normalises with."""
        norm = self._only_user(node, "batch_norm")
        fixed = norm is not None and norm.args[0] is node and not any(map(self.graph.varies, norm.args[1:5]))
        return norm if fixed else None

    def _absorb(self, node: Node, step: Step) -> Node:
        """Let the step compute this node, too."""
        self._flow.run(node)
        self._values[node] = step.out
        return node

    def _absorb_relu(self, node: Node, step: Step) -> None:
        relu = self._only_user(node, "relu")
        if relu is not None and relu not in self._places:
            self._absorb(relu, step)
            step.relu = True

    def _folded(self, norm: Node, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight (out, in, ...) and bias of a layer together with the evaluation-mode BatchNorm behind it."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        found = (self._constant(arg) for arg in norm.args[1:5])
        gamma, beta, mean, var = (None if value is None else value.to(wide) for value in found)
        assert mean is not None
        assert var is not None
        eps: Any = norm.args[7]
        scale = (var + eps).rsqrt() * (1 if gamma is None else gamma)
        shift = (0 if beta is None else beta) + ((0 if bias is None else bias) - mean) * scale
        folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return folded.to(weight.dtype), shift.to(weight.dtype)

    def _constant(self, arg: Any) -> Any:
        """The value of an operation's argument, where no image changes it; else None."""
        return self.constants.get(arg)

    def _refs(self, args: Any) -> Any:
        def ref(node: Node) -> Any:
            if node.op == "get_attr":  # a graph within the graph
                return getattr(node.graph.owning_module, str(node.target))
            return Ref(self._values.get(node, node.name))

        return map_arg(args, ref)

    def _used_constants(self) -> dict[str, Tensor]:
        """Those constants that steps refer to, copied: the network may go on learning."""
        names = {name for step in self.steps if step.call is not None for name in step.call.reads}
        found = {node.name: value.detach().clone() for node, value in self.constants.items() if node.name in names}
        return found | self._made


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _sides(conv: Conv) -> list[tuple[int, int]] | None:
    """(height, width) of a convolution's stride, padding and dilation; None where the two edges of a side differ."""
    if op(conv.node) != "conv2d":
        return None
    given: Any = [*conv.node.args[3:6]]
    stride, padding, dilation = [*given, *[(1, 1), (0, 0), (1, 1)][len(given) :]]
    if padding == "same":
        added = [by * (size - 1) for by, size in zip(_pair(dilation), conv.kernel, strict=True)]  # to both edges
        if any(pixels % 2 for pixels in added):
            return None
        padding = [pixels // 2 for pixels in added]
    return [_pair(side) for side in (stride, (0, 0) if padding == "valid" else padding, dilation)]


def _pair(option: Sequence[int]) -> tuple[int, int]:
    """Height's and width's value of an option of a convolution, which may name one for both."""
    return (option[0], option[-1])


def _target(node: Node) -> Callable[..., Any]:
    """The node's operation by its usual name; its twin that makes a new tensor where it writes in place."""
    target: Any = node.target
    if target is torch.ops.aten.view.default:  # values here may lie in memory otherwise than in the graph's run
        return torch.ops.aten.reshape.default
    schema = getattr(target, "_schema", None)
    if schema is None or schema.name == f"aten::{op(node)}":
        return target
    twin = getattr(getattr(torch.ops.aten, op(node), None), target._overloadname, None)
    if twin is None and in_place(node):
        raise ValueError(f"{target} has no twin that makes a new tensor: leave its underscore out, to skip filters")
    return target if twin is None else twin


@torch.no_grad()
def _evaluate(node: Node, values: Mapping[Node, Any]) -> Any:
    def value(arg: Node) -> Any:
        return getattr(node.graph.owning_module, str(arg.target)) if arg.op == "get_attr" else values[arg]

    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    found = _target(node)(*args, **kwargs)
    return found.to(args[0].dtype) if in_place(node) else found
