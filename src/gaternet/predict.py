"""Predictions for image files, with the number of filters that each image opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaternet.data import Preprocessing
from gaternet.method import GaterNet

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: the file.
        classes: names of the likeliest classes, with their probabilities in [0, 1], likeliest first.
        open_filters, gated_filters: how many of the gated filters the image opened; None for a plain network.
    """

    image: str
    classes: tuple[tuple[str, float], ...]
    open_filters: int | None
    gated_filters: int | None


@torch.no_grad()
def predict(
    network: nn.Module, metadata: Mapping[str, Any], images: Sequence[str | Path], top: int = 5
) -> list[Prediction]:
    """Classify image files.

    Args:
        network: in evaluation mode.
        metadata: what was saved with it: its classes, and its preprocessing.
        images: files that Pillow reads.
        top: number of classes to report, at least 1; never more than there are.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, but is {top}")
    preprocessing, classes = Preprocessing.from_metadata(metadata), metadata["classes"]
    device = next(network.parameters()).device
    predictions = []
    for start in range(0, len(images), _BATCH):
        paths = images[start : start + _BATCH]
        pixels = torch.stack([preprocessing.open(path) for path in paths]).to(device)  # (B, C, H, W)
        inputs = preprocessing.normalize(pixels)
        gates = None
        if isinstance(network, GaterNet):
            logits, gates = network(inputs, return_gates=True)
        else:
            logits = network(inputs)
        likeliest = logits.float().softmax(1).topk(min(top, len(classes)))
        for row, path in enumerate(paths):
            pairs = zip(likeliest.indices[row].tolist(), likeliest.values[row].tolist(), strict=True)
            named = tuple((classes[index], probability) for index, probability in pairs)
            opened = (None, None) if gates is None else (int(gates[row].sum()), gates.shape[1])
            predictions.append(Prediction(str(path), named, *opened))
    return predictions
