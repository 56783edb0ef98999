"""Exporting what a run saved: its last model and its best one are two files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from exported_networks import METADATA
from torch import Tensor

from gaternet.checkpoint import save_model
from gaternet.data import load_data
from gaternet.export import Int8Effect, Parity, saved
from gaternet.export.saved import export_saved
from gaternet.models import create_model


def test_the_best_model_does_not_take_the_place_of_the_last(tmp_path):
    model: Any = create_model("resnet8_gated", 4)
    for name in ("last", "best"):
        save_model(model, tmp_path / name, {**model.metadata, **METADATA})
    assert export_saved(tmp_path, file_format="pt2")["file"] == str(tmp_path / "model.pt2")
    assert export_saved(tmp_path, "best", file_format="pt2")["file"] == str(tmp_path / "model-best.pt2")
    of_itself = export_saved(tmp_path / "best", file_format="pt2")
    assert of_itself["file"] == str(tmp_path / "best" / "model.pt2")


def test_8_bits_are_calibrated_on_training_images_and_measured_on_test_images(tmp_path, monkeypatch):
    data = load_data("digits")
    model: Any = create_model("resnet8_gated", 10, 1)
    save_model(model, tmp_path / "last", {**model.metadata, **data.metadata(), "trained": {"data": "digits"}})
    seen = {}

    def quantize(_exact: Path, _out: Path, calibration: list[Tensor], gater: bool) -> None:
        seen["calibration"] = torch.cat(calibration)

    def compare(_exact: Path, _out: Path, batches: Iterable[tuple[Tensor, Tensor]]) -> Int8Effect:
        seen["test"] = torch.cat([images for images, _ in batches])
        return Int8Effect(0, 0.0, 0.0, 0.0, 0, 0.0)

    monkeypatch.setattr(saved, "export_onnx", lambda *_, **__: Parity(0, 0, 0, 0, 0.0))
    monkeypatch.setattr(saved, "quantize_onnx", quantize)
    monkeypatch.setattr(saved, "compare_int8", compare)
    export_saved(tmp_path, int8="backbone", images=100)
    found = {name: {tuple(image.flatten().tolist()) for image in images} for name, images in seen.items()}
    whole = [images.take(range(len(images))).flatten(1).tolist() for images in (data.train, data.test)]
    train, test = (set(map(tuple, images)) for images in whole)
    assert len(seen["calibration"]) == 512
    assert found["calibration"] <= train - test
    assert len(seen["test"]) == 100
    assert found["test"] <= test
