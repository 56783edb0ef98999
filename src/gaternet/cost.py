"""What a GaterNet costs: multiply-accumulates (MACs) as a function of the gates, sample by sample.

A closed gate saves its filter, and the reading of that filter's channel in every later convolution that is proven to
see zeros there. Cost is a sum of products of gates over each sample, never a product of mean densities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gaternet.channels import ALIVE, gate_columns
from gaternet.graph import Conv, Graph, evaluation_mode, read_graph, shape
from gaternet.method import GaterNet, GateSite


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image each, convolutions, linear layers and matrix products together.

    Attributes:
        backbone: of the plain backbone.
        gater: of the gater.
        gated: of the backbone under each image's gates, (B,).
    """

    backbone: int
    gater: int
    gated: Float[Tensor, " batch"]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """What each image costs in all: gater and gated backbone, (B,)."""
        return self.gated + self.gater


@dataclass(frozen=True)
class ConvCost:
    """One convolution, and the gates' columns that decide each of its channels (`ALIVE` where none does)."""

    conv: Conv
    reads: Int[Tensor, " in_channels"]
    writes: Int[Tensor, " out_channels"]


class CostModel:
    """MACs of a backbone as a function of gates: exact for gates 0 and 1, differentiable for those between.

    Args:
        graph: of the backbone, gated or not, for images of the size to count for.
        sites: where the gates act.
    """

    def __init__(self, graph: Graph, sites: Sequence[GateSite]) -> None:
        flow = gate_columns(graph, sites)
        by_conv = {site.conv: site for site in sites}
        self.num_gates = max(site.stop for site in sites)
        self.dense = count_dense_macs(graph.backbone, graph.example_input)
        self.convs: list[ConvCost] = []
        for conv in graph.convs.values():
            if shape(conv.node)[0] != shape(graph.input)[0]:  # images are folded into windows or groups
                continue
            site = by_conv.get(conv.name)
            writes = site.columns if site else torch.full((conv.out_channels,), ALIVE)
            self.convs.append(ConvCost(conv, flow.of(conv.source), writes))
        self._terms = _Terms(self.convs, self.num_gates)

    def __call__(self, gates: Float[Tensor, "batch gates"]) -> Float[Tensor, " batch"]:
        """MACs of each image under its gates (B, C); on their device, in float64 where it has that."""
        gates = gates.to(torch.float32 if gates.device.type == "mps" else torch.float64)
        extended = torch.cat([gates, gates.new_ones(gates.shape[0], 1)], 1)  # the last column is always open
        return self.dense - self._terms.full + self._terms(extended)

    def savings(self) -> Float[Tensor, " gates"]:
        """MACs that closing each gate saves where all others are open, (C,)."""
        gates = torch.ones(1, self.num_gates, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self(gates).sum(), gates)  # the cost is linear in each single gate
        return gradient[0]

    def gateable(self) -> float:
        """Share of the backbone's MACs that goes if all gates close, in [0, 1]."""
        return 1 - self(torch.zeros(1, self.num_gates)).item() / self.dense


def count_macs(model: GaterNet, images: Float[Tensor, "batch channels height width"]) -> Macs:
    """Multiply-accumulates of the backbone, of the gater, and of the backbone under each image's own gates.

    The model's mode decides the gates, as in `model.gates`: in evaluation they are 0 or 1. Reads the backbone's graph
    anew each time; to count often, keep a `gaternet.cost.CostModel`.

    Raises:
        ValueError: the backbone cannot be exported.
    """
    cost = CostModel(read_graph(model.backbone, images[:1]), model.sites)
    buffers = [(buffer, buffer.clone()) for buffer in model.gater.buffers()]
    with torch.no_grad():
        gated = cost(model.gates(images))
        for buffer, before in buffers:  # in training, statistics of these images
            buffer.copy_(before)
    return Macs(cost.dense, count_dense_macs(model.gater, images), gated)


@torch.no_grad()
def count_dense_macs(network: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one image in a plain network, as PyTorch's FlopCounterMode counts them.

    That is: of convolutions, linear layers and matrix products, attention's among them; not of recurrent layers.
    """
    fast = torch.backends.mha.get_fastpath_enabled()  # of attention layers, which is one operation and not counted
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation_mode(network), FlopCounterMode(display=False) as counter:
            network(images[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


class _Terms:
    """The cost of those convolutions that gates act on: a sum of products of two sums of gates each.

    A term is a group of filters and the channels that they read: (open filters) x (open channels) x MACs of a pair.
    `full` is the sum where all gates are open.
    """

    def __init__(self, convs: Sequence[ConvCost], num_gates: int) -> None:
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])  # columns of the channels and of the filters of each term
        weights: list[int] = []
        for cost in convs:
            if _always_open(cost):
                continue
            for reads, writes in zip(
                cost.reads.chunk(cost.conv.groups), cost.writes.chunk(cost.conv.groups), strict=True
            ):
                # A filter that shares its gate with the one channel that it reads (g * g = g) is counted once.
                shared = cost.conv.depthwise and reads.equal(writes)
                sides[0].append(torch.tensor([ALIVE]) if shared else reads)
                sides[1].append(writes)
                weights.append(cost.conv.macs_per_pair)
        self.full = sum(cost.conv.macs for cost in convs if not _always_open(cost))
        self._constants = torch.tensor(weights, dtype=torch.float64), *(part for side in sides for part in _ends(side))
        self._moved: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # the same where gates were before

    def __call__(self, gates: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        place = gates.device, gates.dtype
        if place not in self._moved:
            weights, *sides = self._constants
            self._moved[place] = [weights.to(gates), *(side.to(gates.device) for side in sides)]
        weights, *sides = self._moved[place]
        open_channels, open_filters = _sums(gates, *sides[:2]), _sums(gates, *sides[2:])  # (B, terms)
        return (open_channels * open_filters) @ weights


def _always_open(cost: ConvCost) -> bool:
    return bool((cost.reads == ALIVE).all() and (cost.writes == ALIVE).all())


def _ends(columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All terms' columns behind each other, and where each term's begin and the last's end, (terms + 1,)."""
    sizes = torch.tensor([len(some) for some in columns], dtype=torch.long)
    return torch.cat([*columns, torch.zeros(0, dtype=torch.long)]), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _sums(gates: Tensor, columns: Tensor, ends: Tensor) -> Tensor:
    """The sum of each term's gates, (B, terms): what was summed up to its end, less that up to its beginning.

    In place of a sparse product, which no CUDA graph can record.
    """
    return F.pad(gates.index_select(1, columns % gates.shape[1]).cumsum(1), (1, 0)).index_select(1, ends).diff(dim=1)
