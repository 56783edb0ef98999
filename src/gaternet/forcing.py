"""What gates are for: what becomes of a trained model's predictions when gates are forced, or another image's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from gaternet.analysis import images_and_labels, inputs_of, predictions_of
from gaternet.data import Preprocessing
from gaternet.findings import GateAnalysis
from gaternet.method import GaterNet
from gaternet.modes import evaluation_mode
from gaternet.wrapping import require_gated

SHARE = 0.05  # of the gates that depend on the input: so many are taken from a class
CHUNK = 100  # images at a time
CLOSED, OPEN = 0, 1  # rows of an effect, and the values of their gates


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
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
        ValueError: the loader has no images or no labels, the analysis is of another model, or a number is too small.
        TypeError: the model is no GaterNet.
    """
    model = require_gated(model)
    for name, number, least in (("draws", draws, 1), ("gates", gates, 0), ("classes", classes, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, but is {number}")
    spans = [(site["start"], site["stop"]) for site in analysis.sites]
    if spans != [(site.start, site.stop) for site in model.sites]:
        raise ValueError(
            f"the analysis is of another model, with {analysis.num_gates} gates at {len(spans)} sites, and this one "
            f"has {model.num_gates} at {len(model.sites)}: give what gaternet.analyze found of this one"
        )
    with evaluation_mode(model):
        trial = _Trial(model, loader, preprocessing, images, seed)
        trial.count(len(analysis.classes))
        everything, dependent = np.arange(analysis.num_gates), np.flatnonzero(analysis.dependent)
        taken = max(1, round(SHARE * len(dependent)))
        tops = {label: class_gates(analysis, label, taken) for label in np.flatnonzero(trial.counts)[:classes].tolist()}
        tops = {label: top for label, top in tops.items() if len(top)}
        chosen = analysis.telling_gates(gates)
        return Forced(
            counts=trial.counts,
            before=trial.shares(trial.right),
            sites=trial.effect([everything[site.start : site.stop] for site in model.sites], everything, draws),
            gates=chosen,
            single=trial.effect(list(chosen[:, None]), dependent, draws),
            taken=taken,
            classes=np.array(list(tops), np.int64),
            own=trial.effect(list(tops.values()), dependent, draws),
            exchanged=trial.exchange(),
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
        ValueError: the loader has no images or no labels, or `images` is below 1.
        TypeError: the model is no GaterNet.
    """
    model = require_gated(model)
    with evaluation_mode(model):
        return _Trial(model, loader, preprocessing, images, seed).exchange()


class _Trial:
    """The images on which gates are changed, and what the model makes of them under its own gates.

    Attributes:
        inputs, labels: of the M images.
        own: the gates that the gater gives them, (M, C).
        right: which of them are predicted rightly under those, (M,).
        counts: images of each class, (K,), once they are counted.
    """

    def __init__(
        self, model: GaterNet, loader: Iterable[Any], preprocessing: Preprocessing | None, images: int, seed: int
    ) -> None:
        self.model = model
        self.inputs, labels = _first(loader, images, preprocessing, next(model.parameters()).device)
        self.labels = labels.cpu().numpy()
        self.own = torch.cat([model.gates(chunk) for chunk in self.inputs.split(CHUNK)])
        self.right = self.predict(self.inputs, self.own) == self.labels
        self.counts = np.zeros(0, np.int64)
        self._generator = np.random.default_rng(seed)
        self._drawn: dict[tuple[int, int, int], NDArray[np.float64]] = {}

    def count(self, num_classes: int) -> None:
        """Count the images of each class; ValueError for labels of others."""
        named = self.labels
        if named.min() < 0 or named.max() >= num_classes:
            raise ValueError(f"labels must lie in [0, {num_classes}), but reach from {named.min()} to {named.max()}")
        self.counts = np.bincount(named, minlength=num_classes)

    def predict(self, inputs: Tensor, gates: Tensor) -> NDArray[np.int64]:
        """The likeliest class of each of some images under some gates."""
        chunks = zip(inputs.split(CHUNK), gates.split(CHUNK), strict=True)
        found = [predictions_of(self.model.forward_gated(*chunk)).cpu().numpy() for chunk in chunks if len(chunk[0])]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def shares(self, right: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The share of right predictions for each class, (K,), where these are right; NaN for one without images."""
        count = len(self.counts)
        hits = np.bincount(self.labels, right, count)
        return np.divide(hits, self.counts, out=np.full(count, np.nan), where=self.counts > 0)

    def force(self, columns: NDArray[np.int64], value: int) -> NDArray[np.float64]:
        """`shares` with these gates closed, or open."""
        differs = (self.own[:, columns] != value).any(1)  # the other images are predicted as before
        forced = self.own[differs]
        forced[:, columns] = value
        right, changed = self.right.copy(), differs.cpu().numpy()
        right[changed] = self.predict(self.inputs[differs], forced) == self.labels[changed]
        return self.shares(right)

    def by_chance(self, size: int, pool: NDArray[np.int64], value: int, draws: int) -> NDArray[np.float64]:
        """The mean of `force` over several draws of so many gates of a pool; drawn once for each size and pool."""
        key = size, len(pool), value
        if key not in self._drawn:
            sets = (self._generator.choice(pool, size, replace=False) for _ in range(draws))
            self._drawn[key] = np.mean([self.force(columns, value) for columns in sets], 0)
        return self._drawn[key]

    def effect(self, sets: Sequence[NDArray[np.int64]], pool: NDArray[np.int64], draws: int) -> Effect:
        """Of forcing each of these sets of gates, and as many of a pool."""
        forced = np.full((2, len(sets), len(self.counts)), np.nan)
        random = forced.copy()
        for value in (CLOSED, OPEN):
            for row, columns in enumerate(sets):
                forced[value, row] = self.force(columns, value)
                random[value, row] = self.by_chance(len(columns), pool, value, draws)
        return Effect(forced, random)

    def exchange(self) -> Exchanged:
        """Give images the gates of others."""
        labels, everything = self.labels, np.arange(len(self.labels))
        pairs = []  # of images of one class: each gets the gates of the next
        for label in np.unique(labels):
            members = self._generator.permutation(np.flatnonzero(labels == label))
            if len(members) > 1:
                pairs.append(np.stack([members, np.roll(members, 1)]))
        rows, givers = np.concatenate(pairs, 1) if pairs else np.zeros((2, 0), np.int64)
        same, _ = self._under(rows, self.own[givers], labels[givers])
        givers = self._generator.permutation(everything)
        rows = np.flatnonzero(labels[givers] != labels)
        image, gates = self._under(rows, self.own[givers[rows]], labels[givers[rows]])
        usual = (self.own.mean(0, keepdim=True) > 0.5).to(self.own.dtype).expand_as(self.own)
        return Exchanged(float(self.right.mean()), self._under(everything, usual, labels)[0], same, image, gates)

    def _under(self, rows: NDArray[np.int64], gates: Tensor, said: NDArray[np.int64]) -> tuple[float, float]:
        """Of the images in `rows`, under these gates: those predicted as their own class, and as `said`."""
        if not len(rows):
            return math.nan, math.nan
        found = self.predict(self.inputs[rows], gates)
        return float((found == self.labels[rows]).mean()), float((found == said).mean())


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
    if number < 1:
        raise ValueError(f"images must be at least 1, but is {number}")
    inputs: list[Tensor] = []
    labels, found = [], 0
    for batch in loader:
        images, own = images_and_labels(batch)
        if own is None:
            raise ValueError("forcing gates needs labels: give batches of (images, labels)")
        images = inputs_of(images, preprocessing, device)
        if inputs and images.shape[1:] != inputs[0].shape[1:]:
            sizes = " and ".join(str(tuple(shape)) for shape in (inputs[0].shape[1:], images.shape[1:]))
            raise ValueError(f"images are {sizes}, and gates are exchanged among those of one size: bring them to one")
        inputs.append(images)
        labels.append(own.to(device))
        found += len(images)
        if found >= number:
            break
    if not found:
        raise ValueError("there are no images to force gates on: the loader is empty")
    return torch.cat(inputs)[:number], torch.cat(labels)[:number]
