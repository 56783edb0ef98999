"""Small data sets in files, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_npz(path: Path, **changes: np.ndarray | None) -> str:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (20, 6, 8, 3), np.uint8),
        "y_train": np.arange(20)[:, None] % 4,  # (N, 1), as Keras has CIFAR's
        "x_test": generator.integers(0, 256, (5, 6, 8, 3), np.uint8),
        "y_test": np.arange(5) % 4,
    }
    kept: dict[str, Any] = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **kept)
    return str(path)


def write_folder(root: Path, *parts: str, per_class: int = 3, size: tuple[int, int] = (20, 12)) -> str:
    generator = np.random.default_rng(0)
    for part in parts or (".",):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 256, (*size[::-1], 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return str(root)
