"""ONNX Runtime's sessions, on the CPU, with as many threads as PyTorch has."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaternet.errors import first_line


class NotRunnableError(ValueError):
    """What a file holds is no ONNX model that ONNX Runtime can run."""


def start_session(model: Path | bytes) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, of a file or of a serialized model.

    Raises:
        OSError: there is no such file.
        NotRunnableError: it is no ONNX model, or a broken one.
        ValueError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("ONNX Runtime is not installed: pip install onnxruntime") from error
    if isinstance(model, Path) and not model.is_file():
        raise FileNotFoundError(f"there is no file {model}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised, and need not be printed besides
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has its own, which share no base but this one
        name = "the model" if source is model else model
        raise NotRunnableError(f"ONNX Runtime cannot run {name} ({first_line(error)})") from error


def run_session(session: Any, output: str, **inputs: Tensor) -> Tensor:
    """One output of an ONNX Runtime session, for those of the inputs that it wants."""
    given = {wanted.name: inputs[wanted.name].numpy() for wanted in session.get_inputs()}
    return torch.from_numpy(session.run([output], given)[0])
