"""Images to train and to predict on: those of `gaternet.arrays`, of `gaternet.folders`, single files.

Every source ends as two `ImageSet`s of uint8 images (C, H, W) and labels.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from gaternet.arrays import EMBEDDED, TORCHVISION, DataError, digits, read_npz, read_torchvision
from gaternet.augment import file_transform
from gaternet.folders import read_folder
from gaternet.recipe import Augmentation

_KNOWN_STATISTICS = {  # mean and deviation of the training pixels, per channel, in [0, 1]; CIFAR-10's are the paper's
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input.

    Attributes:
        height, width: of the input, in pixels.
        mean, std: per channel, of pixels in [0, 1]; their number is the number of channels, 1 (grey) or 3 (RGB).
        crop: share of the shorter side that is kept around the centre of an image that has another size, in (0, 1].
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if not isinstance(side := getattr(self, name), int) or side < 1:
                raise ValueError(f"{name} must be a whole number of pixels, but is {side!r}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(f"mean and std must have 1 or 3 channels, but have {len(self.mean)} and {len(self.std)}")
        if not all(math.isfinite(value) for value in self.mean) or not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"mean must be finite, and std above 0, but they are {self.mean} and {self.std}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1], but is {self.crop}")

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.mean)

    def normalize(self, images: UInt8[Tensor, "batch chans h w"]) -> Float[Tensor, "batch chans h w"]:
        """Pixels 0 to 255 -> model input, float32, on the same device."""
        return _normalize(images, list(self.mean), list(self.std))

    def fit(self, image: UInt8[Tensor, "chans _ _"]) -> UInt8[Tensor, "chans h w"]:
        """Resize and crop the centre, unless the image has the right size."""
        if image.shape[1:] == (self.height, self.width):
            return image
        target = self.height / self.width
        side = image.shape[1:]
        if side[0] / side[1] < target:  # the other side is rounded down, as torchvision and timm do
            height = math.floor(self.height / self.crop)
            width = max(self.width, math.floor(height * side[1] / side[0]))
        else:
            width = math.floor(self.width / self.crop)
            height = max(self.height, math.floor(width * side[0] / side[1]))
        if max(height / self.height, width / self.width) * self.crop > 4:  # resized whole, it might fill the memory
            top, left = round((height - self.height) / 2), round((width - self.width) / 2)
            down, right = side[0] / height, side[1] / width  # pixels of the image, a pixel of the resized one
            box = (left * right, top * down, (left + self.width) * right, (top + self.height) * down)
            part = tv.to_pil_image(image).resize((self.width, self.height), Image.Resampling.BILINEAR, box)
            return tv.pil_to_tensor(part)
        return tv.center_crop(tv.resize(image, [height, width]), [self.height, self.width])

    def open(self, path: str | Path) -> UInt8[Tensor, "chans h w"]:
        """An image file as pixels (channels, height, width), ready for `normalize`; DataError if it is unreadable."""
        return self.fit(read_image(path, self.channels))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Preprocessing":
        """From what a saved model's metadata holds; DataError if it does not say."""
        try:
            saved = dict(metadata["preprocessing"])
            return cls(mean=tuple(saved.pop("mean")), std=tuple(saved.pop("std")), **saved)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the model's metadata does not say how images become its input ({error!r}): set model.metadata"
                "['preprocessing'], a dict of height, width, mean and std, and save it again"
            ) from error


@dataclass(frozen=True)
class ToInput:
    """`Preprocessing.normalize` for many batches: mean and std stay on the device, since copying them makes it wait."""

    preprocessing: Preprocessing
    channels_last: bool = True
    _constants: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)

    def __call__(self, images: UInt8[Tensor, "batch chans h w"]) -> Float[Tensor, "batch chans h w"]:
        device = images.device
        if device not in self._constants:
            known = self.preprocessing
            self._constants[device] = torch.tensor(known.mean, device=device), torch.tensor(known.std, device=device)
        inputs = _normalize(images, *self._constants[device])
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs


def classes_of(metadata: Mapping[str, Any]) -> list[str]:
    """The names of the classes that a saved model's metadata hold; DataError if there are none."""
    classes = metadata.get("classes")
    if not isinstance(classes, list | tuple):
        raise DataError(
            "the model's metadata does not name its classes: set model.metadata['classes'], a list, and save it again"
        )
    return list(map(str, classes))


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images, held as one uint8 tensor (N, C, H, W) or read from files when needed, with labels in [0, K).

    Args:
        images: the tensor, or the paths of RGB files.
        labels: one an image.
        augmentation: of images in memory, which `gaternet.loader` carries out on whole batches.
        transform: of images from files, uint8 (C, H, W) -> uint8 (C, H, W) of equal sizes; may draw from PyTorch's
            generator.
        seed: with the epoch and the image's index, decides what `transform` draws.
    """

    def __init__(
        self,
        images: Tensor | Sequence[str],
        labels: Sequence[int],
        augmentation: Augmentation | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        # Paths and labels as arrays: a list's objects are counted by each process that reads them, and so copied to it.
        self.images = images if isinstance(images, Tensor) else np.array([os.fsencode(path) for path in images])
        self.labels = np.asarray(labels, np.int64)
        self.augmentation, self.transform = augmentation, transform
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and so what random transforms draw."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if isinstance(self.images, Tensor):
            return self.images[index], int(self.labels[index])
        image = read_image(os.fsdecode(self.images[index]), 3)
        if self.transform is not None:
            generator = torch.default_generator  # what torchvision's transforms draw from
            before = generator.get_state()
            generator.manual_seed(mix_seed("image", self.seed, self.epoch, index))
            image = self.transform(image)
            generator.set_state(before)
        return image, int(self.labels[index])

    def take(self, indices: Iterable[int]) -> UInt8[Tensor, "n chans h w"]:
        """Some of the images as one tensor, in the order of the indices; those of files must come out in one size."""
        return torch.stack([self[index][0] for index in indices])


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training: two `ImageSet`s, the classes' names, and how images become model inputs."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def metadata(self) -> dict[str, Any]:
        """What is saved with a model, so that it can be used without the data."""
        return {"classes": list(self.classes), "preprocessing": asdict(self.preprocessing)}

    def identity(self) -> dict[str, Any]:
        """What tells these images from others, wherever they lie: their numbers, classes and, roughly, pixels."""
        pixels = asdict(self.preprocessing)
        pixels |= {name: [round(value, 6) for value in pixels[name]] for name in ("mean", "std")}
        numbers = {"training_images": len(self.train), "test_images": len(self.test)}
        return {**numbers, **self.metadata(), "preprocessing": pixels}


def load_data(
    source: str,
    augmentation: Augmentation | None = None,
    image_size: int | None = None,
    root: str | Path | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set.

    Args:
        source: "digits" (embedded in scikit-learn), "cifar10", "cifar100" or "fashion_mnist" (torchvision's, found
            under `root` or downloaded there), a .npz file in Keras' layout (x_train, y_train, x_test, y_test; uint8,
            NHWC or NHW), or a folder: train/CLASS/* with test/CLASS/* (or val, valid, validation: the first that has
            some of the classes), or CLASS/*, of which every tenth image, and one of each class at least, is then held
            out as the test set. Names that begin with a dot, and __MACOSX, are passed over.
        augmentation: of the training images.
        image_size: side in pixels to bring images to; default: as stored, folders 224.
        root: where torchvision's sets lie; default: $GATERNET_DATA, or ~/.cache/gaternet.
        seed: of the augmentation.

    Raises:
        DataError: there is no such data, or it cannot be used; the message names the mend.
    """
    check_source(source)
    if source in EMBEDDED:
        arrays, classes, known = digits(), tuple(map(str, range(10))), None
    elif source in TORCHVISION:
        arrays, classes = read_torchvision(source, Path(root or os.environ.get("GATERNET_DATA") or "~/.cache/gaternet"))
        known = _KNOWN_STATISTICS[source]
    elif source.endswith(".npz"):
        arrays, classes, known = *read_npz(Path(source)), None
    else:
        return _folder(Path(source), augmentation, image_size or 224, seed)
    images, labels, test_images, test_labels = arrays
    if image_size is not None:
        images, test_images = (_resized(part, image_size) for part in (images, test_images))
    height, width = images.shape[2:]
    if test_images.shape[2:] != images.shape[2:]:
        sizes = " and ".join(f"{x.shape[2]} x {x.shape[3]}" for x in (images, test_images))
        raise DataError(f"training and test images in {source} are {sizes}: bring both to one size with --image-size")
    mean, std = known or _statistics(images)
    return ImageData(
        ImageSet(images, labels.tolist(), augmentation),
        ImageSet(test_images, test_labels.tolist()),
        classes,
        Preprocessing(height, width, mean, std),
    )


def check_source(source: str) -> None:
    """DataError if there are no data of that name, see `load_data`; torchvision's may be still to be downloaded."""
    if source.endswith(".npz") and not Path(source).exists():
        raise DataError(f"no file {source}: check --data")
    if source not in (*EMBEDDED, *TORCHVISION) and not source.endswith(".npz") and not Path(source).is_dir():
        names = ", ".join([*EMBEDDED, *TORCHVISION])
        raise DataError(
            f"no data {source!r}: it is not one of {names}, nor a .npz file, nor a folder that exists; "
            "name yours with --data"
        )


def read_image(path: str | Path, channels: int) -> UInt8[Tensor, "chans h w"]:
    """An image file as uint8 (channels, H, W), grey for 1 channel, RGB for 3; DataError if it is unreadable."""
    try:
        with Image.open(path) as image:
            pixels = _eight_bits(image)
            if pixels.mode not in ("I", "F"):  # which `convert` would clip
                return tv.pil_to_tensor(pixels.convert("L" if channels == 1 else "RGB"))
    except FileNotFoundError as error:
        raise DataError(f"no image {path}: check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: name the images in it, say {path}/*") from error
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path} ({error}): repair or remove the file") from error
    raise DataError(f"image {path} holds signed, 32-bit or float pixels: convert it to 8 bits")


def images_of(batch: Any) -> Tensor:
    """Of a batch of images, or of (images, ...) as loaders give them.

    Raises:
        ValueError: it holds something else.
    """
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise ValueError(f"batches must be tensors of images, or (images, labels), but hold {kind}: wrap the loader")
    return images


def mix_seed(purpose: str, *numbers: int) -> int:
    """A 64-bit seed from several numbers: other purposes, neighbouring numbers and longer lists give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr((purpose, numbers)).encode(), digest_size=8).digest())


def _normalize(images: Tensor, mean: Any, std: Any) -> Tensor:
    return tv.normalize(tv.to_dtype(images, torch.float32, scale=True), mean, std)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The higher 8 bits of 16-bit grey, which `convert` would clip to white; any other image as it is."""
    # Some of Pillow's versions and readers give it as 32-bit integers, in files that hold none wider than 16 bits
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        return image
    image.load()
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _resized(images: UInt8[Tensor, "n c _ _"], side: int) -> UInt8[Tensor, "n c h w"]:
    """Squares, as `Preprocessing.fit` makes them of single images."""
    if images.shape[2] == images.shape[3]:
        return v2.Resize([side, side])(images)
    fit, found = Preprocessing(side, side, (0.0,), (1.0,)).fit, images.new_empty(*images.shape[:2], side, side)
    for image, place in zip(images, found, strict=True):
        place.copy_(fit(image))
    return found


def _statistics(images: UInt8[Tensor, "n c h w"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1] per channel, from exact histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        variance = float(share @ (values - mean) ** 2)
        means.append(mean)
        deviations.append(max(variance**0.5, 1 / 255))  # a constant channel stays finite
    return tuple(means), tuple(deviations)


def _folder(folder: Path, augmentation: Augmentation | None, size: int, seed: int) -> ImageData:
    train_samples, test_samples, classes = read_folder(folder)
    preprocessing = Preprocessing(size, size, *_KNOWN_STATISTICS["imagenet"], crop=0.875)
    transform = preprocessing.fit
    if augmentation is not None:
        steps = [file_transform(augmentation, size), preprocessing.fit]
        transform = v2.Compose(steps if augmentation.crop else steps[::-1])  # cutout counts pixels that are seen
    sets = []
    for samples, how in ((train_samples, transform), (test_samples, preprocessing.fit)):
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        sets.append(ImageSet(paths, labels, transform=how, seed=seed))
    return ImageData(sets[0], sets[1], classes, preprocessing)
