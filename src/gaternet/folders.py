"""Data sets that are folders of images: which files are of which class, and which of them are for testing."""

import os
import unicodedata
from pathlib import Path

from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from gaternet.arrays import DataError

TEST_FOLDERS = ("test", "val", "valid", "validation")
_ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif")

Samples = list[tuple[str, int]]  # files, and the numbers of their classes


def read_folder(folder: Path) -> tuple[Samples, Samples, tuple[str, ...]]:
    """Training samples, test samples and the classes' names of train/CLASS/* with test/CLASS/*, or of CLASS/*.

    A test folder without any of the classes is passed over where another, say val, has some.
    Of CLASS/*, every tenth image, and one of each class at least, is for testing.

    Raises:
        DataError: these are no such folders; the message names the mend.
    """
    there = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()]
    classes = _folders(folder / "train")  # ImageNet's test images lie beside its val, without labels
    test_folder = next((part for part in there if classes & _folders(part)), next(iter(there), None))
    if not test_folder and classes:
        raise DataError(
            f"{folder} has classes under train, but no folder named {', '.join(TEST_FOLDERS[:-1])} or "
            f"{TEST_FOLDERS[-1]}: add one, or name {folder / 'train'} to hold a tenth of it out"
        )
    names = {path.name.lower(): path.name for path in folder.iterdir() if path.is_dir()}
    parts = [names[name] for name in ("train", "training", "test", "testing", *TEST_FOLDERS[1:]) if name in names]
    if len(parts) > 1 and not test_folder and parts[0].lower().startswith("train"):
        raise DataError(f"{folder} has parts {' and '.join(parts)}: call them train and test, or name one of them")
    train_samples, classes = _list_images(folder / "train" if test_folder else folder)
    if len(classes) == 1:
        raise DataError(f"{folder} has one class, {classes[0]!r}, and nothing to tell it from: is it the right folder?")
    if test_folder:
        test_samples, test_classes = _list_images(test_folder)
        if unknown := sorted(set(test_classes) - set(classes)):
            raise DataError(
                f"{test_folder} has a class {unknown[0]!r} that the training folder has not: remove or add it"
            )
        test_samples = [(path, classes.index(test_classes[label])) for path, label in test_samples]
    else:
        train_samples, test_samples = _held_out(train_samples)
        if not test_samples:
            raise DataError(f"{folder} has one image a class, too few to hold any out: add a test folder")
    return train_samples, test_samples, classes


def _folders(folder: Path) -> set[str]:
    """The names of the visible folders in it, if there is such a folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in paths if path.is_dir() and not _is_left_behind(path.name)}


def _held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Training samples and test samples: every tenth of all is one of those.

    Where a class would have none of either, it is a tenth of each class, evenly spread, and at least one of two.
    """
    test = samples[9::10]
    train = [sample for i, sample in enumerate(samples) if i % 10 != 9]
    if {label for _, label in train} == {label for _, label in test} == {label for _, label in samples}:
        return train, test
    parts: tuple[Samples, Samples] = [], []
    of_class: dict[int, Samples] = {}
    for sample in samples:
        of_class.setdefault(sample[1], []).append(sample)
    for found in of_class.values():
        count, total = max(len(found) // 10, min(1, len(found) - 1)), len(found)
        for i, sample in enumerate(found):
            parts[(i + 1) * count // total > i * count // total].append(sample)
    return parts


class _Images(datasets.ImageFolder):
    """Without the folders that editors, archives and version control leave behind, which are no classes."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The visible folders."""
        names = [name for name in super().find_classes(directory)[0] if not _is_left_behind(name)]
        if not names:
            raise FileNotFoundError(f"no folder of a class in {directory}")
        return names, {name: number for number, name in enumerate(names)}


def _is_left_behind(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: str) -> bool:
    """By the names of the file and of the folders that it lies in, below the data's own."""
    return path.lower().endswith(_ENDINGS) and not any(map(_is_left_behind, path.split(os.sep)))


def _list_images(folder: Path) -> tuple[Samples, tuple[str, ...]]:
    try:
        found = _Images(folder, is_valid_file=lambda path: _is_image(path.removeprefix(str(folder))))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is no folder of images, one folder a class ({error}): add the missing images"
        ) from error
    real: dict[str, str] = {}
    for directory in dict.fromkeys(os.path.dirname(path) for path, _ in found.samples):
        if (first := real.setdefault(os.path.realpath(directory), directory)) != directory:
            raise DataError(f"{first} and {directory} are one folder, whose images would count twice: remove the link")
    return found.samples, tuple(unicodedata.normalize("NFC", name) for name in found.classes)
