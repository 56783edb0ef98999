"""What gates are for: what becomes of a trained model's predictions when some gates are forced open or shut."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from gaternet.analysis import GateAnalysis
from gaternet.data import Preprocessing
from gaternet.method import GaterNet

SHARE = 0.05  # of the gates that depend on the input: so many are taken from a class


@dataclass(frozen=True)
class Forced:
    """Accuracy, each in [0, 1], on M labeled images with gates forced.

    Attributes:
        images: M.
        accuracy: with no gate forced.
        site_shut, site_open: with all gates of one site shut or open, in the order of the sites, (S,).
        gates: how many gates are taken from a class, those that depend on the input and are open for it more often
            than for the others, most so first.
        class_before: of each class with no gate forced, (K,); NaN for a class without images.
        class_own: of each class with its own gates shut, (K,).
        class_others: of all images of other classes with these gates shut, (K,).
        class_random: of each class with so many other dependent gates shut, the mean of random draws, (K,).
    """

    images: int
    accuracy: float
    site_shut: Float[NDArray[np.float64], " sites"]
    site_open: Float[NDArray[np.float64], " sites"]
    gates: int
    class_before: Float[NDArray[np.float64], " classes"]
    class_own: Float[NDArray[np.float64], " classes"]
    class_others: Float[NDArray[np.float64], " classes"]
    class_random: Float[NDArray[np.float64], " classes"]


@torch.no_grad()
def force_gates(
    model: GaterNet,
    loader: Iterable[Any],
    analysis: GateAnalysis,
    *,
    preprocessing: Preprocessing | None = None,
    images: int = 300,
    draws: int = 3,
    classes: int = 10,
    seed: int = 0,
) -> Forced:
    """Run the backbone under changed gates, on the first images of a loader.

    Takes 2 S + (1 + draws) min(K, classes) passes over the images.

    Args:
        model, loader, preprocessing: as for `gaternet.analyze`; with labels. A loader in random order is best.
        analysis: of this model: it says which gates are open for which class.
        images: number of images to use.
        draws: of gates at random.
        classes: gates are taken from the first so many classes; the others' figures are NaN.
        seed: of these draws.

    Raises:
        ValueError: the loader has no images or no labels.
    """
    training = model.training
    model.eval()
    try:
        inputs, labels = _first(loader, images, preprocessing, next(model.parameters()).device)
        own = model.gates(inputs)
        named, count = labels.cpu().numpy(), len(analysis.classes)

        def right(gates: Tensor) -> Bool[NDArray[np.bool_], " m"]:
            chunks = zip(inputs.split(100), gates.split(100), strict=True)
            found = torch.cat([model.forward_gated(some, chosen).argmax(1) for some, chosen in chunks])
            return (found == labels).cpu().numpy()

        def forced(columns: Any, value: float) -> Bool[NDArray[np.bool_], " m"]:
            gates = own.clone()
            gates[:, columns] = value
            return right(gates)

        before = right(own)
        slices = [slice(site.start, site.stop) for site in model.sites]
        site_shut, site_open = ([forced(columns, value).mean() for columns in slices] for value in (0.0, 1.0))
        number = max(1, round(SHARE * int(analysis.dependent.sum())))
        generator = np.random.default_rng(seed)
        figures = np.full((4, count), np.nan)
        for label in range(count):
            mine = named == label
            if not mine.any():
                continue
            figures[0, label] = before[mine].mean()
            top = class_gates(analysis, label, number)
            if label >= classes or not len(top):
                continue
            shut = forced(top, 0.0)
            others = np.setdiff1d(np.flatnonzero(analysis.dependent), top)
            size = min(len(top), len(others))
            random = [forced(generator.choice(others, size, replace=False), 0.0)[mine].mean() for _ in range(draws)]
            figures[1:, label] = shut[mine].mean(), shut[~mine].mean() if (~mine).any() else np.nan, np.mean(random)
    finally:
        model.train(training)
    return Forced(len(labels), float(before.mean()), np.array(site_shut), np.array(site_open), number, *figures)


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
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError("forcing gates needs labels: give batches of (images, labels)")
        images = batch[0].to(device)
        inputs.append(preprocessing.normalize(images) if preprocessing else images)
        labels.append(torch.as_tensor(batch[1]).to(device))
        found += len(images)
        if found >= number:
            break
    if not found:
        raise ValueError("there are no images to force gates on: the loader is empty")
    return torch.cat(inputs)[:number], torch.cat(labels)[:number]
