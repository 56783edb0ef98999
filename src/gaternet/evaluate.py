"""Evaluation: accuracy, and what the gates do, over a whole set."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.checkpoint import load_model
from gaternet.data import DataError, ImageSet, Preprocessing, load_data
from gaternet.machine import make_accelerator, make_loader
from gaternet.method import GaterNet
from gaternet.recipes import Runtime
from gaternet.run import find_model

BATCH = 500  # images a step, over all processes together


@dataclass(frozen=True)
class ToInput:
    """Batches of pixels -> model inputs, on the batches' device."""

    preprocessing: Preprocessing
    channels_last: bool = True

    def __call__(self, images: UInt8[Tensor, "batch chans h w"]) -> Float[Tensor, "batch chans h w"]:
        inputs = self.preprocessing.normalize(images)
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    to_input: ToInput,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Evaluate a network in its evaluation mode; it is left in the mode it was in.

    Args:
        network: a GaterNet, or a plain network; not wrapped for several processes.
        batches: uint8 images (B, C, H, W) and labels (B,); a loader that `accelerator` has prepared.
        to_input: images -> inputs of the network.
        accelerator: for mixed precision, and for gathering what several processes found.

    Returns:
        loss, accuracy and top5_accuracy in [0, 1], images; for a GaterNet also density (mean share of open gates), the
        shares of gates that are always_on, always_off and dependent on the input, and site_density, one number a site.
    """
    was_training = network.training
    network.eval()
    count = correct = correct5 = 0
    loss = 0.0
    opened = torch.zeros(0)
    try:
        for images, labels in batches:
            with accelerator.autocast():
                output = network(to_input(images), return_gates=True) if isinstance(network, GaterNet) else None
                logits, gates = (
                    output if output is not None else (network(to_input(images)), labels.new_zeros(len(labels), 0))
                )
            logits, gates, labels = accelerator.gather_for_metrics((logits.float(), gates, labels))
            ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int(ranks[:, 0].sum())
            correct5 += int(ranks.any(1).sum())
            count += len(labels)
            opened = opened.to(gates.device) + gates.sum(0) if len(opened) else gates.sum(0)
    finally:
        network.train(was_training)
    if not count:
        raise ValueError("there are no images to evaluate on")
    metrics = {"loss": loss / count, "accuracy": correct / count, "top5_accuracy": correct5 / count, "images": count}
    if isinstance(network, GaterNet):
        metrics |= gate_metrics(network, opened.double().cpu() / count)
    return metrics


def gate_metrics(network: GaterNet, rates: Float[Tensor, " gates"]) -> dict[str, Any]:
    """What the gates' opening rates over a set, each in [0, 1], say."""
    return {
        "density": rates.mean().item(),
        "always_on": (rates == 1).double().mean().item(),
        "always_off": (rates == 0).double().mean().item(),
        "dependent": ((rates > 0) & (rates < 1)).double().mean().item(),
        "site_density": [round(rates[site.start : site.stop].mean().item(), 4) for site in network.sites],
    }


def evaluate_saved(
    path: Path,
    which: Literal["last", "best"] = "last",
    data: str | None = None,
    data_root: str | None = None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's model, or a saved one, on the test images of `data` or of the set it was trained on.

    Raises:
        ValueError: there is no such model or data, or the two do not go together.
    """
    network, metadata = load_model(find_model(path, which))
    source = data or metadata.get("trained", {}).get("data")
    if source is None:
        raise ValueError(f"{path} does not say what it was trained on: name the data with --data")
    runtime = Runtime(cpu=cpu)
    accelerator = make_accelerator(runtime)
    images = load_test_set(source, metadata, data_root)
    batches = make_loader(images, max(1, BATCH // accelerator.num_processes), runtime, accelerator)
    to_input = ToInput(Preprocessing.from_metadata(metadata))
    network = network.to(accelerator.device)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in PyTorch's stubs)
    return evaluate(network, batches, to_input, accelerator)


def load_test_set(source: str, metadata: dict[str, Any], data_root: str | None = None) -> ImageSet:
    """The test images of `source`, with the sizes, channels and class numbers that the model of `metadata` knows.

    Raises:
        DataError: there are none, or they do not go with the model.
    """
    preprocessing, known = Preprocessing.from_metadata(metadata), metadata["classes"]
    square = preprocessing.height == preprocessing.width
    data = load_data(source, image_size=preprocessing.height if square else None, root=data_root)
    if data.preprocessing.channels != preprocessing.channels:
        has, wants = data.preprocessing.channels, preprocessing.channels
        raise DataError(
            f"{source} has images of {has} channels, but the model was trained on {wants}: use its own data"
        )
    if list(data.classes) != known:
        raise DataError(f"{source} has {len(data.classes)} classes, not those that the model knows: {', '.join(known)}")
    if not isinstance(data.test.images, Tensor):
        data.test.transform = preprocessing.fit
    return data.test
