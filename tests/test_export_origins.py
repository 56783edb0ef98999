"""Exported files say nothing of the machine and the code that made them."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from exported_networks import METADATA, PIXELS, gated, residual
from small_networks import IMAGES, conv
from torch import Tensor, nn

import gaternet
from gaternet.export import ExportedModel, export_onnx, export_pt2

ROOT = Path(gaternet.__file__).parents[2]
TRAINED = {"data": "/home/me/data/cifar10.npz", "seed": 0}


class Branching(nn.Module):
    """With graphs inside its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = conv(3, 4), conv(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        def bright(x: Tensor) -> Tensor:
            return self.bright(x).relu().mean((2, 3))

        def dark(x: Tensor) -> Tensor:
            return self.dark(x).sigmoid().mean((2, 3))

        return torch.cond(images.mean() > 0, bright, dark, (images,))


def content(path: Path) -> bytes:
    """All that a file holds, unpacked."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(map(archive.read, archive.namelist()))


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_no_file_holds_paths_or_lines_of_code(tmp_path, write):
    write(gated(residual()), PIXELS, tmp_path / "gated", metadata=METADATA | {"trained": TRAINED})
    write(Branching().eval(), IMAGES, tmp_path / "branching")
    if write is export_onnx:
        write(gated(residual()), IMAGES, tmp_path / "skipping", form="skipping")
    for path in tmp_path.iterdir():
        for told in (str(ROOT), Path(__file__).name, "exported_networks.py", "/home/me", "self.bright(x)", "return "):
            assert told.encode() not in content(path), (path.name, told)


def test_of_data_only_the_name_is_told(tmp_path):
    for trained, kept in ((TRAINED, {"data": "cifar10", "seed": 0}), ({"seed": 1}, {"seed": 1}), ("once", "once")):
        export_onnx(residual(), IMAGES, tmp_path / "model.onnx", metadata={"trained": trained})
        assert ExportedModel(tmp_path / "model.onnx").metadata["trained"] == kept
    extra = {"gaternet.json": ""}
    export_pt2(residual(), IMAGES, tmp_path / "model.pt2", metadata={"trained": TRAINED})
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["gaternet.json"])["trained"] == {"data": "cifar10", "seed": 0}


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_no_file_holds_the_image_that_it_was_made_with(tmp_path, write):
    """Which may be a photograph of somebody."""
    for images in (IMAGES, PIXELS):
        write(gated(residual()), images, tmp_path / "model", metadata=METADATA)
        assert images[0].numpy().tobytes() not in content(tmp_path / "model")
