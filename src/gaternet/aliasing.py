"""Which tensors of an exported graph share memory, and what that means where an operation writes to one of them.

A graph's nodes are values, each computed once; an operation in place changes a value that others hold, too.
"""

import operator
from collections import defaultdict
from typing import Any

from torch.fx import Node


def in_place(node: Node) -> bool:
    """Whether the operation writes to its first input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.endswith("_") and not schema.name.endswith("__")


def read_what_was_written(nodes: list[Node]) -> set[Node]:
    """Let what reads a tensor after an operation in place read that operation's node, which has the same value.

    Returns:
        Tensors that are read after an operation wrote to their memory through another: no node has their new value.
    """
    order = {node: i for i, node in enumerate(nodes)}
    ways = {node: _way_from_base(node) for node in nodes}
    by_base: dict[Node, list[Node]] = defaultdict(list)  # base -> the nodes that share its memory, itself among them
    for node, way in ways.items():
        by_base[way[0]].append(node)
    rewritten = set[Node]()
    for node in nodes:

        def later(user: Node, now: int = order[node]) -> bool:
            return order.get(user, len(order)) > now

        for target in _written(node):
            if in_place(node) and target is node.args[0]:
                target.replace_all_uses_with(node, delete_user_cb=later)
            way = ways.get(target, [target])
            shared = [other for other in by_base[way[0]] if order[other] < order[node] and _overlap(ways[other], way)]
            rewritten.update(other for other in {way[0], *shared} if any(map(later, other.users)))
    return rewritten


def _written(node: Node) -> list[Node]:
    """The tensors that an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    found: list[Any] = []
    for given, declared in zip(node.args, schema.arguments if schema is not None else [], strict=False):
        if declared.alias_info is not None and declared.alias_info.is_write:
            found += given if isinstance(given, list | tuple) else [given]
    return [each for each in found if isinstance(each, Node)]


def _way_from_base(node: Node) -> list[Node]:
    """The tensors of which a node is a view, from the one whose memory it shares down to the node itself."""
    way = [node]
    while way[-1].op == "call_function" and way[-1].args and isinstance(source := way[-1].args[0], Node):
        schema = getattr(way[-1].target, "_schema", None)
        shares = schema is not None and any(given.alias_info is not None for given in schema.returns)
        if not shares and way[-1].target is not operator.getitem:
            break
        way.append(source)
    return way[::-1]


def _overlap(way: list[Node], other: list[Node]) -> bool:
    """Whether two views of one tensor may share values; the parts that a split gives do not."""
    for ours, theirs in zip(way, other, strict=False):
        if ours is not theirs:
            return not (ours.target is theirs.target is operator.getitem and ours.args[1] != theirs.args[1])
    return True
