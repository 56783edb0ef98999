"""Smaller dense networks for the gates that images really have.

Of a trained model many filters are closed for all images, or for all of a kind. A *subnetwork* keeps some filters,
drops the others for good, and computes all that it keeps, as a dense network does; what is closed for an image is
multiplied by zero. It is right for every image whose open filters it keeps.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gaternet.channels import ALIVE
from gaternet.skipping.engines import KernelName, make_program
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.plan import DENSE, NEVER, ConvSpec, Plan, Step
from gaternet.skipping.program import Program


def prune(plan: Plan, kept: Bool[Tensor, " gates"]) -> Plan:
    """The plan of the subnetwork with the filters of the gates in `kept`."""
    kept = kept.clone()
    for pattern in plan.patterns:  # at least one channel of each, for no library knows tensors without any
        if not ((pattern == ALIVE) | ((pattern >= 0) & kept[pattern])).any():
            kept[pattern[pattern >= 0][:1]] = True
    fixed, columns = [], []
    for pattern in plan.patterns:
        alive = (pattern == ALIVE) | ((pattern >= 0) & kept[pattern])
        fixed.append(torch.where(alive, ALIVE, NEVER))
        columns.append(pattern[alive].tolist())
    numbers = [(pattern == ALIVE).nonzero()[:, 0] for pattern in fixed]
    compact = {s.out for s in plan.steps if s.filters != s.pattern and s.adds is None}  # they are no longer made dense
    steps: list[Step] = []
    for step in plan.steps:
        spec = step.conv
        if step.in_place is not None and step.sources[step.in_place] in compact:
            step = replace(step, in_place=None)
        if spec is None:
            steps.append(step)
            continue
        reads = plan.pattern_of[step.sources[0]]
        mask = None if step.filters == DENSE else columns[step.filters]
        if spec.groups == 1 or (spec.depthwise and reads == step.filters):
            conv = _pruned(spec, step.filters, reads, numbers)
            pruned = replace(step, conv=conv, held=True, pattern=step.filters, filters=DENSE, mask=mask)
        else:
            pruned = replace(step, mask=mask)
        if step.adds is None or step.filters == DENSE:
            steps.append(pruned)
            continue
        # What is added is to be masked first.
        name = f"{step.out}.added"
        source, target = step.sources
        conv = replace(pruned, out=name, sources=[source], adds=None, relu=False, free=[])
        in_place = None if target in compact else 1
        total = Step("add", step.out, [name, target], relu=step.relu, in_place=in_place, free=[*step.free, name])
        steps += [conv, total]
    shapes = dict(plan.shapes)
    for step in steps:
        if step.out.endswith(".added"):
            shapes[step.out] = shapes[step.out.removesuffix(".added")]
    return replace(plan, steps=steps, patterns=fixed, shapes=shapes)


def _pruned(spec: ConvSpec, filters: int, reads: int, numbers: list[Tensor]) -> ConvSpec:
    weight, bias = spec.weight, spec.bias
    if filters != DENSE:
        weight, bias = weight[numbers[filters]], None if bias is None else bias[numbers[filters]]
    if spec.depthwise:
        return replace(spec, weight=weight, bias=bias, groups=len(weight))
    return replace(spec, weight=weight if reads == DENSE else weight[:, numbers[reads]], bias=bias)


def choose_kept(seen: Float[Tensor, "images gates"], count: int) -> list[Tensor]:
    """The gates that each of up to `count` subnetworks keeps, so that each image seen is covered; smallest first."""
    from sklearn.cluster import KMeans

    patterns = seen.bool().cpu().unique(dim=0)
    count = min(count, len(patterns))
    groups = torch.zeros(len(patterns), dtype=torch.long)
    if count > 1:
        groups = torch.from_numpy(KMeans(count, random_state=0).fit_predict(patterns.float().numpy())).long()
    unions = torch.stack([patterns[groups == group].any(0) for group in groups.unique()]).unique(dim=0)
    return sorted(unions, key=lambda kept: int(kept.sum()))


class Specialised:
    """Runs each image in the smallest subnetwork that keeps all of its open filters, and the others by a fall-back.

    Args:
        plan: of the whole network.
        kept: for each subnetwork the gates that it keeps, (C,), bool.
        kernels: see `make_program`.

    Attributes:
        fallback: skips under any gates.
        subnetworks: one for each of `kept`.
    """

    def __init__(self, plan: Plan, kept: Sequence[Tensor], kernels: KernelName = "auto") -> None:
        self.kept = list(kept)
        self.fallback: Program | NativeProgram = make_program(plan, kernels)
        self.subnetworks = [make_program(prune(plan, gates), kernels) for gates in kept]

    @property
    def plan(self) -> Plan:
        """Of the whole network."""
        return self.fallback.plan

    @torch.no_grad()
    def __call__(self, images: Tensor, gates: Tensor) -> Tensor:
        """Logits (B, K) for images (B, channels, H, W) under gates (B, C), each 0 or 1."""
        choices = self.choose(gates)
        programs = [*self.subnetworks, self.fallback]
        used = choices.unique().tolist()
        if len(used) == 1:
            return programs[used[0]](images, gates)
        parts = [((choices == number).nonzero()[:, 0], programs[number]) for number in used]
        index = torch.cat([rows for rows, _ in parts])
        logits = torch.cat([program(images[rows], gates[rows]) for rows, program in parts])
        return logits.index_copy(0, index, logits)

    def choose(self, gates: Tensor) -> Tensor:
        """The number of each image's subnetwork, (B,); that of the fall-back is the number of subnetworks."""
        choices = torch.full((len(gates),), len(self.kept), device=gates.device)
        for number, kept in reversed(list(enumerate(self.kept))):
            covered = (gates.bool() <= kept.to(gates.device)).all(1)
            choices = torch.where(covered, number, choices)
        return choices
