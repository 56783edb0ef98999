"""What gates are for: what becomes of a trained model's predictions when gates are forced, or another image's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from gaternet.analysis import images_and_labels
from gaternet.data import Preprocessing
from gaternet.findings import GateAnalysis
from gaternet.method import GaterNet
from gaternet.modes import evaluation_mode

SHARE = 0.05  # of the gates that depend on the input: so many are taken from a class
CHUNK = 100  # images at a time
CLOSED, OPEN = 0, 1  # rows of an effect, and the values of their gates


@dataclass(frozen=True)
class Effect:
    """What forcing does: the share of right predictions for each class, in [0, 1]; NaN for a class without images.

    Attributes:
        forced: with each of R sets of gates closed, and open: (2, R, K).
        by_chance: with as many gates closed or open that are drawn at random, the mean of several draws, (2, R, K).
    """

    forced: Float[NDArray[np.float64], "2 sets classes"]
    by_chance: Float[NDArray[np.float64], "2 sets classes"]


@dataclass(frozen=True)
class Exchanged:
    """Predictions of M images under gates of their own and of others: shares of them, in [0, 1].

    If a gater has found out the class, its gates can tell it to the backbone, which then need not look itself: given
    another image's gates, it predicts that one's class.

    Attributes:
        own: right under the gates that the gater gives them.
        usual: right when each gate is as it is for most of these images.
        same: right under the gates of another image of the same class; NaN where no class has two images.
        image, gates: under those of an image of another class: predicted as the class of the image; as the class of
            the image that the gates were made for. NaN where all images are of one class.
    """

    own: float
    usual: float
    same: float
    image: float
    gates: float


@dataclass(frozen=True)
class Forced:
    """Accuracy on M labeled images with gates forced.

    Attributes:
        counts: images of each class, (K,).
        before: share of right predictions for each class with no gate forced, (K,); NaN for a class without images.
        sites: all gates of each site, in the order of the sites; by chance from all gates.
        gates: single gates, those that tell most about the class, (F,).
        single: each of these gates; by chance from those that depend on the input.
        taken: how many gates are taken from a class at most: those that depend on the input and are open for it more
            often than for the others, most so first.
        classes: the classes whose gates are taken, (R,).
        own: the gates of each of them; by chance from those that depend on the input.
        exchanged: with gates of other images.
    """

    counts: Int[NDArray[np.int64], " classes"]
    before: Float[NDArray[np.float64], " classes"]
    sites: Effect
    gates: Int[NDArray[np.int64], " gates"]
    single: Effect
    taken: int
    classes: Int[NDArray[np.int64], " chosen"]
    own: Effect
    exchanged: Exchanged

    @property
    def images(self) -> int:
        """M."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Of all images with no gate forced."""
        return float(self.overall(self.before))

    def overall(self, shares: Float[NDArray[np.float64], "... classes"]) -> Float[NDArray[np.float64], "..."]:
        """Of all images, from the shares of each class."""
        return np.asarray(np.nansum(shares * self.counts, -1) / self.images)


@torch.no_grad()
def force_gates(
    model: GaterNet,
    loader: Iterable[Any],
    analysis: GateAnalysis,
    *,
    preprocessing: Preprocessing | None = None,
    images: int = 300,
    draws: int = 5,
    gates: int = 60,
    classes: int = 10,
    seed: int = 0,
) -> Forced:
    """Run the backbone under changed gates, on the first images of a loader.

    Takes about 2 (S + min(K, classes)) + gates + 3 passes over the images, and 2 draws more for each size of site and
    the like.

    Args:
        model, loader, preprocessing: as for `gaternet.analyze`; with labels. A loader in random order is best.
        analysis: of this model: it says which gates are open for which class.
        images: number of images to use.
        draws: of gates at random.
        gates: number of single gates to force.
        classes: gates are taken from the first so many classes that have images.
        seed: of these draws.

    Raises:
        ValueError: the loader has no images or no labels.
    """
    with evaluation_mode(model):
        inputs, labels = _first(loader, images, preprocessing, next(model.parameters()).device)
        count, named = len(analysis.classes), labels.cpu().numpy()
        if named.min() < 0 or named.max() >= count:
            raise ValueError(f"labels must lie in [0, {count}), but reach from {named.min()} to {named.max()}")
        own = _gates(model, inputs)
        counts = np.bincount(named, minlength=count)
        found = _right(model, inputs, own, labels)

        def shares(right: Tensor) -> NDArray[np.float64]:
            hits = np.bincount(named, right.cpu().numpy(), count)
            return np.divide(hits, counts, out=np.full(count, np.nan), where=counts > 0)

        def force(columns: Any, value: int) -> NDArray[np.float64]:
            changed = (own[:, columns] != value).any(1)  # the others are predicted as before
            forced = own[changed]
            forced[:, columns] = value
            right = found.clone()
            right[changed] = _right(model, inputs[changed], forced, labels[changed])
            return shares(right)

        everything, dependent = np.arange(analysis.num_gates), np.flatnonzero(analysis.dependent)
        generator = np.random.default_rng(seed)

        @cache
        def by_chance(size: int, of_dependent: bool, value: int) -> NDArray[np.float64]:
            pool = dependent if of_dependent else everything
            return np.mean([force(generator.choice(pool, size, replace=False), value) for _ in range(draws)], 0)

        def effect(sets: Sequence[NDArray[np.int64]], of_dependent: bool) -> Effect:
            forced = np.full((2, len(sets), count), np.nan)
            random = forced.copy()
            for value in (CLOSED, OPEN):
                for row, columns in enumerate(sets):
                    forced[value, row] = force(columns, value)
                    random[value, row] = by_chance(len(columns), of_dependent, value)
            return Effect(forced, random)

        taken = max(1, round(SHARE * len(dependent)))
        tops = {label: class_gates(analysis, label, taken) for label in np.flatnonzero(counts)[:classes].tolist()}
        tops = {label: top for label, top in tops.items() if len(top)}
        chosen = analysis.telling_gates(gates)
        return Forced(
            counts=counts,
            before=shares(found),
            sites=effect([everything[site.start : site.stop] for site in model.sites], False),
            gates=chosen,
            single=effect(list(chosen[:, None]), True),
            taken=taken,
            classes=np.array(list(tops), np.int64),
            own=effect(list(tops.values()), True),
            exchanged=_exchanged(model, inputs, own, found, named, generator),
        )


@torch.no_grad()
def exchange_gates(
    model: GaterNet,
    loader: Iterable[Any],
    *,
    preprocessing: Preprocessing | None = None,
    images: int = 300,
    seed: int = 0,
) -> Exchanged:
    """Run the backbone under the gates of other images, on the first images of a loader.

    Args:
        model, loader, preprocessing, images: as for `force_gates`.
        seed: of which image gets whose gates.

    Raises:
        ValueError: the loader has no images or no labels.
    """
    with evaluation_mode(model):
        inputs, labels = _first(loader, images, preprocessing, next(model.parameters()).device)
        own, generator = _gates(model, inputs), np.random.default_rng(seed)
        return _exchanged(model, inputs, own, _right(model, inputs, own, labels), labels.cpu().numpy(), generator)


def _exchanged(
    model: GaterNet,
    inputs: Tensor,
    own: Tensor,
    right: Tensor,
    labels: NDArray[np.int64],
    generator: np.random.Generator,
) -> Exchanged:
    """`right` says which images are predicted rightly under their `own` gates."""

    def share(rows: NDArray[np.int64], gates: Tensor, said: NDArray[np.int64]) -> list[float]:
        """Of the images in `rows`, under these gates: those predicted as their own class, and as `said`."""
        if not len(rows):
            return [math.nan, math.nan]
        found = _predict(model, inputs[rows], gates).cpu().numpy()
        return [float((found == classes).mean()) for classes in (labels[rows], said)]

    everything = np.arange(len(labels))
    pairs = []  # of images of one class: each gets the gates of the next
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            pairs.append(np.stack([members, np.roll(members, 1)]))
    rows, givers = np.concatenate(pairs, 1) if pairs else np.zeros((2, 0), np.int64)
    same, _ = share(rows, own[givers], labels[givers])
    givers = generator.permutation(everything)
    rows = np.flatnonzero(labels[givers] != labels)
    image, gates = share(rows, own[givers[rows]], labels[givers[rows]])
    usual = (own.mean(0, keepdim=True) > 0.5).to(own.dtype).expand_as(own)
    return Exchanged(float(right.double().mean()), share(everything, usual, labels)[0], same, image, gates)


def _gates(model: GaterNet, inputs: Tensor) -> Tensor:
    """The gates of each image, (M, C)."""
    return torch.cat([model.gates(chunk) for chunk in inputs.split(CHUNK)])


def _right(model: GaterNet, inputs: Tensor, gates: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is predicted rightly under these gates, (M,)."""
    if not len(inputs):
        return torch.zeros(0, dtype=torch.bool, device=labels.device)
    return _predict(model, inputs, gates) == labels


def _predict(model: GaterNet, inputs: Tensor, gates: Tensor) -> Tensor:
    """The likeliest class of each image under these gates, (M,)."""
    chunks = zip(inputs.split(CHUNK), gates.split(CHUNK), strict=True)
    return torch.cat([model.forward_gated(*chunk).argmax(1) for chunk in chunks])


def class_gates(analysis: GateAnalysis, label: int, number: int) -> Int[NDArray[np.int64], " gates"]:
    """The dependent gates that a class opens more often than the others do, most so first, at most `number`."""
    counts, opened = analysis.counts, analysis.class_open
    rest = counts.sum() - counts[label]
    if not counts[label] or not rest:
        return np.zeros(0, np.int64)
    more = opened[label] / counts[label] - (opened.sum(0) - opened[label]) / rest
    more[~analysis.dependent] = -1
    order = np.argsort(-more, kind="stable")[:number]
    return order[more[order] > 0]


def _first(
    loader: Iterable[Any], number: int, preprocessing: Preprocessing | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    inputs, labels, found = [], [], 0
    for batch in loader:
        images, own = images_and_labels(batch)
        if own is None:
            raise ValueError("forcing gates needs labels: give batches of (images, labels)")
        images = images.to(device)
        inputs.append(preprocessing.normalize(images) if preprocessing else images)
        labels.append(own.to(device))
        found += len(images)
        if found >= number:
            break
    if not found:
        raise ValueError("there are no images to force gates on: the loader is empty")
    return torch.cat(inputs)[:number], torch.cat(labels)[:number]
