"""Trained models as files that run without this package, each compared with its model before it is kept."""

from gaternet.export.exported import ExportedModel
from gaternet.export.int8 import Int8Effect, compare_int8, quantize_onnx
from gaternet.export.parity import ExportError, Parity
from gaternet.export.to_onnx import export_onnx
from gaternet.export.to_pt2 import export_pt2

__all__ = [
    "ExportError",
    "ExportedModel",
    "Int8Effect",
    "Parity",
    "compare_int8",
    "export_onnx",
    "export_pt2",
    "quantize_onnx",
]
