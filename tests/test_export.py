"""Exported files equal their models, or there is no file."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from exported_networks import METADATA, PIXELS, Features, concatenated, depthwise, gated, residual
from small_networks import IMAGES, Block, Net, conv
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gaternet.data import ImageSet, Preprocessing
from gaternet.export import ExportedModel, ExportError, compare_int8, export_onnx, export_pt2, quantize_onnx
from gaternet.export.parity import compare
from gaternet.export.saved import _spread
from gaternet.export.source import Source


@pytest.mark.parametrize("make", [residual, depthwise, concatenated])
@pytest.mark.parametrize("form", ["masked", "skipping"])
def test_an_onnx_file_equals_its_model(tmp_path, make, form):
    model = gated(make())
    parity = export_onnx(model, IMAGES, tmp_path / "model.onnx", gates=True, form=form)
    assert parity.patterns > 4
    assert parity.forced == 7
    assert parity.max_error < 1e-5
    exported = ExportedModel(tmp_path / "model.onnx")
    images = torch.randn(5, 3, 8, 8)
    parts = images.split(1 if form == "skipping" else 5)
    assert exported.takes_one == (form == "skipping")
    logits, gates = (torch.cat(found) for found in zip(*(exported.run(part) for part in parts), strict=True))  # pyright: ignore
    with torch.no_grad():
        wanted = model(images, return_gates=True)
    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(gates, wanted[1])
    assert exported.metadata["num_gates"] == model.num_gates
    assert exported.metadata["sites"] == [dataclasses.asdict(site) for site in model.sites]


@pytest.mark.parametrize("export", [export_onnx, export_pt2])
def test_a_file_computes_in_full_precision_where_it_is_written_under_autocast(tmp_path, export):
    model, images = gated(residual()), torch.randn(5, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        export(model, IMAGES, tmp_path / "model")
    if export is export_pt2:
        logits = torch.export.load(tmp_path / "model").module()(images)
    else:
        logits, _ = ExportedModel(tmp_path / "model").run(images)
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)


def test_the_skipping_form_computes_open_filters_only(tmp_path):
    """Broken on purpose: weights of a closed filter that are not numbers reach no logit, those of an open one do."""
    model = gated(residual())
    export_onnx(model, IMAGES, tmp_path / "model.onnx", form="skipping", gates=True)
    image = torch.randn(1, 3, 8, 8)
    _, gates = ExportedModel(tmp_path / "model.onnx").run(image)
    assert gates is not None
    site = next(site for site in model.sites if site.conv == "conv1")
    own = gates[0, site.start : site.stop]
    assert 0 < own.sum() < len(own)
    for chosen, finite in ((own == 0, True), (own == 1, False)):
        poisoned = gated(residual())
        with torch.no_grad():
            poisoned.backbone.get_submodule("conv1").weight[chosen] = torch.nan  # pyright: ignore
        source = Source(poisoned, image, form="skipping")
        with source.tracing():
            logits = source.network(gates=False)(image)
        assert bool(logits.isfinite().all()) == finite
        with torch.no_grad():  # the masked form lets both through: it computes closed filters, too
            assert not poisoned.forward_gated(image, gates).isfinite().any()


def test_a_program_of_torch_export_equals_its_model(tmp_path):
    model = gated(residual())
    for gates in (False, True):
        parity = export_pt2(model, IMAGES, tmp_path / "model.pt2", gates=gates, metadata=METADATA)
        assert parity.patterns > 4
        extra = {"gaternet.json": ""}
        program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
        assert json.loads(extra["gaternet.json"])["classes"] == METADATA["classes"]
        images = torch.randn(5, 3, 8, 8)
        outputs = program.module()(images)
        wanted = model(images, return_gates=gates)
        torch.testing.assert_close(outputs, wanted)


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_the_graph_normalises_pixels_as_the_model_wants_them(tmp_path, write):
    model = gated(residual())
    path = tmp_path / "model"
    write(model, PIXELS, path, metadata=METADATA, gates=True)
    inputs = Preprocessing.from_metadata(METADATA).normalize(PIXELS)
    with torch.no_grad():
        wanted = model(inputs, return_gates=True)
    found = ExportedModel(path).run(PIXELS) if write is export_onnx else torch.export.load(path).module()(PIXELS)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], wanted[1])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_images_of_any_size(tmp_path, write):
    model, path = gated(residual()), tmp_path / "model"
    write(model, IMAGES, path, dynamic_size=True)
    images = torch.randn(3, 3, 14, 11)
    found = ExportedModel(path)(images) if write is export_onnx else torch.export.load(path).module()(images)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)


def test_a_plain_network(tmp_path):
    network = residual().eval()
    parity = export_onnx(network, IMAGES, tmp_path / "plain.onnx")
    assert parity.patterns == 0
    assert "gate" not in str(parity)
    with torch.no_grad():
        torch.testing.assert_close(
            ExportedModel(tmp_path / "plain.onnx")(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4
        )
    assert export_pt2(network, IMAGES, tmp_path / "plain.pt2").images == 16
    for write in (export_onnx, export_pt2):
        with pytest.raises(ValueError, match="has no gates to give out"):
            write(network, IMAGES, tmp_path / "other", gates=True)
    with pytest.raises(ValueError, match="the skipping form is for a GaterNet"):
        export_onnx(network, IMAGES, tmp_path / "other", form="skipping")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.onnx", "plain.pt2"]


def test_without_gates_only_logits_leave_the_file(tmp_path):
    export_onnx(gated(residual()), IMAGES, tmp_path / "model.onnx")
    logits, gates = ExportedModel(tmp_path / "model.onnx").run(IMAGES)
    assert logits.shape == (2, 4)
    assert gates is None


class Frozen(nn.Module):
    """What a careless exporter makes of a model: its gates are those of one image."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.model = source.model
        self.first = source.model.gates(source.example)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.first + 0 * images[:, :1, 0, 0]
        return self.model.forward_gated(images, gates), gates


class Ungated(nn.Module):
    """Another careless exporter's: gates come out, but the backbone does not hear of them."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.model = source.model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.model.gates(images)
        return self.model.backbone(images) + 0 * gates.sum(), gates


@pytest.mark.parametrize(
    ("careless", "complaint"), [(Frozen, "gates differ"), (Ungated, "logits of the images differ")]
)
@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_a_file_that_is_not_equal_is_not_left_behind(tmp_path, monkeypatch, write, careless, complaint):
    path = tmp_path / "model"
    path.write_text("an older export")
    monkeypatch.setattr(Source, "network", lambda source, gates: careless(source).eval())
    monkeypatch.setattr("gaternet.export.to_pt2._leaves_gater", lambda node: node.name.startswith(("to", "add")))
    with pytest.raises(ExportError, match=complaint):
        write(gated(residual()), IMAGES, path, gates=True)
    assert path.read_text() == "an older export"
    assert list(tmp_path.iterdir()) == [path]


def test_dropped_gates_are_found_even_where_all_are_open(tmp_path, monkeypatch):
    """On such a model, images alone cannot tell: gates that are drawn do."""
    model = gated(residual())
    nn.init.constant_(model.gater.get_submodule("fc2").bias, 1e3)  # pyright: ignore[reportArgumentType]
    assert export_onnx(model, IMAGES, tmp_path / "model.onnx").patterns == 1
    monkeypatch.setattr(Source, "network", lambda source, gates: Ungated(source).eval())
    with pytest.raises(ExportError, match="under gates drawn with density 0 differ"):
        export_onnx(model, IMAGES, tmp_path / "other.onnx", gates=True)
    assert not (tmp_path / "other.onnx").exists()


def test_a_file_that_takes_no_other_number_of_images_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "dynamic_shapes", None)
    for write in (export_onnx, export_pt2):
        with pytest.raises(ExportError, match=r"does not run on images \(16, 3, 8, 8\)"):
            write(gated(residual()), IMAGES, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_not_valid_is_not_left_behind(tmp_path, monkeypatch):
    class Twice(Frozen):
        """Its gates have the name of a constant."""

        def __init__(self, source: Source) -> None:
            super().__init__(source)
            self.gates = self.first.clone()

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            gates = self.gates + 0 * images[:, :1, 0, 0]
            return self.model.forward_gated(images, gates), gates

    monkeypatch.setattr(Source, "network", lambda source, gates: Twice(source).eval())
    with pytest.raises(ExportError, match="the exported model is no valid one"):
        export_onnx(gated(residual()), IMAGES, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_gates_that_rounding_decides_may_differ_and_are_counted():
    model = gated(residual())
    model.gater.get_parameter("fc2.weight").data[3] = 0
    model.gater.get_parameter("fc2.bias").data[3] = 1e-7

    def run(images: Tensor, column: int = 3) -> tuple[Tensor, Tensor]:
        gates = model.gates(images).clone()
        gates[:, column] = 1 - gates[:, column]
        return model.forward_gated(images, gates), gates

    images = torch.randn(4, 3, 8, 8)
    parity = compare(model, lambda images: images, images, run, model.forward_gated)
    assert parity.borderline == 4
    with pytest.raises(ExportError, match=r"gates differ from the model's, 4 of"):
        compare(model, lambda images: images, images, lambda images: run(images, 4), model.forward_gated)
    nothing = torch.full((4, 4), torch.nan)
    with pytest.raises(ExportError, match="differ from the model's by nan"):
        compare(model, lambda images: images, images, lambda i: (nothing, model.gates(i)), model.forward_gated)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(gated(residual()), PIXELS, path, metadata=METADATA)
    return path


def images_and_labels(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return list(zip(pixels.split(50), torch.randint(0, 4, (count,), generator=generator).split(50), strict=True))


@pytest.mark.parametrize("gater", [False, True])
def test_eight_bits_with_the_gates_kept_or_counted(tmp_path, exported, gater):
    batches = images_and_labels(200)
    small = quantize_onnx(exported, tmp_path / "int8.onnx", [batch for batch, _ in batches], gater=gater)
    assert small.metadata["int8"] == ("all" if gater else "backbone")
    assert small.metadata["classes"] == METADATA["classes"]
    effect = compare_int8(exported, small.path, batches)
    pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found, wanted = small(pixels).argmax(1), ExportedModel(exported)(pixels).argmax(1)
    assert effect.images == 200
    assert effect.int8_accuracy == pytest.approx(float((found == labels).float().mean()))
    assert effect.accuracy == pytest.approx(float((wanted == labels).float().mean()))
    assert effect.same_class == pytest.approx(float((found == wanted).float().mean()))
    assert effect.same_class > 0.8
    assert effect.gates == gated(residual()).num_gates
    assert (effect.flips > 0) == gater
    assert (small(pixels) - ExportedModel(exported)(pixels)).abs().max() > 1e-4  # it is something else, indeed


def test_eight_bits_refuse_what_they_cannot_do(tmp_path, exported):
    skipping = tmp_path / "skipping.onnx"
    export_onnx(gated(residual()), PIXELS, skipping, metadata=METADATA, form="skipping")
    with pytest.raises(ValueError, match="of the skipping form"):
        quantize_onnx(skipping, tmp_path / "int8.onnx", [PIXELS])
    with pytest.raises(ValueError, match="no images to calibrate with"):
        quantize_onnx(exported, tmp_path / "int8.onnx", [])
    for batches in ([PIXELS[:, :, :4]], [PIXELS, PIXELS[:, :, :4]]):
        with pytest.raises(ValueError, match=r"takes images \(B, 3, 8, 8\)"):
            quantize_onnx(exported, tmp_path / "int8.onnx", batches)
    with pytest.raises(ValueError, match=r"must be tensors of images, .* but hold str: wrap the loader"):
        quantize_onnx(exported, tmp_path / "int8.onnx", ["images"])
    with pytest.raises(ValueError, match="no test images"):
        compare_int8(exported, exported, [])
    assert not (tmp_path / "int8.onnx").exists()
    quantize_onnx(exported, tmp_path / "int8.onnx", [PIXELS])
    with pytest.raises(ValueError, match=r"int8\.onnx is of 8 bits already: quantise the file that it was made from"):
        quantize_onnx(tmp_path / "int8.onnx", tmp_path / "other.onnx", [PIXELS])


def test_eight_bits_take_the_batches_of_a_loader(tmp_path, exported):
    loader = DataLoader(TensorDataset(PIXELS, torch.zeros(6)), 4)
    quantize_onnx(exported, tmp_path / "int8.onnx", PIXELS.split(4))
    labelled = quantize_onnx(exported, tmp_path / "labelled.onnx", loader)
    assert torch.equal(labelled(PIXELS), ExportedModel(tmp_path / "int8.onnx")(PIXELS))
    export_onnx(residual(), IMAGES, tmp_path / "plain.onnx")
    learnt = IMAGES.clone().requires_grad_()
    assert quantize_onnx(tmp_path / "plain.onnx", tmp_path / "int8.onnx", [learnt]).metadata["int8"] == "all"


def test_a_gater_may_share_weights_with_what_is_quantised(tmp_path):
    """Exporters keep one of two constants that are alike; here they are applied to unlike images."""
    network = Net(lambda net, x: net.last(net.first(x + 1).relu()), first=conv(3, 6), last=conv(6, 8))
    model = gated(network)
    extractor = next(module for module in model.gater.modules() if isinstance(module, Features))
    extractor.conv.load_state_dict(network.first.state_dict())
    export_onnx(model, PIXELS, tmp_path / "model.onnx", metadata=METADATA)
    small = quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [PIXELS])
    assert compare_int8(tmp_path / "model.onnx", small.path, [(PIXELS, torch.zeros(6))]).flips == 0


def test_blocks_are_left_as_they_were():
    """An export copies the model: mode, device, precision and gradients stay."""
    model = gated(residual()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = Source(model, IMAGES)
    with source.tracing():
        source.network(gates=True)(IMAGES)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.backbone, Block)


def test_images_to_compare_on_are_taken_from_all_of_a_set():
    """A folder's are sorted by class: the first ones would be of one class."""
    images = ImageSet(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), range(10))
    assert _spread(images, 4) == [0, 2, 5, 7]
    assert _spread(images, 7) == [0, 1, 2, 4, 5, 7, 8]
    assert _spread(images, 100) == list(range(10))
