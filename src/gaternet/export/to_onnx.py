"""Writing a model as an ONNX file that is equal to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaternet.export.exported import METADATA
from gaternet.export.parity import ExportError, Parity
from gaternet.export.source import Form, Source
from gaternet.files import write_atomically
from gaternet.sessions import NotRunnableError, run_session, start_session

OPSET = 18
LARGEST = 2**31 - 2**20  # bytes of weights: an ONNX file is one message of Protocol Buffers, which 2 GiB limit


def export_onnx(
    model: nn.Module,
    example_input: Tensor,
    path: str | Path,
    *,
    gates: bool = False,
    form: Form = "masked",
    dynamic_size: bool = False,
    metadata: Mapping[str, Any] | None = None,
    held_out: Tensor | None = None,
) -> Parity:
    """Write a model as one ONNX graph, opset 18, gater and backbone together, and compare it with the model.

    The file is run in ONNX Runtime on `held_out`, and under gates drawn at random in place of the gater's. Gates must
    be equal, unless a logit is so near the threshold that rounding decides. Logits, and gates that are not 0 or 1, must
    agree within 1e-4, relative to the largest where that is above 1.

    Args:
        model: a GaterNet, or a plain network. It is exported in evaluation mode, in float32, and left as it was.
        example_input: images (B, channels, H, W), float, as the model takes them; or pixels, uint8, which the graph
            then normalises itself as `metadata` says.
        path: of the file. It appears once it has been found equal, and replaces one of that name.
        gates: whether the graph gives out the gates (B, C) beside the logits (B, K).
        form: "masked" computes all filters, for any number of images at once; "skipping" computes the open ones, for
            one image at a time: faster where most are closed, slower where most are open.
        dynamic_size: whether the graph takes images of any height and width, as far as the network does.
        metadata: plain data to keep in the file, as `gaternet.checkpoint.load_model` gives it: "classes",
            "preprocessing", "trained". Default: the model's own. `ExportedModel` reads it.
        held_out: images like the example to compare on. Default: 16 made of noise, from flat to busy.

    Raises:
        ExportError: the model cannot be exported so, or the file is not equal to it. None is left behind, and one that
            was there is as it was.
        ValueError: options do not go together, or ONNX is not installed.
        OSError: the file cannot be written.
    """
    source = Source(model, example_input, form=form, dynamic_size=dynamic_size, metadata=metadata)
    if gates and not source.gated:
        raise ValueError(f"a {type(model).__name__} has no gates to give out: leave gates out")
    images = source.held_out(held_out)
    size = sum(tensor.nbytes for tensor in source.model.state_dict().values())
    if size > LARGEST:
        raise ExportError(
            f"the model has {size / 2**30:.1f} GiB of weights, and an ONNX file holds less than 2: export it to .pt2"
        )
    import_onnx()

    def write(temporary: Path) -> Parity:
        temporary.write_bytes(_trace(source, gates))
        try:
            return _compare(source, temporary, images)
        except NotRunnableError as error:
            raise ExportError(f"the exported model is no valid one: nothing was written ({error})") from error

    return write_atomically(Path(path), write)


def _trace(source: Source, gates: bool) -> bytes:
    """The serialized model."""
    with source.tracing():
        program = torch.onnx.export(
            source.network(gates=True),
            (source.batch,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", "gates"] if source.gated else ["logits"],
            dynamic_shapes=source.dynamic_shapes,
        )
        assert program is not None
        proto: Any = program.model_proto
    if source.gated and not gates:  # they stay inside, by this name, for the comparison
        del proto.graph.output[1]
    _forget_origins(proto.graph)
    for function in proto.functions:
        _forget_origins(function)
    import_onnx().helper.set_model_props(proto, {METADATA: json.dumps(source.metadata())})
    return proto.SerializeToString()


def _forget_origins(graph: Any) -> None:
    """Take out where the code of each node lies, and its lines: they are their author's alone."""
    for node in graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                _forget_origins(inner)


def import_onnx() -> Any:
    """The `onnx` package; ValueError where it, or what goes with it, is not installed."""
    try:
        import onnx
        import onnx.utils
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX is not installed: pip install onnx onnxruntime onnxscript") from error
    return onnx


def load_with_gates(path: Path, num_gates: int) -> Any:
    """The ONNX model in a file of ours, made to give its gates out, if it has any."""
    onnx = import_onnx()
    proto = onnx.load(path)
    if num_gates and len(proto.graph.output) == 1:
        info = onnx.helper.make_tensor_value_info("gates", onnx.TensorProto.FLOAT, ["batch", num_gates])
        proto.graph.output.append(info)
    return proto


def _compare(source: Source, path: Path, images: Tensor) -> Parity:
    """Run the file, the same with its gates given out, and what stands behind them."""
    file = start_session(path)
    if not source.gated:
        return source.compare(images, lambda batch: (run_session(file, "logits", images=batch), None), None)
    proto = load_with_gates(path, source.model.num_gates)
    cut = import_onnx().utils.Extractor(proto).extract_model(["images", "gates"], ["logits"])
    whole, behind = (start_session(part.SerializeToString()) for part in (proto, cut))

    def run(batch: Tensor) -> tuple[Tensor, Tensor]:
        parts = batch.split(1 if source.form == "skipping" else len(batch))
        logits = torch.cat([run_session(file, "logits", images=part) for part in parts])
        return logits, torch.cat([run_session(whole, "gates", images=part) for part in parts])

    return source.compare(images, run, lambda batch, gates: run_session(behind, "logits", images=batch, gates=gates))
