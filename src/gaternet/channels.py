"""Which gate decides each channel of each tensor: what may be skipped once the gates are known.

A channel is *dead* for an image where its gate is closed: it is all zeros there. That holds from the site on, through
activations, pooling, padding, concatenations, splits and shuffles, up to what mixes channels or adds to them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from gaternet.graph import Graph, op, shape
from gaternet.method import GateSite

ALIVE = -1  # of a channel that no gate closes


class ChannelFlow:
    """Follows gates through a graph, node by node in execution order.

    Attributes:
        columns: for each node that has run, the gate's column for each value, or `ALIVE`; as a tensor that broadcasts
            against the node's, mostly (1, C, 1, 1). A list of such where the node gives a list.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.columns: dict[Node, Any] = {graph.input: _alive(shape(graph.input))}

    def run(self, node: Node) -> None:
        """Compute `columns[node]` from those of its inputs."""
        sources = self.graph.sources(node)
        if not sources:
            return
        if node in self.graph.rewritten:
            self.columns[node] = _alive(shape(node))
            return
        name, first = op(node), self.columns[sources[0]]
        if name in ("add", "sub", "mul", "minimum", "maximum") and len(sources) == 2 and shape(node):
            second = self.columns[sources[1]]
            if name == "mul":  # zero where either is
                self.columns[node] = torch.where(first != ALIVE, first, second)
            else:
                self.columns[node] = torch.where(first == second, first, ALIVE)
        elif name == "cat":
            parts = [self._full(source) for source in node.args[0]]  # pyright: ignore[reportOptionalIterable, reportGeneralTypeIssues]
            self.columns[node] = _compressed(torch.cat(parts, *node.args[1:2]))  # pyright: ignore[reportArgumentType]
        elif self.graph.is_view(node) and node.all_input_nodes == sources and len(sources) == 1:
            self.columns[node] = self._moved(node, sources[0])
        elif len(sources) == 1 and self._keeps(node, sources[0]) and first.ndim == 4 and first.shape[2:] == (1, 1):
            self.columns[node] = first.reshape(*first.shape[:2], *[1] * (len(shape(node)) - 2))
        else:
            value = node.meta.get("val")
            lists = isinstance(value, list | tuple)
            self.columns[node] = [_alive(tuple(v.shape)) for v in value] if lists else _alive(shape(node))

    def set_gates(self, node: Node, columns: Tensor) -> None:
        """Say that the node is a site: its channels are decided by these columns of the gates, (channels,)."""
        if node in self.graph.rewritten:
            return
        self.columns[node] = columns.reshape(1, -1, *[1] * (len(shape(node)) - 2))

    def of(self, node: Node) -> Tensor:
        """Columns of a tensor's channels, (C,); `ALIVE` where its values do not agree."""
        columns = self.columns[node]
        channels = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        agreed = torch.where((channels == channels[:, :1]).all(1), channels[:, 0], ALIVE)
        return agreed.expand(shape(node)[1]).clone()

    def _keeps(self, node: Node, source: Node) -> bool:
        conv = self.graph.convs.get(node)
        if conv is not None:
            return conv.depthwise and not conv.bias
        return self.graph.effect(node, source) == "keep"

    def _full(self, node: Node) -> Tensor:
        if node not in self.columns:  # it does not depend on the image
            return torch.full(shape(node), ALIVE)
        return self.columns[node].expand(shape(node)).contiguous()

    def _moved(self, node: Node, source: Node) -> Any:
        """Let the operation move the columns as it moves the values."""
        whole = isinstance(self.columns[source], list)
        values = self.columns[source] if whole else self._full(source)
        target: Any = node.target
        moved = target(*[values if arg is source else arg for arg in node.args], **node.kwargs)
        if isinstance(moved, list | tuple):
            return [self._one_an_image(part) for part in moved]
        return self._one_an_image(moved)

    def _one_an_image(self, columns: Tensor) -> Tensor:
        """The columns, but all `ALIVE` where parts of images are stacked as a larger batch: a row is no image then."""
        kept = columns.ndim > 1 and columns.shape[0] in (1, shape(self.graph.input)[0])
        return _compressed(columns) if kept else _alive(tuple(columns.shape))


def gate_columns(graph: Graph, sites: Sequence[GateSite]) -> ChannelFlow:
    """The flow through the whole graph, under the gates at `sites`.

    Raises:
        ValueError: a site's module does not give out one tensor, once.
    """
    places = {}
    for site in sites:
        node = graph.output_of(site.name)
        if node is None:
            raise ValueError(f"site {site.name} does not run exactly once here, or does not give out one tensor")
        places[node] = site
    flow = ChannelFlow(graph)
    for node in graph.nodes:
        flow.run(node)
        if node in places:
            flow.set_gates(node, places[node].columns)
    return flow


def contiguous(columns: Tensor) -> tuple[int, int, int] | None:
    """(start, stop, times) where the columns (C,) are start, ..., stop - 1, each that many times; else None."""
    start, times = int(columns[0]), int((columns == columns[0]).sum())
    stop = start + len(columns) // times
    ordered = torch.equal(columns, torch.arange(start, stop).repeat_interleave(times))
    return (start, stop, times) if start != ALIVE and ordered else None


def _alive(size: tuple[int, ...]) -> Tensor:
    return torch.full((*[1] * len(size[:1]), *size[1:2], *[1] * len(size[2:])), ALIVE)


def _compressed(columns: Tensor) -> Tensor:
    """The columns with size 1 in each dimension, but for the channels', along which they are all the same."""
    for dim in range(columns.ndim):
        if dim != 1 and columns.shape[dim] > 1:
            one = columns.narrow(dim, 0, 1)
            if bool((columns == one).all()):
                columns = one
    return columns
