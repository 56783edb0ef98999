"""Gates that are not 0 or 1 leave in a file, too; rounding may change their last digits, and no more."""

import pytest
import torch
from exported_networks import METADATA, PIXELS, SoftGater, gated, residual
from small_networks import IMAGES
from torch import Tensor

from gaternet.export import ExportedModel, ExportError, compare_int8, export_onnx, export_pt2, quantize_onnx
from gaternet.export.parity import compare
from gaternet.method import GaterNet


@pytest.fixture
def soft() -> GaterNet:
    model = gated(residual())
    model.gater = SoftGater(model.num_gates).eval()
    return model


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_soft_gates_are_exported(tmp_path, soft, write):
    assert write(soft, IMAGES, tmp_path / "model", gates=True).patterns == 16
    if write is export_onnx:
        gates = ExportedModel(tmp_path / "model").run(IMAGES)[1]
        torch.testing.assert_close(gates, soft.gates(IMAGES).detach(), rtol=0, atol=1e-4)


def test_soft_gates_that_differ_by_more_than_rounding_are_found(soft):
    def run(images: Tensor, by: float) -> tuple[Tensor, Tensor]:
        gates = soft.gates(images)
        gates = torch.where(torch.arange(soft.num_gates) == 3, gates + by, gates)
        return soft.forward_gated(images, gates), gates

    assert compare(soft, lambda images: images, IMAGES, lambda i: run(i, 1e-6), soft.forward_gated).images == 2
    for by in (1e-3, torch.nan):
        with pytest.raises(ExportError, match="the exported gates differ from the model's, 2 of 48"):
            compare(soft, lambda images: images, IMAGES, lambda i, by=by: run(i, by), soft.forward_gated)


def test_soft_gates_leave_nothing_to_skip(tmp_path, soft):
    with pytest.raises(ExportError, match=r"its gates are not all 0 or 1, .*: .*export the masked form"):
        export_onnx(soft, IMAGES, tmp_path / "model", form="skipping")
    assert not list(tmp_path.iterdir())


def test_soft_gates_in_eight_bits(tmp_path, soft):
    export_onnx(soft, PIXELS, tmp_path / "model.onnx", metadata=METADATA)
    small = quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [PIXELS])
    assert compare_int8(tmp_path / "model.onnx", small.path, [(PIXELS, torch.zeros(6))]).flips == 0
