"""Exporting what a run saved: its last model and its best one are two files."""

from typing import Any

from exported_networks import METADATA

from gaternet.checkpoint import save_model
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
