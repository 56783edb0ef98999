"""What `gaternet.analyze` finds, as plain numbers: who opens which gates, and what that tells and costs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from gaternet.measures import mutual_information, selectivity

if TYPE_CHECKING:
    from gaternet.forcing import Forced

_DRAWN = 10_000_000  # numbers that are drawn at once, to find what chance would show


def gate_shares(rates: Float[NDArray[np.float64], " gates"]) -> dict[str, float]:
    """Of the share of images that each gate is open for: the mean, and which gates are always on, off, or neither."""
    on, off = rates == 1, rates == 0
    means = {"density": rates, "always_on": on, "always_off": off, "dependent": ~(on | off)}
    return {name: float(values.mean()) for name, values in means.items()}


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of the data set, at random or chosen: what is known of each.

    Attributes:
        index: its place in the data set, (M,).
        label, prediction: class numbers, (M,); labels are -1 where there are none.
        gates: which are open, (M, C).
        macs: of the backbone under these gates, (M,).
    """

    index: Int[NDArray[np.int64], " m"]
    label: Int[NDArray[np.int64], " m"]
    prediction: Int[NDArray[np.int64], " m"]
    gates: Bool[NDArray[np.bool_], "m gates"]
    macs: Float[NDArray[np.float64], " m"]


@dataclass(frozen=True, eq=False, repr=False)
class GateAnalysis:
    """What `analyze` found in N images with C gates and K classes.

    Where the data has no labels, the predicted class takes their place.

    Attributes:
        classes: their names.
        labeled: whether the data has labels.
        sites: name, conv, start, stop, channels and role of each, as in `GaterNet.sites`.
        histogram: images with n open gates, for n from 0 to C, (C + 1,).
        counts: images of each class, (K,).
        class_open: images of each class that each gate is open for, (K, C).
        class_right: images of each class that are predicted as such, (K,); without labels the same as `counts`, which
            says nothing.
        class_macs: mean MACs of the backbone over the images of each class, (K,); NaN for a class without any.
        backbone_macs, gater_macs: of one image, all gates open.
        samples: images drawn at random, without repetition.
        cheapest, dearest: the images with the fewest and with the most MACs.
        surest: the images that open each gate with the highest logit, and those that close it with the lowest,
            (2, E, C), as places in the data set; -1 where there are no more. None for a gater that has no logits.
        thumbnails: place in the data set -> uint8 image (h, w, 1 or 3), of all images named above.
        facts: place -> label (or -1), prediction, number of open gates and MACs of these images.
    """

    classes: tuple[str, ...]
    labeled: bool
    sites: tuple[dict[str, Any], ...]
    histogram: Int[NDArray[np.int64], " numbers"]
    counts: Int[NDArray[np.int64], " classes"]
    class_open: Int[NDArray[np.int64], "classes gates"]
    class_right: Int[NDArray[np.int64], " classes"]
    class_macs: Float[NDArray[np.float64], " classes"]
    backbone_macs: int
    gater_macs: int
    samples: Samples
    cheapest: Samples
    dearest: Samples
    surest: Int[NDArray[np.int64], "2 extremes gates"] | None
    thumbnails: dict[int, NDArray[np.uint8]]
    facts: dict[int, tuple[int, int, int, int]]
    _chance: dict[Any, Any] = field(default_factory=dict, init=False)  # drawn already

    def __repr__(self) -> str:
        opened, dependent = self.rates.mean(), self.dependent.mean()
        return (
            f"GateAnalysis({self.images:,} images, {self.num_gates:,} gates at {len(self.sites)} sites: "
            f"{opened:.1%} open, {dependent:.1%} dependent)"
        )

    @property
    def images(self) -> int:
        """N."""
        return int(self.counts.sum())

    @property
    def num_gates(self) -> int:
        """C."""
        return self.class_open.shape[1]

    @property
    def open_counts(self) -> Int[NDArray[np.int64], " gates"]:
        """Images that each gate is open for, (C,)."""
        return self.class_open.sum(0)

    @property
    def rates(self) -> Float[NDArray[np.float64], " gates"]:
        """Share of the images that each gate is open for, in [0, 1], (C,)."""
        return self.open_counts / self.images

    @property
    def dependent(self) -> Bool[NDArray[np.bool_], " gates"]:
        """Gates that are open for some images and closed for others, (C,)."""
        return (self.open_counts > 0) & (self.open_counts < self.images)

    @property
    def site_shares(self) -> Float[NDArray[np.float64], "3 sites"]:
        """Shares of each site's gates that are always off, always on and dependent, in [0, 1], (3, S)."""
        counts = self.open_counts
        kinds = np.stack([counts == 0, counts == self.images, self.dependent])  # (3, C)
        return np.stack([kinds[:, site["start"] : site["stop"]].mean(1) for site in self.sites], 1)

    @property
    def class_rates(self) -> Float[NDArray[np.float64], "classes gates"]:
        """Share of each class' images that each gate is open for, (K, C); NaN for a class without any."""
        return np.where(self.counts[:, None] > 0, self.class_open / np.maximum(self.counts, 1)[:, None], math.nan)

    @property
    def class_densities(self) -> Float[NDArray[np.float64], " classes"]:
        """Mean share of the gates that an image of each class opens, in [0, 1], (K,); NaN for a class without any."""
        return self.class_rates.mean(1)

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions, in [0, 1]; None without labels."""
        return int(self.class_right.sum()) / self.images if self.labeled else None

    @property
    def gated_macs(self) -> float:
        """Mean MACs of the backbone under the images' gates."""
        return float(np.nansum(self.class_macs * self.counts) / self.images)

    def save(self, directory: str | Path, *, forced: "Forced | None" = None, title: str = "Gates") -> Path:
        """Write index.html, a page that shows all this and needs no network, and gates.json; the page's path.

        `forced` is what `gaternet.forcing.force_gates` found, for the page's last part. Raises OSError where
        they cannot be written.
        """
        from gaternet.report import write_report

        return write_report(self, Path(directory), forced=forced, title=title)

    def information(self) -> Float[NDArray[np.float64], " gates"]:
        """Mutual information of each gate and the class, in bits, (C,), from 0 to 1 for two classes or more."""
        return mutual_information(self.class_open, self.counts)

    def information_by_chance(self, draws: int = 20, seed: int = 0) -> Float[NDArray[np.float64], "draws gates"]:
        """The same with the labels shuffled, (draws, C): what a gate that knows nothing of the class shows."""
        return self._by_chance(mutual_information, draws, seed)

    def selectivity(self) -> Float[NDArray[np.float64], " gates"]:
        """How much a gate is one class', in [0, 1], (C,); see the function `selectivity`."""
        return selectivity(self.class_open, self.counts)

    def selectivity_by_chance(self, draws: int = 20, seed: int = 0) -> Float[NDArray[np.float64], "draws gates"]:
        """The same with the labels shuffled, (draws, C)."""
        return self._by_chance(selectivity, draws, seed)

    def telling_gates(self, number: int) -> Int[NDArray[np.int64], " chosen"]:
        """The dependent gates that tell most about the class, at most `number`, most first."""
        told = np.where(self.dependent, self.information(), -1)
        order = np.argsort(-told, kind="stable")[:number]
        return order[told[order] >= 0]

    def _by_chance(self, measure: Any, draws: int, seed: int) -> Float[NDArray[np.float64], "draws gates"]:
        if (draws, seed) not in self._chance:  # drawing takes far longer than measuring: both measures see one draw
            self._chance[draws, seed] = self._draw(draws, seed)
        return self._chance[draws, seed][measure]

    def _draw(self, draws: int, seed: int) -> dict[Any, NDArray[np.float64]]:
        generator, measures = np.random.default_rng(seed), (mutual_information, selectivity)
        found = {measure: np.zeros((draws, self.num_gates)) for measure in measures}
        # The classes of m images drawn without repetition: just what shuffling gives for a gate that is open m times.
        for opened in np.unique(self.open_counts[self.dependent]):
            same = np.flatnonzero(self.open_counts == opened)
            for some in np.array_split(same, math.ceil(len(same) * draws * len(self.counts) / _DRAWN)):
                shuffled = generator.multivariate_hypergeometric(self.counts, int(opened), (draws, len(some)))
                for measure in measures:
                    found[measure][:, some] = measure(np.moveaxis(shuffled, -1, 0), self.counts)
        return found
