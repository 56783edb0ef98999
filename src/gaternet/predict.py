"""Predictions for image files, with the number of gates that each image opened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaternet.data import DataError, Preprocessing, classes_of
from gaternet.export.exported import ExportedModel
from gaternet.method import GaterNet
from gaternet.sessions import NotRunnableError
from gaternet.trained import Trained, Which, class_names

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: the file.
        classes: names of the likeliest classes, with their probabilities in [0, 1], likeliest first.
        open_gates, num_gates: how many of the gates the image opened; None for a plain network, and for an exported one
            that does not give its gates out.
    """

    image: str
    classes: tuple[tuple[str, float], ...]
    open_gates: int | None
    num_gates: int | None


def load(path: str | Path, which: Which = "last") -> tuple[nn.Module | ExportedModel, dict[str, Any]]:
    """What `predict` takes: the model of a run, a saved model, or an exported one, and its metadata.

    A model that was saved in half precision computes in float32, which its inputs are.

    Raises:
        ValueError: there is no such model, or it does not say how images become its input.
        FileNotFoundError: there is no such .onnx file.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        raise ValueError(
            f"{path} may hold pickled objects, which could run code: predict with the .onnx file, or load it yourself "
            "with torch.export.load if you trust its author"
        )
    if not path.is_file() and path.suffix != ".onnx":
        model = Trained.open(path, which)
        return model.network, _named(model.metadata, model.source)
    if which != "last":
        raise ValueError(f"{path} is one exported model, not a run with a {which} one: name the run")
    try:
        exported = ExportedModel(path)
    except NotRunnableError as error:
        raise ValueError(f"{error}: name a run, a saved model or an .onnx file that was exported") from error
    if missing := {"classes", "preprocessing"} - exported.metadata.keys():
        raise ValueError(f"{path} was exported without its {min(missing)}: export it again with metadata=...")
    return exported, _named(exported.metadata, (exported.metadata.get("trained") or {}).get("data"))


def _named(metadata: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """With the classes' names, which a file of images has not; ValueError where something is missing or wrong."""
    classes = classes_of(metadata)
    Preprocessing.from_metadata(metadata)
    return {**metadata, "classes": class_names(data, classes) if data else classes}


@torch.no_grad()
def predict(
    network: nn.Module | ExportedModel,
    metadata: Mapping[str, Any],
    images: Sequence[str | Path],
    top: int = 5,
    note: Callable[[DataError], Any] | None = None,
) -> list[Prediction]:
    """Classify image files.

    Args:
        network: a model in evaluation mode, or an exported one.
        metadata: what was saved with it, or its own: its classes, and its preprocessing.
        images: files that Pillow reads.
        top: number of classes to report, at least 1; never more than there are.
        note: told of each file that cannot be read, which is then left out; by default it is raised.

    Raises:
        DataError: a file is missing, or cannot be read and there is no `note`.
        ValueError: the model's outputs are no numbers, or not those of its classes.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, but is {top}")
    if missing := [path for path in images if not Path(path).exists()]:  # before work is done that would be lost
        raise DataError(f"no image {missing[0]}: check the path")
    preprocessing, classes = Preprocessing.from_metadata(metadata), classes_of(metadata)
    batch = 1 if isinstance(network, ExportedModel) and network.takes_one else _BATCH
    predictions = []
    for start in range(0, len(images), batch):
        opened = _opened(images[start : start + batch], preprocessing, note)
        if not opened:
            continue
        paths = [path for path, _ in opened]
        logits, gates = _run(network, preprocessing, torch.stack([pixels for _, pixels in opened]))
        if logits.shape[1] != len(classes):
            raise ValueError(
                f"the model has {logits.shape[1]} outputs, but its metadata names {len(classes)} classes: name each one"
            )
        if not logits.isfinite().all():
            broken = paths[int((~logits.isfinite()).any(1).nonzero()[0])]
            raise ValueError(f"the model gives {broken} logits that are no finite numbers: its weights are damaged")
        likeliest = logits.float().softmax(1).topk(min(top, len(classes)))
        for row, path in enumerate(paths):
            pairs = zip(likeliest.indices[row].tolist(), likeliest.values[row].tolist(), strict=True)
            named = tuple((classes[index], probability) for index, probability in pairs)
            counts = (None, None) if gates is None else (int((gates[row] > 0.5).sum()), gates.shape[1])
            predictions.append(Prediction(str(path), named, *counts))
    return predictions


def _opened(
    paths: Sequence[str | Path], preprocessing: Preprocessing, note: Callable[[DataError], Any] | None
) -> list[tuple[str | Path, Tensor]]:
    """The files that can be read, with their pixels (C, H, W)."""
    found = []
    for path in paths:
        try:
            found.append((path, preprocessing.open(path)))
        except DataError as error:
            if note is None:
                raise
            note(error)
    return found


def _run(network: nn.Module | ExportedModel, preprocessing: Preprocessing, pixels: Tensor) -> tuple[Tensor, Any]:
    """Logits (B, K), and the gates (B, C) if they are to be had."""
    if isinstance(network, ExportedModel):
        return network.run(pixels if network.takes_pixels else preprocessing.normalize(pixels))
    inputs = preprocessing.normalize(pixels.to(next(network.parameters()).device))
    return network(inputs, return_gates=True) if isinstance(network, GaterNet) else (network(inputs), None)
