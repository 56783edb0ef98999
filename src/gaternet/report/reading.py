"""What the report reads out of an analysis before it draws: layouts, orders, a probe."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from gaternet.findings import GateAnalysis


@dataclass(frozen=True)
class Probe:
    """A linear classifier that sees the gates alone.

    Attributes:
        accuracy: share of right predictions on `images` images that it was not fitted to, in [0, 1].
        chance: share of the largest class among them.
        model: the model's own accuracy on the same images.
    """

    accuracy: float
    chance: float
    model: float
    images: int


def embed(analysis: GateAnalysis) -> Float[NDArray[np.float32], "m 2"] | None:
    """Places of the samples in the plane, so that images with like gates lie together: paper, figure 6.

    PCA to at most 400 dimensions, then t-SNE; None if there is nothing to lay out.
    """
    gates = analysis.samples.gates[:, analysis.dependent].astype(np.float32)
    if len(gates) < 10 or len(np.unique(gates, axis=0)) < 4:
        return None
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(400, *gates.shape), random_state=0).fit_transform(gates)
    tsne = TSNE(2, perplexity=min(30, (len(gates) - 1) / 3), init="pca" if reduced.shape[1] > 1 else "random")
    tsne.set_params(random_state=0)
    return tsne.fit_transform(reduced).astype(np.float32)


def probe(analysis: GateAnalysis) -> Probe | None:
    """Fit a logistic regression from gates to labels on half of the samples, test it on the others.

    None without labels, and where there are too few images, classes or dependent gates.
    """
    samples, dependent = analysis.samples, analysis.dependent
    if not analysis.labeled or not dependent.any() or len(samples.label) < 40:
        return None
    from sklearn.linear_model import LogisticRegression

    half = len(samples.label) // 2  # they are in random order
    gates = samples.gates[:, dependent].astype(np.float32) - 0.5
    if not 2 <= len(np.unique(samples.label[:half])) <= half / 4:
        return None
    classifier = LogisticRegression(max_iter=1000, random_state=0).fit(gates[:half], samples.label[:half])
    tested = samples.label[half:]
    return Probe(
        float(classifier.score(gates[half:], tested)),
        float(np.bincount(tested).max() / len(tested)),
        float((samples.prediction[half:] == tested).mean()),
        len(tested),
    )


def arrange(rows: Float[NDArray[np.float64], "rows columns"]) -> Int[NDArray[np.int64], " rows"]:
    """An order in which rows that are alike are neighbours: that of a hierarchical clustering's leaves."""
    if len(rows) < 3:
        return np.arange(len(rows))
    from scipy.cluster.hierarchy import leaves_list, linkage

    return leaves_list(linkage(rows, "average", optimal_ordering=len(rows) <= 500)).astype(np.int64)
