"""How well do trained networks generalise? Training and test error, and test error under corruptions.

python benchmarks/generalisation.py --data cifar10.npz RUN...

Each RUN is a run directory of a network on small images. Writes docs/results/generalisation.json; a run's line stays
there until the same is measured anew. The corruptions are made here, the same for all networks: Gaussian noise
(deviation, of pixels in [0, 1]), Gaussian blur (deviation in pixels), less contrast (factor), JPEG (quality), three
strengths each. The training error is that of as many training images, without augmentation and the gates' noise.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured_runs import measure_runs
from rich.progress import track
from tables import RESULTS
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from gaternet.data import ImageSet, ToInput, load_data
from gaternet.evaluate import BATCH, evaluate
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.modes import channels_last_
from gaternet.recipe import Runtime
from gaternet.trained import Trained

RESULT = RESULTS / "generalisation.json"


def noise(images: Tensor, deviation: float) -> Tensor:
    """Independent noise on each pixel and channel, always the same for the same images."""
    generator = torch.Generator().manual_seed(0)
    added = 255 * deviation * torch.randn(images.shape, generator=generator)
    return (images + added).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, deviation: float) -> Tensor:
    """Gaussian blur."""
    return tv.gaussian_blur(images, [7, 7], [deviation, deviation])


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Through JPEG and back, one by one."""
    return torch.stack([tv.jpeg(image, quality) for image in images])


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (0.02, 0.04, 0.08)),
    "blur": (blur, (0.5, 0.75, 1.0)),
    "contrast": (tv.adjust_contrast, (0.75, 0.5, 0.3)),
    "jpeg": (jpeg, (80, 50, 25)),
}


def main() -> None:
    """Measure all that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    data = load_data(args.data)
    assert isinstance(data.test.images, Tensor)
    assert isinstance(data.train.images, Tensor)
    images, count = data.test.images, len(data.test)
    sets = {"train": ImageSet(data.train.images[:count], list(data.train.labels[:count])), "test": data.test}
    for name, (corrupt, strengths) in CORRUPTIONS.items():
        for strength in track(strengths, f"making images with {name}"):
            sets[f"{name} {strength}"] = ImageSet(corrupt(images, strength), list(data.test.labels))
    runtime = Runtime(precision="no")
    accelerator = make_accelerator(runtime)

    def measure(run: Path) -> dict[str, Any]:
        model = Trained.open(run)
        network, preprocessing = model.network, model.preprocessing
        if images.shape[2:] != (preprocessing.height, preprocessing.width):
            parser.error(
                f"{run} was trained on images of another size: corruptions are made of images as they are stored"
            )
        to_input, errors = ToInput(preprocessing), {}
        channels_last_(network.to(accelerator.device))
        for name, some in track(sets.items(), str(run)):
            metrics = evaluate(network, make_batches(some, BATCH, runtime, accelerator), to_input, accelerator)
            errors[name] = 100 * (1 - metrics["accuracy"])
        return {"parameters": sum(p.numel() for p in network.parameters()), "errors": errors}

    command = f"python benchmarks/generalisation.py --data {Path(args.data).name} RUN..."
    measure_runs(args.runs, RESULT, command, measure)


if __name__ == "__main__":
    main()
