"""GaterNet: a network that looks at an image first and decides which filters of a CNN run (CVPR 2019)."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gaternet.analysis import analyze
    from gaternet.checkpoint import load_pretrained
    from gaternet.cost import count_macs
    from gaternet.export import ExportedModel, export_onnx, export_pt2, quantize_onnx
    from gaternet.findings import GateAnalysis
    from gaternet.gating import gate
    from gaternet.method import Gater, GaterNet, GateSite, gate_sparsity, improved_semhash
    from gaternet.models import create_model, model_names
    from gaternet.official import load_official_checkpoint
    from gaternet.sites import find_sites
    from gaternet.skipping import Skipper, skip

__version__ = "0.1.0"

# Public name -> its module, imported on first use: PyTorch takes seconds, `gaternet --help` must not.
_HOMES = {
    "ExportedModel": "gaternet.export",
    "GateAnalysis": "gaternet.findings",
    "Gater": "gaternet.method",
    "GateSite": "gaternet.method",
    "GaterNet": "gaternet.method",
    "Skipper": "gaternet.skipping",
    "analyze": "gaternet.analysis",
    "count_macs": "gaternet.cost",
    "create_model": "gaternet.models",
    "export_onnx": "gaternet.export",
    "export_pt2": "gaternet.export",
    "find_sites": "gaternet.sites",
    "gate": "gaternet.gating",
    "gate_sparsity": "gaternet.method",
    "improved_semhash": "gaternet.method",
    "load_official_checkpoint": "gaternet.official",
    "load_pretrained": "gaternet.checkpoint",
    "model_names": "gaternet.models",
    "quantize_onnx": "gaternet.export",
    "skip": "gaternet.skipping",
}

__all__ = [
    "ExportedModel",
    "GateAnalysis",
    "GateSite",
    "Gater",
    "GaterNet",
    "Skipper",
    "analyze",
    "count_macs",
    "create_model",
    "export_onnx",
    "export_pt2",
    "find_sites",
    "gate",
    "gate_sparsity",
    "improved_semhash",
    "load_official_checkpoint",
    "load_pretrained",
    "model_names",
    "quantize_onnx",
    "skip",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_") and find_spec(f"gaternet.{name}") is not None:
        return import_module(f"gaternet.{name}")  # so that `gaternet.train.train` needs no import of its own
    raise AttributeError(f"module 'gaternet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
