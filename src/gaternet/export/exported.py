"""Running an exported ONNX file: no model, no PyTorch code of its own, its preprocessing beside its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaternet.errors import first_line
from gaternet.sessions import start_session

METADATA = "gaternet"  # the key of ours in an ONNX file's metadata


class ExportedModel:
    """An ONNX file that `export_onnx` wrote, run by ONNX Runtime on the CPU with as many threads as PyTorch has.

    Args:
        path: of the file.

    Attributes:
        metadata: what was exported with it: classes, preprocessing, sites and so on, as plain data; see `export_onnx`.

    Raises:
        OSError: there is no such file.
        ValueError: it is something else, or ONNX Runtime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        session = start_session(self.path)
        self.metadata = _read_metadata(session, path)
        self._session = session

    def __repr__(self) -> str:
        return f"ExportedModel({str(self.path)!r})"

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, channels, H, W); `run` also gives the gates."""
        return self.run(images)[0]

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K), and the gates (B, C) if the file gives them out, else None; both on the CPU.

        Args:
            images: (B, channels, H, W) of the size it was exported for; pixels, uint8, where `takes_pixels`, else
                float32, normalised.

        Raises:
            ValueError: they are of another size or kind.
        """
        wanted = self._session.get_inputs()[0]
        dtype = torch.uint8 if self.takes_pixels else torch.float32
        sizes = [size if isinstance(size, int) else None for size in wanted.shape]  # None where any will do
        fits = images.ndim == len(sizes) and all(
            size in (None, given) for size, given in zip(sizes, images.shape, strict=True)
        )
        if not fits or images.dtype != dtype:
            names = ("B", "channels", "H", "W")
            shape = ", ".join(name if size is None else str(size) for name, size in zip(names, sizes, strict=True))
            raise ValueError(
                f"{self.path.name} takes images ({shape}) of {dtype}, but these are {tuple(images.shape)} of "
                f"{images.dtype}: resize them, or export the model for theirs"
            )
        outputs = self._session.run(None, {wanted.name: images.detach().cpu().numpy()})
        return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1]) if len(outputs) > 1 else None

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes pixels, uint8, and normalises them itself."""
        return self.metadata["input"] == "pixels"

    @property
    def takes_one(self) -> bool:
        """Whether it takes one image at a time: the skipping form."""
        return self.metadata["form"] == "skipping"


def _read_metadata(session: Any, path: str | Path) -> dict[str, Any]:
    """What `export_onnx` put into the file; ValueError if that is not what is there."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise ValueError(f"{path} was not exported by gaternet: make one with gaternet export")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has damaged metadata ({first_line(error)}): export it again") from error
    takes, gives = session.get_inputs(), session.get_outputs()
    if len(takes) != 1 or len(takes[0].shape) != 4 or any(len(value.shape) != 2 for value in gives):
        raise ValueError(f"{path} does not map images to logits and gates: export it again")
    if not isinstance(metadata, dict) or not _is_ours(metadata, "uint8" in takes[0].type, takes[0].shape[2:]):
        raise ValueError(f"{path} has metadata that gaternet does not write: export it again")
    if "classes" in metadata and len(metadata["classes"]) != gives[0].shape[1]:
        raise ValueError(f"{path} does not name as many classes as it has logits: export it again")
    return metadata


def _is_ours(metadata: dict[str, Any], pixels: bool, size: list[int | str]) -> bool:
    """Whether metadata are as `export_onnx` writes them, for a file that takes such images."""
    classes, made = metadata.get("classes", []), metadata.get("preprocessing")
    made = made if isinstance(made, dict) else {}  # what is wrong with it is said where it is needed
    fixed = pixels and all(isinstance(side, int) for side in size)
    return (
        metadata.get("form") in ("masked", "skipping")
        and metadata.get("input") == ("pixels" if pixels else "images")
        and isinstance(metadata.get("num_gates"), int)
        and isinstance(classes, list)
        and all(isinstance(name, str | int) for name in classes)
        and all(made.get(name) in (None, side) for name, side in zip(("height", "width"), size, strict=False) if fixed)
    )
