"""Writing a model as a program of `torch.export` that is equal to it."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from gaternet.export.exported import METADATA
from gaternet.export.parity import FAULT, ExportError, Parity
from gaternet.export.source import Source
from gaternet.files import write_atomically


def export_pt2(
    model: nn.Module,
    example_input: Tensor,
    path: str | Path,
    *,
    gates: bool = False,
    dynamic_size: bool = False,
    metadata: Mapping[str, Any] | None = None,
    held_out: Tensor | None = None,
) -> Parity:
    """Write a model as a `torch.export` program (.pt2), read it back, and compare it with the model.

    `torch.export.load` reads it, and AOTInductor compiles it. As with any .pt2 file, to load it is to trust its author:
    it may hold pickled objects. What an ONNX file has as metadata is in its extra file "gaternet.json".

    Arguments and errors are those of `export_onnx`, but for `form`, and so is the comparison.
    """
    source = Source(model, example_input, dynamic_size=dynamic_size, metadata=metadata)
    if gates and not source.gated:
        raise ValueError(f"a {type(model).__name__} has no gates to give out: leave gates out")
    images = source.held_out(held_out)

    def write(temporary: Path) -> Parity:
        buffer = io.BytesIO()
        with source.tracing():
            network, shapes = source.network(gates), source.dynamic_shapes
            program = torch.export.export(network, (source.batch,), dynamic_shapes=shapes, strict=False)
            _forget_origins(program.graph_module)
            torch.export.save(program, buffer, extra_files={f"{METADATA}.json": json.dumps(source.metadata())})
        temporary.write_bytes(buffer.getvalue())
        return _compare(source, temporary, images)

    return write_atomically(Path(path), write)


def _forget_origins(program: nn.Module) -> None:
    """Take out where the code of each node lies, and its lines: they are their author's alone."""
    for module in program.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else []:
            node.meta.pop("stack_trace", None)


def _compare(source: Source, path: Path, images: Tensor) -> Parity:
    """Run the file as it is, and with given gates in the place of what its gater gives out."""
    with source.tracing():
        module: Any = torch.export.load(io.BytesIO(path.read_bytes())).module()
    if not source.gated:
        return source.compare(images, lambda batch: (module(batch), None), None)
    exit_ = next((node for node in module.graph.nodes if _leaves_gater(node)), None)
    if exit_ is None:  # gates that are a constant of the program
        raise ExportError(f"the exported program's backbone takes nothing from its gater: {FAULT}")

    def run(batch: Tensor) -> tuple[Tensor, Tensor]:
        watched = _Watched(module, exit_)
        watched.run(batch)
        assert watched.gates is not None
        return _logits(module(batch)), watched.gates

    return source.compare(images, run, lambda batch, gates: _logits(_Watched(module, exit_, gates).run(batch)))


def _leaves_gater(node: Node) -> bool:
    return _in_gater(node) and any(not _in_gater(user) for user in node.users)


def _in_gater(node: Node) -> bool:
    return any(path == "model.gater" for path, _ in node.meta.get("nn_module_stack", {}).values())


def _logits(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


class _Watched(Interpreter):
    """Runs a graph, and keeps or replaces the gates on the way."""

    def __init__(self, module: Any, node: Node, gates: Tensor | None = None) -> None:
        super().__init__(module)
        self._node, self._replace, self.gates = node, gates is not None, gates

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n is not self._node:
            return value
        if not self._replace:
            self.gates = value
        return self.gates
