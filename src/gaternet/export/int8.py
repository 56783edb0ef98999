"""Exported files with 8-bit weights and activations, and what that does to the gates and to the accuracy."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaternet.data import images_of
from gaternet.export.exported import METADATA, ExportedModel
from gaternet.export.parity import FAULT, ExportError, differing
from gaternet.export.to_onnx import import_onnx, load_with_gates
from gaternet.files import write_atomically
from gaternet.modes import quiet
from gaternet.sessions import run_session, start_session


@dataclass(frozen=True)
class Int8Effect:
    """What quantisation changed, on test images.

    Attributes:
        images: how many.
        accuracy, int8_accuracy: of the file in float32 and in 8 bits, in [0, 1].
        same_class: share of the images that both put in one class.
        gates: gates of one image; 0 for a plain network.
        flips: gates an image that differ, on average.
    """

    images: int
    accuracy: float
    int8_accuracy: float
    same_class: float
    gates: int
    flips: float


def quantize_onnx(
    path: str | Path, out: str | Path, calibration: Iterable[Tensor | Sequence[Any]], *, gater: bool = False
) -> ExportedModel:
    """Write an exported file anew with 8-bit weights (per channel) and activations, for ONNX Runtime.

    Args:
        path: a file of `export_onnx`, in the masked form.
        out: of the new file. It appears once it is whole, and replaces one of that name.
        calibration: batches of images, as the file takes them, or of (images, labels); the images' activations give
            the ranges: some hundred images.
        gater: whether to quantise the gater, too. Left in float32, its gates are what they were.

    Raises:
        ExportError: the new file does not run, or the gates changed although the gater was left as it is.
        ValueError: the file is of the skipping form or of 8 bits already, or there are no images or such as it does
            not take, or ONNX Runtime is not installed.
        OSError: a file cannot be read or written.
    """
    source = ExportedModel(path)
    if source.metadata["form"] != "masked":
        raise ValueError(f"{path} is of the skipping form, whose weights are not constant: export the masked form")
    if "int8" in source.metadata:
        raise ValueError(f"{path} is of 8 bits already: quantise the file that it was made from")
    onnx = import_onnx()
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    batches = [images for batch in calibration if len(images := images_of(batch).detach().cpu())]
    if not batches:
        raise ValueError("there are no images to calibrate with: pass some batches of them")
    for images in batches:
        source.run(images)  # says what is wrong with them

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[Tensor] = iter(batches)

        def get_next(self) -> Any:
            batch = next(self._left, None)
            return None if batch is None else {"images": batch.numpy()}

    def write(temporary: Path) -> None:
        prepared = temporary.with_suffix(".prepared")
        try:
            with quiet():
                shape_inference.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
                proto = onnx.load(prepared)
                exact = [] if gater else _gater_nodes(proto)
                _separate(proto, exact)
                prepared.write_bytes(proto.SerializeToString())
                quantization.quantize_static(
                    str(prepared),
                    str(temporary),
                    Reader(),
                    per_channel=True,
                    weight_type=quantization.QuantType.QInt8,
                    activation_type=quantization.QuantType.QUInt8,
                    nodes_to_exclude=exact,
                )
        finally:
            prepared.unlink(missing_ok=True)
        proto = onnx.load(temporary)
        _unround(proto, exact)
        kept = source.metadata | {"int8": "all" if gater or not source.metadata["num_gates"] else "backbone"}
        onnx.helper.set_model_props(proto, {METADATA: json.dumps(kept)})
        domains = {node.domain for node in proto.graph.node}
        for unused in [opset for opset in proto.opset_import if opset.domain not in domains]:
            proto.opset_import.remove(unused)  # the quantiser names all that ONNX Runtime has
        temporary.write_bytes(proto.SerializeToString())
        _check(temporary, Path(path), batches[0], 0 if gater else source.metadata["num_gates"])

    write_atomically(Path(out), write)
    return ExportedModel(out)


def _check(path: Path, original: Path, images: Tensor, exact: int) -> None:
    """Run a new file before it is kept; its gates, if there are `exact` ones, must be the original's."""
    try:
        new, old = (start_session(load_with_gates(file, exact).SerializeToString()) for file in (path, original))
        run_session(new, "logits", images=images)
    except Exception as error:  # ONNX Runtime's share no base but this one
        raise ExportError(f"the model does not run in 8 bits: nothing was written ({error})") from error
    if not exact:
        return
    gates = [run_session(session, "gates", images=images) for session in (new, old)]
    if flips := int(differing(gates[0], gates[1]).sum()):
        raise ExportError(f"{flips} gates are not what they were before quantisation: {FAULT}")


def compare_int8(path: str | Path, int8_path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> Int8Effect:
    """Run a file and its 8-bit twin on test images, as the files take them, with their labels.

    Raises:
        ValueError: there are no images.
    """
    gated = ExportedModel(path).metadata["num_gates"]
    files = [load_with_gates(Path(file), gated) for file in (path, int8_path)]
    sessions = [start_session(file.SerializeToString()) for file in files]
    images, right, same, flips = 0, torch.zeros(2), 0, 0
    for batch, labels in batches:
        found = [run_session(session, "logits", images=batch).argmax(1) for session in sessions]
        images += len(batch)
        right += torch.stack([(classes == labels).sum() for classes in found])
        same += int((found[0] == found[1]).sum())
        if gated:
            gates = [run_session(session, "gates", images=batch) for session in sessions]
            flips += int(differing(gates[0], gates[1]).sum())
    if not images:
        raise ValueError("there are no test images: pass some batches of them with their labels")
    accuracy, int8_accuracy = (right / images).tolist()
    return Int8Effect(images, accuracy, int8_accuracy, same / images, gated, flips / images)


def _gater_nodes(proto: Any) -> list[str]:
    """Names of the nodes that the gates come from."""
    maker = {output: node for node in proto.graph.node for output in node.output}
    names, waiting = set(), ["gates"]
    while waiting:
        node = maker.pop(waiting.pop(), None)
        if node is not None:
            names.add(node.name)
            waiting += node.input
    return sorted(names)


def _separate(proto: Any, names: list[str]) -> None:
    """Give the nodes of these names their own copies of constants that other nodes read, too.

    Else the quantiser would turn such a constant into 8 bits for all that read it.
    """
    shared = {name for node in proto.graph.node if node.name not in names for name in node.input}
    constants = {constant.name: constant for constant in proto.graph.initializer if constant.name in shared}
    copied = set()
    for node in proto.graph.node:
        for i, name in enumerate(node.input if node.name in names else []):
            if name in constants:
                node.input[i] = f"{name}.exact"
                copied.add(name)
    for name in sorted(copied):
        proto.graph.initializer.add().CopyFrom(constants[name])
        proto.graph.initializer[-1].name = f"{name}.exact"


def _unround(proto: Any, names: list[str]) -> None:
    """Let the nodes of these names read tensors in float32 again.

    Where the quantiser rounds a tensor to 8 bits for one node, it lets every node that reads it read the rounded one.
    """
    maker = {output: node for node in proto.graph.node for output in node.output}
    for node in proto.graph.node:
        if node.name in names:
            for i, name in enumerate(node.input):
                rounded = maker.get(name)
                if rounded is not None and rounded.op_type == "DequantizeLinear":
                    node.input[i] = maker[rounded.input[0]].input[0]
