"""What to compute, and what may be left out: the backbone's operations as a list of steps.

A tensor is *compact* where some of its channels are decided by gates: then only the open ones are held. Its *pattern*
says which gate decides each channel. A convolution that writes and reads compact tensors uses those rows and columns of
its weights that belong to open channels. Whatever cannot be done on compact tensors is done on dense ones, with zeros
in the
closed channels: that is always right, and saves nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from gaternet.channels import ALIVE, ChannelFlow
from gaternet.graph import Conv, Graph, in_place, op, read_graph, shape, walk
from gaternet.method import GateSite

Kind = Literal["conv", "keep", "add", "scale", "cat", "dense"]
DENSE = -1  # the pattern of a tensor that holds all its channels


@dataclass
class Step:
    """One operation, or a convolution with the BatchNorm and ReLU behind it.

    Attributes:
        node: whose value the step computes.
        kind: "conv"; "keep", on each channel by itself; "add" and "scale", of two tensors; "cat"; "dense", all else.
        sources: the nodes that it reads and that depend on the image.
        pattern: of its value, an index into the plan's patterns, or `DENSE`.
        mask: columns of the gates to multiply with, for a site whose filters run whether open or not; else None.
        free: nodes that nothing reads after this step.
        weight, bias, relu: of a convolution, BatchNorm folded in.
    """

    node: Node
    kind: Kind
    sources: list[Node]
    pattern: int = DENSE
    mask: slice | None = None
    free: list[Node] = field(default_factory=list)
    conv: Conv | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False


class Plan:
    """Steps in execution order, and the patterns of their tensors.

    Args:
        graph: of the backbone, for a single image.
        sites: where the gates act.

    Attributes:
        patterns: for each pattern, the column of the gates for each channel, `ALIVE` for none; (channels,).
        constants: values of the nodes that do not depend on the image.

    Raises:
        ValueError: the network writes to a tensor through a view of it, which the graph does not show.
    """

    def __init__(self, graph: Graph, sites: Sequence[GateSite]) -> None:
        if graph.rewritten:
            name = min(graph.module_of(node) or type(graph.backbone).__name__ for node in graph.rewritten)
            raise ValueError(
                f"a part of what {name} gives is overwritten in place: make a new tensor there, to skip filters"
            )
        self.graph, self.sites = graph, tuple(sites)
        self.constants = dict(graph.constants)
        self.num_gates = max(site.stop for site in sites)
        self.patterns: list[Tensor] = []
        self.steps: list[Step] = []
        self.alias: dict[Node, Node] = {}  # nodes whose value an earlier step has computed already
        self._places = {graph.output_of(site.name): site for site in sites}
        self._flow = ChannelFlow(graph)
        self._patterns_of: dict[Node, int] = {}
        owners = {site.conv: site for site in sites}
        for node in graph.nodes:
            if node in self.alias:
                continue
            if not graph.varies(node):
                self.constants[node] = call(node, self.constants)
            elif node in graph.convs:
                self._add_conv(graph.convs[node], owners.get(graph.convs[node].name))
            else:
                self._add(node)
        self._release()

    def __str__(self) -> str:
        """A line for each convolution: what it may skip."""
        lines = []
        for step in self.steps:
            if step.conv is None:
                continue
            reads = self.pattern_of(step.conv.source)
            reads = reads if step.conv.groups == 1 or reads == step.pattern else DENSE
            parts = [f"reads {'open channels' if reads != DENSE else 'all'} of {step.conv.in_channels}"]
            parts += [f"writes {'open filters' if step.pattern != DENSE else 'all'} of {step.conv.out_channels}"]
            parts += ["masked"] if step.mask else []
            lines.append(f"{step.conv.name or step.node.name}: {', '.join(parts)}")
        kinds = Counter(step.kind for step in self.steps)
        lines.append(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        return "\n".join(lines)

    def resolve(self, node: Node) -> Node:
        """The node whose value stands for this one's."""
        while node in self.alias:
            node = self.alias[node]
        return node

    def pattern_of(self, node: Node) -> int:
        """Pattern of a node's value."""
        return self._patterns_of.get(self.resolve(node), DENSE)

    def _add_conv(self, conv: Conv, site: GateSite | None) -> None:
        weight = self._constant(conv.node.args[1])
        if (
            weight is None or op(conv.node) != "conv2d"
        ):  # weights that the image makes, or a convolution of another kind
            return self._add(conv.node)
        bias = self._constant(conv.node.args[2]) if len(conv.node.args) > 2 else None
        step = Step(conv.node, "conv", [conv.source], conv=conv)
        end = conv.node
        self._flow.run(end)
        norm = self._only_user(end, "batch_norm")
        if norm is not None:
            weight, bias = self._folded(norm, weight, bias)
            end = self._skip_to(norm, end)
        if site is not None and self._leads_to(end, site):
            self._flow.set_gates(end, site.start, site.stop)
            if conv.groups == 1 or conv.depthwise:
                step.pattern = self._pattern(end)
            else:
                step.mask = slice(site.start, site.stop)
        elif site is None and conv.depthwise and bias is None:
            step.pattern = self._pattern(end)
        if act := self._only_user(end, "relu"):
            step.relu, end = True, self._skip_to(act, end)
        step.weight, step.bias = weight.detach(), None if bias is None else bias.detach()
        self._append(step)
        return None

    def _leads_to(self, node: Node, site: GateSite) -> bool:
        """Whether only what keeps zeros stands between the node and the site: then gates may act on the node itself."""
        if self._places.get(node) == site:
            return self._places.pop(node) == site
        for user in walk(node):
            if self.graph.effect(user, node) != "keep":
                return False
            if self._places.get(user) == site:
                return self._places.pop(user) == site
            node = user
        return False

    def _add(self, node: Node) -> None:
        self._flow.run(node)
        graph, name = self.graph, op(node)
        sources = graph.sources(node)
        tensors = bool(shape(node)) and all(shape(source) for source in sources)
        kind: Kind = "dense"
        constants = [arg for arg in node.all_input_nodes if not graph.varies(arg)]
        if tensors and len(sources) == 1 and graph.effect(node, sources[0]) == "keep" and not constants:
            kind = "keep" if len(shape(node)) == 4 else "dense"
        elif tensors and len(sources) == 2 and name in ("add", "mul") and len(node.args) == 2 and not node.kwargs:
            kind = "add" if name == "add" and shape(sources[0]) == shape(sources[1]) else kind
            kind = "scale" if name == "mul" else kind
        elif tensors and name == "cat" and len(shape(node)) == 4 and (*node.args, 0)[1] in (1, -3):
            kind = "cat" if list(node.args[0]) == sources else "dense"  # pyright: ignore[reportArgumentType]
        step = Step(node, kind, list(dict.fromkeys(sources)))
        if (site := self._places.get(node)) is not None:
            self._flow.set_gates(node, site.start, site.stop)
            step.mask, step.kind = slice(site.start, site.stop), "dense"
        elif kind == "keep":
            step.pattern = self.pattern_of(sources[0])
        elif kind == "cat":
            held = [self.pattern_of(source) for source in sources]
            known = all(
                pattern != DENSE or self._pattern(source) == DENSE
                for pattern, source in zip(held, sources, strict=True)
            )
            if any(pattern != DENSE for pattern in held) and known:
                step.pattern = self._pattern(node)
        elif kind == "scale" and shape(node) == shape(sources[0]) and shape(sources[1])[1] == shape(node)[1]:
            step.pattern = self.pattern_of(sources[0])
            agrees = self.pattern_of(sources[1]) in (DENSE, step.pattern)
            step.kind, step.pattern = ("scale", step.pattern) if agrees else ("dense", DENSE)
        elif kind == "scale":
            step.kind = "dense"
        elif kind == "add":
            first, second = (self.pattern_of(source) for source in sources)
            step.pattern = first if first == second else DENSE
        self._append(step)

    def _append(self, step: Step) -> None:
        self._patterns_of[step.node] = step.pattern
        self.steps.append(step)

    def _pattern(self, node: Node) -> int:
        """Index of the pattern of a node's channels; `DENSE` where no gate decides any."""
        columns = self._flow.of(node)
        if (columns == ALIVE).all():
            return DENSE
        for index, known in enumerate(self.patterns):
            if torch.equal(known, columns):
                return index
        self.patterns.append(columns)
        return len(self.patterns) - 1

    def _only_user(self, node: Node, name: str) -> Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and op(users[0]) == name else None

    def _skip_to(self, node: Node, before: Node) -> Node:
        """Let the step that computes `before` compute `node`, too."""
        self._flow.run(node)
        self.alias[node] = before
        return node

    def _constant(self, node: Any) -> Tensor | None:
        return self.constants.get(node)

    def _folded(self, norm: Node, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and bias of a convolution with the evaluation-mode BatchNorm behind it (B, C, H, W) -> the same."""
        gamma, beta, mean, var = (self._constant(arg) for arg in norm.args[1:5])
        assert mean is not None
        assert var is not None
        eps: Any = norm.args[7]
        scale = (var + eps).rsqrt()
        scale = scale if gamma is None else scale * gamma
        shift = (0 if beta is None else beta) + ((0 if bias is None else bias) - mean) * scale
        return weight * scale[:, None, None, None], shift

    def _release(self) -> None:
        """Note after which step each value is read no more."""
        last = {}
        for step in self.steps:
            for source in step.sources:
                last[self.resolve(source)] = step
        kept = {self.resolve(node) for node in self.graph.output.all_input_nodes}
        for node, step in last.items():
            if node not in kept:
                step.free.append(node)


@torch.no_grad()
def call(node: Node, values: Mapping[Node, Any]) -> Any:
    """Run a node's operation on the values of its inputs; never in place."""
    target: Any = node.target
    if in_place(node):
        target = getattr(getattr(torch.ops.aten, op(node)), target._overloadname)

    def value(arg: Node) -> Any:
        return getattr(node.graph.owning_module, str(arg.target)) if arg.op == "get_attr" else values[arg]

    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    return target(*args, **kwargs)


def plan_for(backbone: nn.Module, sites: Sequence[GateSite], example_input: Tensor) -> Plan:
    """Read a backbone's graph for single images, and plan it."""
    return Plan(read_graph(backbone, example_input[:1]), sites)
