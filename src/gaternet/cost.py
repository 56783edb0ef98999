"""What a GaterNet costs: multiply-accumulates (MACs) as a function of the gates, sample by sample.

A closed gate saves its filter, and the reading of that filter's channel in every later convolution that is proven to
see zeros there. Cost is a sum of products of gates over each sample, never a product of mean densities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gaternet.channels import ALIVE, gate_columns
from gaternet.graph import Conv, Graph, read_graph, shape
from gaternet.method import GaterNet, GateSite
from gaternet.modes import evaluation_mode, trial_copy, without_autocast
from gaternet.wrapping import require_closed, require_gated


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
        with torch.inference_mode(False):  # gates may have gradients another time
            self._terms = _Terms(self.convs, self.num_gates)

    @classmethod
    def of(cls, model: GaterNet, images: Float[Tensor, "batch channels height width"]) -> "CostModel":
        """Of a GaterNet's backbone, for images of that size; their values do not matter.

        Raises:
            ValueError: the backbone cannot be exported, or has a hook behind its gates; or there are no images.
            TypeError: the model is no GaterNet.
        """
        model = require_gated(model)
        graph = read_graph(model.backbone, images[:1])
        if not images.is_meta:
            tried: Any = trial_copy(model)
            with evaluation_mode(tried), without_autocast(images.device.type):
                require_closed(tried, images[:1])
        return cls(graph, model.sites)

    def __call__(self, gates: Float[Tensor, "batch gates"]) -> Float[Tensor, " batch"]:
        """MACs of each image under its gates (B, C); on their device, in float64 where it has that.

        Raises:
            ValueError: the gates are not (B, C).
        """
        if gates.ndim != 2 or gates.shape[1] != self.num_gates:
            raise ValueError(f"gates must be (B, {self.num_gates}), a column per gate, but are {tuple(gates.shape)}")
        gates = gates.to(torch.float32 if gates.device.type == "mps" else torch.float64)
        extended = torch.cat([gates, gates.new_ones(gates.shape[0], 1)], 1)  # the last column is always open
        return self.dense - self._terms.full + self._terms(extended)

    def savings(self) -> Float[Tensor, " gates"]:
        """MACs that closing each gate saves where all others are open, (C,)."""
        with torch.inference_mode(False), torch.enable_grad():
            gates = torch.ones(1, self.num_gates, dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(self(gates).sum(), gates)  # the cost is linear in each single gate
        return gradient[0]

    def gateable(self) -> float:
        """Share of the backbone's MACs that goes if all gates close, in [0, 1]."""
        return 1 - self(torch.zeros(1, self.num_gates)).item() / self.dense


def count_macs(model: GaterNet, images: Float[Tensor, "batch channels height width"]) -> Macs:
    """Multiply-accumulates of the backbone, of the gater, and of the backbone under each image's own gates.

    The model's mode decides the gates, as in `model.gates`: in evaluation they are 0 or 1. Reads the backbone's graph
    anew each time; to count often, keep a `gaternet.cost.CostModel.of(model, images)`.

    Raises:
        ValueError: the backbone cannot be exported, or there are no images.
        TypeError: the model is no GaterNet.
    """
    cost = CostModel.of(model, images)
    buffers = [(buffer, buffer.clone()) for buffer in model.gater.buffers()]
    with torch.no_grad():
        try:
            gated = cost(model.gates(images))
        finally:
            for buffer, before in buffers:  # in training, statistics of these images
                buffer.copy_(before)
    return Macs(cost.dense, count_dense_macs(model.gater, images), gated)


@torch.no_grad()
def count_dense_macs(network: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one image in a plain network, as PyTorch's FlopCounterMode counts them.

    That is: of convolutions, linear layers and matrix products, attention's among them; not of recurrent layers.
    """
    network = trial_copy(network)  # the counter would follow gradients, of which there are none here
    fast = torch.backends.mha.get_fastpath_enabled()  # of attention layers, which is one operation and not counted
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation_mode(network), FlopCounterMode(display=False) as counter:
            network(images[:1].detach())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class _Runs:
    """The columns of terms as runs of neighbouring ones, term after term, to add up gates from running sums.

    Attributes:
        first, stop: of each run its first column and that behind its last, (runs,).
        often: how many times the term counts it, (runs,).
        ends: the number of runs before each term, and of all, (terms + 1,).
    """

    first: Tensor
    stop: Tensor
    often: Tensor
    ends: Tensor

    @classmethod
    def of(cls, terms: Sequence[Tensor], width: int) -> "_Runs":
        """Of the terms' columns; there are `width`, and ALIVE, which is negative, is the last of them."""
        runs = []
        for columns in terms:
            found, often = (columns % width).unique(return_counts=True)
            breaks = ((found.diff() != 1) | (often.diff() != 0)).nonzero()[:, 0]
            first, last = F.pad(breaks + 1, (1, 0)), F.pad(breaks, (0, 1), value=len(found) - 1)
            runs.append(torch.stack([found[first], found[last] + 1, often[first]]))
        first, stop, often = torch.cat([*runs, torch.zeros(3, 0, dtype=torch.long)], 1)
        ends = torch.tensor([0, *(run.shape[1] for run in runs)]).cumsum(0)
        return cls(first, stop, often.double(), ends)

    def to(self, device: torch.device, dtype: torch.dtype) -> "_Runs":
        """The same on another device, for gates of that precision."""
        return _Runs(self.first.to(device), self.stop.to(device), self.often.to(device, dtype), self.ends.to(device))

    def sums(self, before: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch terms"]:
        """The sum of each term's gates, from the sum of all before each column; no CUDA graph takes sparse products."""
        parts = (before.index_select(1, self.stop) - before.index_select(1, self.first)) * self.often
        return F.pad(parts.cumsum(1), (1, 0)).index_select(1, self.ends).diff(dim=1)


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
        self._sides = [_Runs.of(side, num_gates + 1) for side in sides]
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, list[_Runs]]] = {}  # to where gates were

    def __call__(self, gates: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        place = gates.device, gates.dtype
        if place not in self._moved:
            with torch.inference_mode(False):
                self._moved[place] = self._weights.to(*place), [side.to(*place) for side in self._sides]
        weights, (channels, filters) = self._moved[place]
        before = F.pad(gates.cumsum(1), (1, 0))  # (B, columns + 1): the sum of all columns before each
        return (channels.sums(before) * filters.sums(before)) @ weights


def _always_open(cost: ConvCost) -> bool:
    return bool((cost.reads == ALIVE).all() and (cost.writes == ALIVE).all())
