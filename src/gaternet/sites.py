"""Which filters can be gated, and where: read from the backbone's exported graph.

A gate acts behind its filter where a closed one leaves a channel of exact zeros, and where nothing before that place
mixes channels: then a closed filter need not run. That is behind the BatchNorm that follows the convolution, or behind
the convolution itself where none follows. Filters for which there is no such place are left out, each with a reason.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.fx import Node

from gaternet.channels import ChannelFlow, contiguous
from gaternet.graph import Conv, Graph, op, read_graph, shape, walk
from gaternet.method import GateSite

Selection = Literal["residual", "all"] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class SiteReport:
    """What `find_sites` found.

    Attributes:
        sites: where gates act, in execution order.
        left_out: names of the other convolutions, with the reason why each has no gates.
    """

    sites: tuple[GateSite, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Place:
    """Where the gates of a convolution act: on the output `node` of the module `name`."""

    conv: Conv
    name: str
    node: Node


def find_sites(
    backbone: nn.Module, example_input: Tensor, sites: Selection = "residual", group_size: int = 1
) -> list[GateSite]:
    """The filters of a network that can be gated.

    Args:
        backbone: any network with 2-D convolutions that `torch.export` can export; it stays as it is.
        example_input: images (B, channels, H, W) as it takes them.
        sites: "residual", the paper's rule: the last convolution of each residual unit; in networks without such units,
            the last of each densely connected unit, else every convolution. "all": every convolution whose closing is
            exact. Or a predicate on (name, module) of a convolution.
        group_size: number of neighbouring filters that share a gate. Where it does not divide the number of filters,
            the largest number that divides both is taken.

    Returns:
        The sites in execution order. A depthwise convolution shares the gates of the convolution that feeds it, where
        that is gated, too.

    Raises:
        ValueError: the network cannot be exported, or none of its filters can be gated, the message says why; or the
            example is no tensor of images, or group_size below 1.
        TypeError: the backbone is no module.
    """
    return list(examine(read_graph(backbone, example_input), sites, group_size).sites)


def examine(graph: Graph, sites: Selection = "residual", group_size: int = 1) -> SiteReport:
    """`find_sites` on a graph that was read already, with the reasons for what is left out."""
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number, at least 1, but is {group_size!r}")
    if not callable(sites) and sites not in ("residual", "all"):
        raise ValueError(f"sites must be 'residual', 'all' or a predicate on (name, module), not {sites!r:.60}")
    places: dict[Node, _Place] = {}
    left_out = dict.fromkeys(graph.inner_convs, "it runs in a block of its own: put autocast around the call instead")
    for node, conv in graph.convs.items():
        if graph.effect(node, conv.source) == "keep":  # a fixed blur has no filters to learn
            continue
        place = _place(graph, conv)
        if isinstance(place, str):
            left_out[conv.name or node.name] = place
        else:
            places[node] = place
    roles = _roles(graph)
    chosen = _choose(graph, places, roles, sites, left_out)
    found = _number(graph, chosen, roles, group_size)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5]) or "it has no nn.Conv2d"
        raise ValueError(f"no filter of {type(graph.backbone).__name__} can be gated with sites={sites!r}: {reasons}")
    return SiteReport(tuple(found), left_out)


def _choose(
    graph: Graph, places: dict[Node, _Place], roles: dict[Node, str], sites: Selection, left_out: dict[str, str]
) -> dict[Node, _Place]:
    """The places that the selection picks; why the others are not goes to `left_out`."""
    if callable(sites):
        picked = {node for node, place in places.items() if sites(place.conv.name, graph.modules[place.conv.name])}
        why = "the predicate does not pick it"
    elif sites == "all":
        return places
    elif residual := {node for node, role in roles.items() if role == "residual"}:
        picked, why = residual, "it is not the last convolution of a residual unit"
    elif dense := {node for node, role in roles.items() if role == "dense"}:
        picked, why = dense, "it is not the last convolution of a densely connected unit"
    else:
        return places
    left_out |= {place.conv.name: why for node, place in places.items() if node not in picked}
    return {node: place for node, place in places.items() if node in picked}


def _number(graph: Graph, chosen: dict[Node, _Place], roles: dict[Node, str], group_size: int) -> list[GateSite]:
    """Give each place its columns of the gates, in execution order; depthwise convolutions those of their input."""
    by_node = {place.node: place for place in chosen.values()}
    flow, found, stop = ChannelFlow(graph), [], 0
    for node in graph.nodes:
        flow.run(node)
        if node not in by_node:
            continue
        place = by_node[node]
        conv = place.conv
        size = math.gcd(group_size, conv.out_channels)
        end = stop + conv.out_channels // size
        site = GateSite(place.name, conv.name, stop, end, roles.get(conv.node, "inner"), size)
        if conv.depthwise and (shared := contiguous(flow.of(conv.source))):
            site = replace(site, start=shared[0], stop=shared[1], group_size=shared[2], role="depthwise")
        stop = max(stop, site.stop)
        flow.set_gates(node, site.columns)
        found.append(site)
    return found


def _place(graph: Graph, conv: Conv) -> _Place | str:
    """Where the gates of a convolution act, or why there is no such place."""
    if not conv.name:
        return f"a function computes it within {graph.module_type(conv.node)}, not an nn.Conv2d"
    if graph.runs(conv.name) > 1:
        return f"it runs {graph.runs(conv.name)} times"
    if graph.modules[conv.name].out_channels != conv.out_channels:
        return f"it computes {conv.out_channels} of its {graph.modules[conv.name].out_channels} filters"
    if graph.shares_weights(conv):
        return "it shares its weights with another layer"
    if _pooled(graph, conv.source):
        return "it acts on pooled features: there is nothing to save"
    if inside := [name for name in graph.attention_modules if conv.name.startswith(f"{name}.")]:
        return f"it is part of an attention block, {type(graph.modules[inside[0]]).__name__}"
    chain = [conv.node]  # what only this convolution decides, channel by channel
    last = 0  # the last of it that turns zeros into something else: gates must come behind
    for node in walk(conv.node):
        effect = graph.effect(node, chain[-1])
        if effect is None or len(shape(node)) != 4 or len(graph.sources(node)) > 1:
            break
        if op(node) in ("sigmoid", "hardsigmoid"):
            return "it computes weights between 0 and 1, not features"
        chain.append(node)
        last = len(chain) - 1 if effect == "shift" else last
    if reason := _misuse(graph, chain[-1]):
        return reason
    name = graph.module_of(chain[last])
    out = graph.output_of(name) if name else None
    place = out if out in chain[last:] else None
    if name and graph.runs(name) > 1:
        return f"{name} behind it runs {graph.runs(name)} times: give each convolution its own"
    if place is None and chain[last] is conv.node:
        return f"{name} gives something else than its convolution does: put that, a hook perhaps, in a module behind it"
    if place is None:
        return f"{op(chain[last])} behind it is a function within {graph.module_type(chain[last])}: make it a module"
    if name in graph.several:
        return f"{name} gives more than one tensor, and gates act on one: let it give that alone"
    if graph.writes_to_its_input(name, place):
        return f"{name} behind it writes to its input, which may be read in place of its result: let it make a tensor"
    if shape(place)[0] != shape(graph.input)[0]:
        return "it runs on parts of images, such as windows, stacked as a larger batch"
    return _Place(conv, name, place)


def _misuse(graph: Graph, node: Node) -> str | None:
    """Why closing a channel of this tensor would not be what it says; None where all is well."""
    if reason := _mixing_norm(graph, node):
        return reason
    if _reaches_output(graph, node):
        return "its filters are the network's outputs"
    if _leads_into_attention(graph, node):
        return "it leads into attention"
    return None


def _mixing_norm(graph: Graph, node: Node) -> str | None:
    """What is wrong where a norm over several channels follows the tensor, also after a change of layout."""
    for user in node.users:
        if graph.is_view(user) and (reason := _mixing_norm(graph, user)):
            return reason
        module = graph.modules[graph.module_of(user)]
        kind = type(module).__name__
        is_norm = "Norm" in kind and not any(isinstance(part, nn.Conv2d) for part in module.modules())
        if op(user) != "batch_norm" and ("norm" in op(user) or (is_norm and graph.effect(user, node) is None)):
            return f"{kind if is_norm else op(user)} behind it mixes channels"
    return None


def _pooled(graph: Graph, node: Node) -> bool:
    """Whether the tensor is an average over whole images, or computed from such alone."""
    known: dict[Node, bool] = {}

    def pooled(node: Node) -> bool:
        if node not in known:
            sources = graph.sources(node)
            pools = op(node) in ("mean", "adaptive_avg_pool2d", "adaptive_max_pool2d", "amax")
            one_pixel = len(shape(node)) == 4 and shape(node)[2:] == (1, 1)
            known[node] = one_pixel and (pools or (bool(sources) and all(map(pooled, sources))))
        return known[node]

    return pooled(node)


def _leads_into_attention(graph: Graph, node: Node) -> bool:
    """Whether all ways from the tensor to the next layers do."""
    ends: list[bool] = []
    seen: set[Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        joins = op(user) in ("add", "cat") and len(graph.sources(user)) > 1
        if graph.is_attention(user) or graph.is_layer(user) or joins:
            ends.append(graph.is_attention(user))
        else:
            waiting += user.users
    return bool(ends) and all(ends)


def _reaches_output(graph: Graph, node: Node) -> bool:
    """Whether the tensor is the network's output but for pooling and the like."""
    for user in node.users:
        if user is graph.output:
            return True
        passes = graph.effect(user, node) is not None or graph.is_view(user) or op(user) in ("softmax", "log_softmax")
        if passes and _reaches_output(graph, user):
            return True
    return False


def _roles(graph: Graph) -> dict[Node, str]:
    """ "residual" or "dense" for the last convolutions of such units, "shortcut" for those beside a residual unit."""
    upstream: dict[Node, frozenset[Node]] = {graph.input: frozenset()}  # all convolutions that a tensor depends on
    roles: dict[Node, str] = {}
    for node in graph.nodes:
        sources = graph.sources(node)
        own = frozenset(graph.convs.keys() & {node})
        upstream[node] = own.union(*(upstream[source] for source in sources))
        if op(node) == "add" and len(sources) == 2 and len(shape(node)) == 4 and shape(sources[0]) == shape(sources[1]):
            a, b = sources
            branches = {a: upstream[a] - upstream[b], b: upstream[b] - upstream[a]}  # which each has for itself
            few, many = sorted(map(len, branches.values()))
            if many and (few <= 1 or few == many):
                for branch, convs in branches.items():
                    lasts = [last for last in _last_convs(graph, branch) if last in convs]
                    if len(convs) == many:
                        roles |= dict.fromkeys(lasts, "residual")
                    else:
                        roles = dict.fromkeys(lasts, "shortcut") | roles
        elif op(node) == "cat" and len(sources) > 1 and len(shape(node)) == 4:
            for source in sources:
                others = [other for other in sources if other is not source]
                if any(_is_upstream(graph, other, source) for other in others):
                    for last in _last_convs(graph, source):
                        roles.setdefault(last, "dense")
    return roles


def _last_convs(graph: Graph, node: Node) -> list[Node]:
    """The convolutions that end at a tensor: upwards, through all that keeps channels apart, and concatenations."""
    found, waiting, seen = [], [node], set[Node]()  # two ways that part at an addition may meet again
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in graph.convs and graph.is_layer(node):
            found.append(node)
            continue
        sources = [source for source in graph.sources(node) if len(shape(source)) == 4 or graph.is_view(source)]
        if op(node) == "cat" or (op(node) == "add" and len(sources) == 2):
            waiting += reversed(sources)
            continue
        if op(node) == "mul" and len(sources) == 2:  # features times weights: SE's are 1x1, others come from a sigmoid
            sources = [s for s in sources if shape(s) == shape(node) and op(s) not in ("sigmoid", "hardsigmoid")]
        passes = graph.is_view(node) or "norm" in op(node)
        if len(sources) == 1 and (graph.effect(node, sources[0]) is not None or passes):
            waiting += sources
    return found


def _is_upstream(graph: Graph, node: Node, of: Node) -> bool:
    """Whether the tensor `of` is computed from the tensor `node`."""
    seen, waiting = set(), [of]
    while waiting:
        current = waiting.pop()
        for source in graph.sources(current):
            if source is node:
                return True
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return False
