"""What cannot be exported, written or run is refused in one sentence, and no file is left behind."""

import json
import sys
from typing import Any

import pytest
import torch
from exported_networks import METADATA, PIXELS, gated, residual
from small_networks import IMAGES, Block, Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

import gaternet
from gaternet.export import ExportedModel, ExportError, export_onnx, export_pt2, quantize_onnx
from gaternet.export.exported import METADATA as KEY
from gaternet.export.source import Source
from gaternet.export.to_onnx import import_onnx
from gaternet.predict import load
from gaternet.sessions import start_session


def test_what_cannot_be_exported_is_named_in_a_sentence(tmp_path):
    def body(net: Net, x: Tensor) -> Tensor:
        x = net.conv0(x)
        return x.relu() if float(x.mean()) > 0 else x  # a decision that a graph cannot hold

    network = Net(body, conv0=conv(3, 8)).eval()
    for write in (export_onnx, export_pt2):
        with pytest.raises(ExportError, match=r"Net cannot be exported with images \(1, 3, 8, 8\) \(.+\): mend what"):
            write(network, IMAGES, tmp_path / "model")
    with pytest.raises(ValueError, match=r"example_input must be images \(B, channels, H, W\), but is \(3, 8, 8\)"):
        export_onnx(network, IMAGES[0], tmp_path / "model")
    with pytest.raises(ValueError, match="pixels need metadata"):
        export_onnx(network, PIXELS, tmp_path / "model")
    with pytest.raises(ValueError, match="held_out must be images like the example"):
        export_onnx(residual(), IMAGES, tmp_path / "model", held_out=PIXELS)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*model\.onnx"):
        export_onnx(residual(), IMAGES, tmp_path / "file" / "model.onnx")


def test_a_model_that_is_too_large_for_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr("gaternet.export.to_onnx.LARGEST", 1000)
    with pytest.raises(ExportError, match=r"GiB of weights, and an ONNX file holds less than 2: export it to \.pt2"):
        export_onnx(residual(), IMAGES, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the exporter that torch 2.11 has
def test_files_and_images_that_do_not_fit(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ExportedModel(path)
    path.write_text("no such thing")
    with pytest.raises(ValueError, match="ONNX Runtime cannot run"):
        ExportedModel(path)
    export_onnx(residual(), IMAGES, path)
    with pytest.raises(ValueError, match=r"takes images \(B, 3, 8, 8\) of torch.float32, but these are \(2, 3, 9, 9\)"):
        ExportedModel(path)(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match=r"but these are \(6, 3, 8, 8\) of torch.uint8"):
        ExportedModel(path)(PIXELS)
    torch.onnx.export(residual().eval(), (IMAGES,), path, dynamo=True, verbose=False)
    with pytest.raises(ValueError, match="was not exported by gaternet"):
        ExportedModel(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="ONNX Runtime is not installed"):
        start_session(path)
    with pytest.raises(ValueError, match="ONNX is not installed"):
        export_onnx(residual(), IMAGES, path)


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_a_path_that_cannot_be_written_is_found_before_anything_is_traced(tmp_path, monkeypatch, write):
    def trace(source: Source, gates: bool) -> nn.Module:
        raise AssertionError("traced")

    monkeypatch.setattr(Source, "network", trace)
    with pytest.raises(IsADirectoryError, match="it is a folder, name a file"):
        write(residual(), IMAGES, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        write(residual(), IMAGES, tmp_path / "file" / "model")


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_ctrl_c_leaves_what_was_there(tmp_path, monkeypatch, write):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "model"
    path.write_text("an older export")
    monkeypatch.setattr(Source, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(residual(), IMAGES, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "an older export"


def test_a_gater_net_within_another_module_is_not_taken_for_a_plain_network(tmp_path):
    """Its gates would be compared with nothing."""
    outer = nn.Sequential(nn.Identity(), gated(residual()))
    for write in (export_onnx, export_pt2):
        with pytest.raises(ValueError, match="the GaterNet is 1 in a Sequential: export that module itself"):
            write(outer, IMAGES, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_program_whose_gates_became_constants(tmp_path, monkeypatch):
    class Constant(nn.Module):
        def __init__(self, source: Source) -> None:
            super().__init__()
            self.model, self.gates = source.model, source.model.gates(source.example)

        def forward(self, images: Tensor) -> Tensor:
            return self.model.forward_gated(images, self.gates + 0 * images[:, :1, 0, 0])

    monkeypatch.setattr(Source, "network", lambda source, gates: Constant(source).eval())
    with pytest.raises(ExportError, match="backbone takes nothing from its gater: nothing was written"):
        export_pt2(gated(residual()), IMAGES, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: F.adaptive_avg_pool2d(x, 2),  # the exporter makes it a pooling of the size that it saw
        lambda x: x[:, :, 1:] if x.shape[2] % 2 else x,
        lambda x: F.avg_pool2d(x, 2) if x.shape[2] > 10 else x,
        lambda x: F.avg_pool2d(x, 2) if x.shape[2] < 6 else x,
    ],
)
def test_a_network_that_is_exported_wrongly_for_other_sizes(tmp_path, capfd, decide):
    network = Block(
        lambda net, x: net.fc(net.conv1(decide(net.conv0(x))).relu().mean((2, 3))),
        conv0=conv(3, 4),
        conv1=conv(4, 8),
        fc=nn.Linear(8, 4),
    ).eval()
    with pytest.raises(ExportError, match="leave dynamic_size out"):
        export_onnx(network, IMAGES, tmp_path / "model.onnx", dynamic_size=True)
    assert not list(tmp_path.iterdir())
    assert not capfd.readouterr().err


def test_arguments_that_do_not_go_together(tmp_path, unchecked_types):
    model, path = gated(residual()), tmp_path / "model"
    other = METADATA | {"preprocessing": METADATA["preprocessing"] | {"height": 9}}
    grey = METADATA | {"preprocessing": METADATA["preprocessing"] | {"mean": [0.5], "std": [0.2]}}
    cases: list[tuple[str, Tensor, dict[str, Any]]] = [
        (r"makes images \(3, 9, 8\), but the example's are \(3, 8, 8\)", PIXELS, {"metadata": other}),
        (r"makes images \(1, 8, 8\), but the example's are \(3, 8, 8\)", PIXELS, {"metadata": grey}),
        (r"makes images \(1, 8, 8\)", PIXELS, {"metadata": grey, "dynamic_size": True}),
        ("does not say how images become its input", PIXELS, {"metadata": {"preprocessing": {"height": 8}}}),
        ("it gives 4 logits, but the metadata names 2 classes", IMAGES, {"metadata": {"classes": ["a", "b"]}}),
        ("must be float, or pixels, uint8, but is torch.int64", IMAGES.long(), {}),
        ("there is no form 'sparse': choose masked or skipping", IMAGES, {"form": "sparse"}),
    ]
    for message, images, options in cases:
        with pytest.raises(ValueError, match=message):
            export_onnx(model, images, path, **options)
    with pytest.raises(TypeError, match="metadata must be plain data that JSON can hold"):
        export_onnx(model, IMAGES, path, metadata={"classes": {"a"}})
    with torch.no_grad():
        model.backbone.get_submodule("conv0").weight.fill_(torch.nan)  # pyright: ignore
    with pytest.raises(ValueError, match="the model's own logits of the images are not all finite"):
        export_pt2(model, IMAGES, path)
    for output in ({}, (IMAGES, IMAGES), IMAGES):

        class Other(nn.Module):
            def forward(self, images: Tensor, output: object = output) -> object:
                return output

        with pytest.raises(ExportError, match=r"it gives a \w+ that is not logits \(B, K\)"):
            export_onnx(Other(), IMAGES, path)
    assert not list(tmp_path.iterdir())


def test_held_out_images_of_another_precision(tmp_path):
    assert export_pt2(residual().double(), IMAGES.double(), tmp_path / "model", held_out=IMAGES.double()).images == 2


def test_a_network_for_images_of_one_size_is_compared_at_no_other():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    source = Source(network, IMAGES, dynamic_size=True)
    with pytest.raises(ExportError, match=r"no other size than \(8, 8\): leave dynamic_size out"):
        source.compare(IMAGES, lambda images: (network(images), None), None)


def test_an_operation_that_onnx_lacks_is_named(tmp_path):
    def body(net: Net, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(net.conv0(x))

    with pytest.raises(ExportError, match=r"No ONNX function found for .*bessel_j0"):
        export_onnx(Net(body, conv0=conv(3, 8)).eval(), IMAGES, tmp_path / "model")


def test_metadata_that_somebody_changed(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(gated(residual()), PIXELS, path, metadata=METADATA)
    onnx = import_onnx()
    proto, good = onnx.load(path), ExportedModel(path).metadata
    for message, text in {
        "has damaged metadata": "{",
        "damaged metadata": "[" * 99999,
        "has metadata that gaternet does not write": "[1]",
        "metadata that gaternet does not write": json.dumps(good | {"classes": 3}),
        "that gaternet does not write": json.dumps(good | {"classes": {"0": "a", "1": "b", "2": "c", "3": "d"}}),
        "gaternet does not write": json.dumps(good | {"input": "images"}),
        "does not write": json.dumps(good | {"preprocessing": good["preprocessing"] | {"height": 10**9}}),
        "does not name as many classes": json.dumps(good | {"classes": ["a"]}),
        "does not say how images become its input": json.dumps(good | {"preprocessing": 5}),
        "exported without its classes": json.dumps({k: v for k, v in good.items() if k != "classes"}),
    }.items():
        onnx.helper.set_model_props(proto, {KEY: text})
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match=message):
            load(path)


def test_a_model_that_was_saved_without_its_preprocessing_predicts_nothing(tmp_path):
    gaternet.create_model("resnet8_gated", 3).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="does not name its classes"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "none.onnx")


def test_eight_bits_that_change_the_gates_are_not_left_behind(tmp_path, monkeypatch):
    export_onnx(gated(residual()), PIXELS, tmp_path / "model.onnx", metadata=METADATA)
    monkeypatch.setattr("gaternet.export.int8._gater_nodes", lambda proto: [])
    pixels = torch.randint(0, 256, (200, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    with pytest.raises(ExportError, match="gates are not what they were before quantisation"):
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [pixels])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_compiled_model_is_exported_as_what_was_compiled(tmp_path):
    compiled: Any = torch.compile(gated(residual()), backend="eager")
    assert export_onnx(compiled, IMAGES, tmp_path / "model.onnx").images


def test_a_hook_that_undoes_what_gates_closed_is_no_fault_of_the_exporter(tmp_path):
    def lift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 1

    model = gated(residual())
    model.backbone.get_submodule(model.sites[0].name).register_forward_hook(lift)
    with pytest.raises(ExportError, match=r"a hook on .* acts behind its gates.*: mend what that names"):
        export_onnx(model, IMAGES, tmp_path / "model.onnx", form="skipping")
