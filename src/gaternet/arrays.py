"""Data sets that are held in memory as arrays: an embedded one, torchvision's CIFAR and Fashion-MNIST, .npz files.

Each is training images, their labels, test images and their labels: uint8 (N, C, H, W) and int64 (N,).
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from gaternet.locks import locked

EMBEDDED = ("digits",)
TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion_mnist": datasets.FashionMNIST}


class DataError(ValueError):
    """Data that cannot be used. One sentence, also when a loader's worker process has wrapped it in a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def digits() -> tuple[Tensor, ...]:
    """scikit-learn's, which need no files: grey, 8 x 8 pixels; a fifth of each class are test images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found: Any = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    split = train_test_split(pixels, found.target, test_size=360, random_state=0, stratify=found.target)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in split)
    return x_train, y_train, x_test, y_test


def read_torchvision(name: str, root: Path) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The arrays of one of `TORCHVISION`, downloaded to `root` where it is not there, and its classes' names."""
    root = root.expanduser()
    parts: list[Tensor] = []
    dataset: Any = None
    for train in (True, False):
        try:
            try:
                dataset = TORCHVISION[name](root, train=train)
            except RuntimeError:  # not there yet, or only in part
                dataset = _download(name, root, train)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name} is not in {root} and cannot be downloaded ({error}): put torchvision's files there, "
                "or name a .npz file or a folder with --data"
            ) from error
        images = torch.as_tensor(dataset.data)
        parts += [images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), torch.as_tensor(dataset.targets)]
    return tuple(part.contiguous() for part in parts), tuple(dataset.classes)


def _download(name: str, root: Path, train: bool) -> Any:
    """One process at a time: the others then find the files."""
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        return TORCHVISION[name](root, train=train, download=True)


def read_npz(path: Path) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The arrays of a file in Keras' layout, and numbers for its classes' names."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as file:  # np.load takes .npy files too
            if missing := [name for name in names if name not in file.files]:
                raise DataError(f"{path} has no array {missing[0]}: it must hold {', '.join(names)}")
            arrays = {name: np.asarray(file[name]) for name in names}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or no .npz file of plain arrays ({error}): make or fetch it again"
        ) from error
    parts: list[Tensor] = []
    num_classes = 0
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        x = x[..., None] if x.ndim == 3 else x
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
            shape = arrays[f"x_{part}"].shape
            raise DataError(f"x_{part} in {path} must be uint8 images (N, H, W, 1 or 3), but is {x.dtype} {shape}")
        if parts and x.shape[3] != parts[0].shape[1]:
            raise DataError(
                f"x_test in {path} has {x.shape[3]} channels, x_train has {parts[0].shape[1]}: use one number"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.size != len(x):
            raise DataError(f"y_{part} in {path} must be {len(x)} integers, one an image, but is {y.dtype} {y.shape}")
        num_classes = num_classes or int(y.max()) + 1
        if not 1 < num_classes <= len(arrays["y_train"]):
            raise DataError(
                f"labels y_train in {path} go up to {num_classes - 1}, of {len(arrays['y_train'])} images: number two "
                "classes or more from 0 on"
            )
        if not parts and y.min() > 0:
            raise DataError(f"labels y_train in {path} begin with {y.min()}: number the classes from 0 on")
        if y.min() < 0 or y.max() >= num_classes:
            raise DataError(
                f"labels y_{part} in {path} go from {y.min()} to {y.max()}, but must lie in [0, {num_classes}), "
                "the classes of y_train: correct them"
            )
        parts += [_chw(x), torch.from_numpy(y.reshape(-1).astype(np.int64))]
    return tuple(parts), tuple(map(str, range(num_classes)))


def _chw(images: NDArray[np.uint8]) -> UInt8[Tensor, "n c h w"]:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
