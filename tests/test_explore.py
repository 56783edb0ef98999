"""The local page: what it knows, what it refuses, and the page itself in a browser."""

import gc
import socket
import struct
import tomllib
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analyzed_model import IMAGES, LABELS, MODEL, PIXELS
from packaging.requirements import Requirement
from PIL import Image

import gaternet.explore
from gaternet.checkpoint import save_model
from gaternet.data import DataError, ImageSet, load_data
from gaternet.explore import Explorer, build_app, explore
from gaternet.models import create_model

NAMES = ["![ape](http://example.org)", "<b>bee</b>", "*cat*", "_dog_", "`eel`", "[fox](x)", "a\\\\*gnu &amp;"]


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    shown = ImageSet(IMAGES[:10], LABELS[:10].tolist())
    return Explorer(MODEL, PIXELS, NAMES, shown, IMAGES, LABELS.tolist())


@torch.no_grad()
def test_answers_are_the_models(explorer):
    pixels = IMAGES[4].numpy()
    logits, gates = MODEL(PIXELS.normalize(IMAGES[4:5]), return_gates=True)
    own = explorer.gates(pixels)
    assert np.array_equal(own, gates[0].bool().numpy())
    answer = explorer.answer(pixels, own)
    assert np.allclose(answer.probabilities, logits[0].softmax(0).numpy(), atol=1e-6)
    every = np.ones_like(own)
    assert explorer.answer(pixels, every).macs == explorer.cost.dense > answer.macs
    assert not np.allclose(explorer.answer(pixels, every).probabilities, answer.probabilities)


def test_classes_of_one_name_are_kept_apart():
    shown = ImageSet(IMAGES[:10], LABELS[:10].tolist())
    explorer = Explorer(MODEL, PIXELS, ["crane", "crane", *NAMES[2:]], shown, IMAGES[:1], LABELS[:1].tolist())
    assert explorer.classes == ["crane", "crane (2)", *NAMES[2:]]


def test_nearest_images_are_those_whose_gates_differ_least(explorer):
    with torch.no_grad():
        gates = MODEL.gates(PIXELS.normalize(IMAGES)).bool().numpy()
    places, differ = explorer.nearest(gates[7], 5)
    assert places[0] == 7
    assert differ[0] == 0
    assert differ.tolist() == sorted((gates != gates[7]).sum(1).tolist())[:5]
    assert np.array_equal((gates[places] != gates[7]).sum(1), differ)


def test_images_that_are_not_square_keep_their_shape(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 16, 3), np.uint8), np.arange(20) % 4
    np.savez(tmp_path / "wide.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    source = str(tmp_path / "wide.npz")
    model: Any = create_model("resnet8_gated", 4)
    about = {**model.metadata, **load_data(source).metadata(), "trained": {"data": source}}
    save_model(model, tmp_path / "model", about)
    explorer = Explorer.of_run(tmp_path / "model")
    assert {image.tobytes() for image in explorer.known.numpy()} == {image.transpose(2, 0, 1).tobytes() for image in x}
    assert explorer.at_random().shape == (3, 8, 16)


def test_pictures_are_large_and_coloured(explorer):
    assert explorer.picture(IMAGES[0].numpy()).shape == (192, 192, 3)
    assert explorer.picture(IMAGES[0, :1].numpy()).shape == (192, 192, 3)
    grid = explorer.layers(explorer.gates(IMAGES[0].numpy())).data[0]
    assert np.asarray(grid.z).shape == (9, 64)
    assert np.isnan(np.asarray(grid.z)[0, 16:]).all()


def test_images_are_fitted_and_others_refused(explorer, tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.new("RGB", (40, 30), (255, 0, 0)).save(good)
    assert explorer.open(good).shape == (3, 16, 16)
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(DataError, match="no image that can be read: choose a JPEG"):
        explorer.open(tmp_path / "text.png")
    noise = tmp_path / "noise.png"
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).save(noise)
    (tmp_path / "cut.png").write_bytes(noise.read_bytes()[:-200])
    with pytest.raises(DataError, match="this image is damaged, or of more than 16 bits: choose another"):
        explorer.open(tmp_path / "cut.png")
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", size), (b"IDAT", b""))
    ]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(DataError, match="far too many pixels: choose one of at most 40,000,000"):
        explorer.open(tmp_path / "bomb.png")
    monkeypatch.setattr(gaternet.explore, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="40 x 30 pixels: choose one of at most 1,000"):
        explorer.open(good)
    monkeypatch.setattr(gaternet.explore, "MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"bytes: choose one of at most \d"):
        explorer.open(good)


def parts_of_page(explorer: Explorer, title: str) -> tuple[list[Any], str]:
    """What each control does that needs an image, on a page that has none yet; and the heading."""
    app = build_app(explorer, title)
    asked = [function for function in app.fns.values() if function.inputs[0].get_block_name() == "state"]
    headings = [block.value for block in app.blocks.values() if block.get_block_name() == "markdown"]
    inputs = [None, explorer.network.sites[0].conv, []]
    return [partial(function.fn, *inputs[: len(function.inputs)]) for function in asked], headings[0]


@pytest.mark.filterwarnings("ignore")  # of Gradio's own parts
def test_before_the_first_image_controls_do_nothing(explorer):
    import gradio

    controls, _ = parts_of_page(explorer, "none")
    assert [control() for control in controls] == [gradio.skip()] * 5  # another layer, and four buttons
    gc.collect()  # Gradio leaves sockets and event loops open


@pytest.mark.filterwarnings("ignore")  # of Gradio's own parts
def test_a_title_is_shown_as_it_is(explorer):
    _, heading = parts_of_page(explorer, "_*1*_![i](http://example.org)")
    assert heading == r"# \_\*1\*\_\!\[i\]\(http\:\/\/example\.org\)"
    gc.collect()  # Gradio leaves sockets and event loops open


@pytest.mark.filterwarnings("ignore")  # of Gradio's own parts
def test_the_page(explorer, browser: Any, tmp_path: Path):
    app = explore(explorer, "Gates of a test", block=False)
    try:
        assert app.local_url.startswith("http://127.0.0.1:")
        page = browser.new_context().new_page()
        strangers: list[str] = []
        ours = (app.local_url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(ours) else strangers.append(request.url))
        page.goto(app.local_url)
        page.wait_for_selector("text=the gater's choice", timeout=60_000)
        assert page.locator("#near img").count() == 12
        page.click("text=Close the layer")
        said = page.wait_for_selector("text=flipped by hand. Under the gater's gates: ").inner_text()
        shown = said.split("gates: ")[1].rsplit(" ", 2)[0]  # the last class without its percentage
        assert any(shown.endswith(name) for name in NAMES)
        page.click("text=As the gater says")
        page.wait_for_selector("text=the gater's choice")
        (tmp_path / "bad.png").write_text("this is no image")
        page.set_input_files("input[type=file]", tmp_path / "bad.png")
        page.wait_for_selector("text=this file is no image that can be read")
        Image.fromarray(IMAGES[3].permute(1, 2, 0).numpy()).save(tmp_path / "good.png")
        page.click("[aria-label='Clear']")
        page.set_input_files("input[type=file]", tmp_path / "good.png")
        opened = int(explorer.gates(IMAGES[3].numpy()).sum())
        page.wait_for_selector(f"text={opened} of 336 gates open")
        assert not strangers
    finally:
        app.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_addresses_that_cannot_be_served_are_refused(explorer):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot serve at 127.0.0.1:{port} \(.*in use\): name another"):
            explore(explorer, "none", port=port)
    with pytest.raises(OSError, match=r"cannot serve at 256\.1\.1\.1 "):
        explore(explorer, "none", "256.1.1.1")
    gc.collect()  # Gradio leaves sockets and event loops open where it cannot serve


@pytest.mark.parametrize("extra", ["explore", "dev"])
def test_no_gradio_is_taken_that_the_page_cannot_use(extra):
    """Images' `buttons`, and a theme and footer given to `launch`, came with Gradio 6."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = {one.name: one for one in map(Requirement, project["optional-dependencies"][extra])}["gradio"]
    assert [version for version in ("5.50.0", "6.0.0") if wanted.specifier.contains(version)] == ["6.0.0"]


def test_gradio_is_an_extra(explorer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"Gradio is not installed: pip install gradio"):
        explore(explorer, "none")
