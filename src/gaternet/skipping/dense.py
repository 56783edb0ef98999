"""Dense engines: plain networks made fast by others, to compare with."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gaternet.modes import channels_last_, quiet
from gaternet.sessions import start_session

Dense = Callable[[Tensor], Tensor]
ENGINES = ("eager", "channels_last", "inductor", "onnxruntime", "openvino")


def build_dense(network: nn.Module, example_input: Tensor, name: str) -> Dense:
    """The network in evaluation mode, run by an engine, for images of the example's shape.

    Args:
        network: maps images to logits; it is left as it was.
        example_input: images (B, channels, H, W).
        name: "eager" or "channels_last", PyTorch; "inductor", torch.compile with frozen weights; "onnxruntime" or
            "openvino", on the CPU alone, with as many threads as PyTorch has, in full float32.

    Raises:
        ValueError: what the engine needs is not installed, or the images are not on the CPU and it runs there alone.
    """
    if name in ("onnxruntime", "openvino") and example_input.device.type != "cpu":
        raise ValueError(
            f"{name} runs on the CPU only here: move the network and the images to it, or leave {name} out"
        )
    network = copy.deepcopy(network).eval()
    if name == "eager":
        return network
    if name == "channels_last":
        channels_last_(network)
        return lambda images: network(images.contiguous(memory_format=torch.channels_last))
    if name == "inductor":
        return _inductor(network, example_input)
    if name == "onnxruntime":
        return _onnxruntime(network, example_input)
    return _openvino(network, example_input)


def _inductor(network: nn.Module, example_input: Tensor) -> Dense:
    from torch._inductor import config

    compiled = torch.compile(network, dynamic=False)  # else with open sizes, behind batches of another size
    with torch.no_grad(), config.patch(freezing=True):  # as an option of torch.compile it had no effect
        compiled(example_input)
    return compiled


def _onnx(network: nn.Module, example_input: Tensor, directory: str) -> Path:
    path = Path(directory) / "network.onnx"
    try:
        with quiet():
            torch.onnx.export(network, (example_input,), path, dynamo=True, verbose=False)
    except ImportError as error:
        raise ValueError("ONNX is not installed: pip install onnx onnxscript") from error
    return path


def _onnxruntime(network: nn.Module, example_input: Tensor) -> Dense:
    with tempfile.TemporaryDirectory() as directory:
        session = start_session(_onnx(network, example_input, directory))
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _openvino(network: nn.Module, example_input: Tensor) -> Dense:
    try:
        import openvino
    except ImportError as error:
        raise ValueError("OpenVINO is not installed: pip install openvino") from error
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as directory:
        path = _onnx(network, example_input, directory)
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
    request = compiled.create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0])
