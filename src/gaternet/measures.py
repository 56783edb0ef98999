"""What a gate has to do with the class of an image: two measures, each of gates and of labels that were shuffled."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray


def mutual_information(
    opened: Int[NDArray[np.int64], "classes ..."], counts: Int[NDArray[np.int64], " classes"]
) -> Float[NDArray[np.float64], "..."]:
    """In bits, of the class and a gate: `opened` of the `counts` images of each class open it."""
    opened, counts = opened[counts > 0], counts[counts > 0]
    total = counts.sum()
    sizes = counts.reshape(-1, *[1] * (opened.ndim - 1))
    information = np.zeros(opened.shape[1:])
    for part in (opened, sizes - opened):  # gate open, gate closed
        joint, gate = part / total, part.sum(0) / total
        ratio = np.divide(joint, gate * (sizes / total), out=np.ones(part.shape), where=part > 0)
        information += (joint * np.log2(ratio)).sum(0)
    return np.maximum(information, 0)  # rounding


def selectivity(
    opened: Int[NDArray[np.int64], "classes ..."], counts: Int[NDArray[np.int64], " classes"]
) -> Float[NDArray[np.float64], "..."]:
    """(a - b) / (a + b), in [0, 1]: a is a gate's rate in the class that opens it most, b its mean in the others.

    After Morcos et al., "On the importance of single directions for generalization", 2018, equation 1. 0 for gates
    that are never open, and where there is one class.
    """
    present = counts > 0
    rates = opened[present] / counts[present].reshape(-1, *[1] * (opened.ndim - 1))
    most = rates.max(0)
    others = (rates.sum(0) - most) / (len(rates) - 1) if len(rates) > 1 else most
    return np.divide(most - others, most + others, out=np.zeros(most.shape), where=most > 0)
