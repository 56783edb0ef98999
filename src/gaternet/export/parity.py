"""Whether an exported file computes what its model does: run it, under many gates, and compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.errors import first_line
from gaternet.method import GaterNet
from gaternet.wrapping import require_whole

# Of logits, relative to the largest where that is above 1; of gates, and of their distance to the threshold.
TOLERANCE = 1e-4
DRAWN = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # densities of the gates that are drawn at random
FAULT = "nothing was written; this is a fault of the exporter, please report the network"

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # images -> logits (B, K), and a GaterNet's gates (B, C)
RunGated = Callable[[Tensor, Tensor], Tensor]  # images and gates -> logits


class ExportError(ValueError):
    """A model cannot be exported, or the file would not compute what the model does: none is left behind."""


@dataclass(frozen=True)
class Parity:
    """How a file was compared with its model.

    Attributes:
        images: on how many images.
        patterns: how many of them have different gates; 0 for a plain network.
        forced: under how many drawn gate patterns besides, put in the place of the gater's.
        borderline: gates whose logit lies within 1e-4 of the threshold, which rounding may decide; no other differs.
        max_error: largest difference of a logit, relative to the largest logit where that is above 1.
    """

    images: int
    patterns: int
    forced: int
    borderline: int
    max_error: float

    def __str__(self) -> str:
        gates = f" with {self.patterns} gate patterns, and {self.forced} drawn ones" if self.patterns else ""
        return f"compared on {self.images} images{gates}: largest relative difference of a logit {self.max_error:.1e}"


def make_images(example: Tensor, count: int) -> Tensor:
    """Images (count, channels, H, W) of the example's kind, from flat to busy, that a gater tells apart.

    Args:
        example: images (B, channels, H, W) as the model takes them, or pixels, uint8.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = example.shape[2:]
    images = []
    for i in range(count):
        cells = min(2 ** (1 + i % 5), height, width)  # of noise along a side
        noise = torch.randn(1, example.shape[1], cells, cells, generator=generator, device="cpu")
        shift = torch.randn(1, example.shape[1], 1, 1, generator=generator, device="cpu")
        images.append(F.interpolate(noise, (height, width), mode="bilinear") * (0.5 + i % 3) + 0.5 * shift)
    made = torch.cat(images)
    return (made * 64 + 128).clamp(0, 255).to(torch.uint8) if example.dtype == torch.uint8 else made.to(example.dtype)


@torch.no_grad()
def compare(
    model: nn.Module, to_input: Callable[[Tensor], Tensor], images: Tensor, run: Run, run_gated: RunGated | None
) -> Parity:
    """Compare a file with its model; both in float32 on the CPU.

    Args:
        model: in evaluation mode.
        to_input: what the model sees of the images that the file takes.
        images: held out, (N, ...).
        run: the file, on a batch of images.
        run_gated: the file behind its gater, on images and given gates (B, C); None for a plain network.

    Raises:
        ExportError: they differ; the message says in what, `Source.compare` adds what to do.
        ValueError: the model gives logits that are no finite numbers, or does more than run its backbone under its
            gates.
    """
    inputs = to_input(images)
    logits, gates = _run(run, images)
    if not isinstance(model, GaterNet):
        return Parity(len(images), 0, 0, 0, _difference(logits, model(inputs), "of the images"))
    assert gates is not None
    assert run_gated is not None
    wanted, borderline = _gates_of(model, inputs)
    require_whole(model, inputs)
    different = differing(gates, wanted) & ~borderline
    if different.any():
        raise ExportError(f"the exported gates differ from the model's, {int(different.sum())} of {different.numel()}")
    errors = [_difference(logits, model.forward_gated(inputs, gates), "of the images")]
    generator = torch.Generator().manual_seed(0)
    for density in DRAWN:
        drawn = (torch.rand(1, model.num_gates, generator=generator, device="cpu") < density).float()
        image = images[:1]
        expected = model.forward_gated(inputs[:1], drawn)
        errors.append(
            _difference(_run(run_gated, image, drawn), expected, f"under gates drawn with density {density:g}")
        )
    patterns = len(wanted.unique(dim=0))
    return Parity(len(images), patterns, len(DRAWN), int(borderline.sum()), max(errors))


def differing(found: Tensor, wanted: Tensor) -> Tensor:
    """Which gates differ, but for rounding in those that are neither 0 nor 1."""
    return ~((found - wanted).abs() <= TOLERANCE)  # NaN is like nothing


def _run(run: Callable[..., Any], images: Tensor, *gates: Tensor) -> Any:
    """What the file gives."""
    try:
        return run(images, *gates)
    except Exception as error:  # runtimes have errors of their own
        shape = tuple(images.shape)
        raise ExportError(f"the exported model does not run on images {shape} ({first_line(error)})") from error


def _gates_of(model: GaterNet, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The model's gates (B, C), and which of them rounding may decide."""
    gates = model.gates(inputs)
    if (gater := model.plain_gater) is None:
        return gates, torch.zeros_like(gates, dtype=torch.bool)
    return gates, (gater.logits(inputs) - gater.threshold).abs() < TOLERANCE


def _difference(found: Tensor, wanted: Tensor, where: str) -> float:
    """The largest, relative to the largest logit where that is above 1."""
    if found.shape != wanted.shape:
        raise ExportError(f"the exported model gives {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    if not wanted.isfinite().all():
        raise ValueError(
            f"the model's own logits {where} are not all finite numbers: train it anew, or check the images"
        )
    scale = max(1.0, float(wanted.abs().max()))
    error = float((found - wanted).abs().max()) / scale
    if not error <= TOLERANCE:  # nor is it if it is NaN
        raise ExportError(
            f"the exported model's logits {where} differ from the model's by {error:.1e}, more than {TOLERANCE:g}"
        )
    return error
