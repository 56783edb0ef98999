"""A local web page on which to try a gated model: drop an image, see its gates, flip them by hand.

`Explorer` is what it knows, `build_app` shows it with Gradio (the extra `explore`).
"""

import os
import random
import re
import socket
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray

from gaternet.cost import CostModel
from gaternet.data import DataError, ImageSet, Preprocessing, read_image
from gaternet.method import GaterNet
from gaternet.report.figures import distinct_names, figure, plotly_names
from gaternet.trained import Trained, Which

MAX_BYTES, MAX_PIXELS = 10 * 2**20, 40_000_000  # of an image that is uploaded
_BATCH = 250
_BUTTONS = ["zoom", "pan", "zoomin", "zoomout", "autoscale", "resetscale", "toimage"]  # Plotly's, over gates on phones

Pixels = UInt8[NDArray[np.uint8], "chans h w"]
Gates = Bool[NDArray[np.bool_], " gates"]


@dataclass(frozen=True)
class Answer:
    """What the model says of an image under some gates.

    Attributes:
        probabilities: of each class, (K,), in [0, 1].
        macs: of the backbone.
    """

    probabilities: Float[NDArray[np.float32], " classes"]
    macs: int


class Explorer:
    """A gated model, and images to compare others with.

    Args:
        network: on the CPU; it is put into evaluation mode.
        preprocessing: of its images.
        classes: their names.
        shown: images to show at random.
        known: images among which the nearest by gate pattern are looked for, (M, channels, height, width).
        labels: classes of these, (M,).
    """

    def __init__(
        self,
        network: GaterNet,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        shown: ImageSet,
        known: UInt8[torch.Tensor, "m chans h w"],
        labels: Sequence[int],
    ) -> None:
        self.network, self.preprocessing, self.classes = network.eval(), preprocessing, distinct_names(classes)
        self.shown, self.known, self.labels = shown, known, list(labels)
        self.cost = CostModel.of(network, preprocessing.normalize(known[:1]))
        parts = [preprocessing.normalize(part) for part in known.split(_BATCH)]
        with torch.no_grad():
            self._gates = torch.cat([network.gates(part) > 0.5 for part in parts]).numpy()  # (M, C)

    @classmethod
    def of_run(
        cls,
        run: Path,
        which: Which = "last",
        data: str | None = None,
        data_root: str | None = None,
        images: int = 2000,
    ) -> "Explorer":
        """Of a run or a saved model, with the first `images` of its training images in random order.

        Raises:
            ValueError: there is no such gated model, or its data cannot be had.
        """
        model = Trained.open_gated(run, which, data)
        train, test = model.load_sets(data_root)
        order = random.Random(0).sample(range(len(train)), min(images, len(train)))
        known, labels = train.take(order), train.labels[order].tolist()
        return cls(model.network, model.preprocessing, model.classes, test, known, labels)

    def open(self, path: str | Path) -> Pixels:
        """An image file as the model sees it; DataError if it is no image, or too large."""
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise DataError(f"this file has {size:,} bytes: choose one of at most {MAX_BYTES:,}")
        from PIL import Image

        try:
            with Image.open(path) as image:  # reads the header alone
                width, height = image.size
        except Image.DecompressionBombError as error:  # Pillow's own limit is higher than ours
            raise DataError(f"this image has far too many pixels: choose one of at most {MAX_PIXELS:,}") from error
        except Exception as error:
            raise DataError("this file is no image that can be read: choose a JPEG, PNG or the like") from error
        if width * height > MAX_PIXELS:
            raise DataError(f"this image has {width} x {height} pixels: choose one of at most {MAX_PIXELS:,}")
        try:
            pixels = read_image(path, self.preprocessing.channels)
        except Exception as error:
            raise DataError("this image is damaged, or of more than 16 bits: choose another") from error
        return self.preprocessing.fit(pixels).numpy()

    def at_random(self) -> Pixels:
        """One of the images to show."""
        pixels, _ = self.shown[random.randrange(len(self.shown))]
        return self.preprocessing.fit(torch.as_tensor(pixels)).numpy()

    @torch.no_grad()
    def gates(self, pixels: Pixels) -> Gates:
        """What the gater opens."""
        return (self.network.gates(self._inputs(pixels))[0] > 0.5).numpy()

    @torch.no_grad()
    def answer(self, pixels: Pixels, gates: Gates) -> Answer:
        """What the backbone says under given gates."""
        chosen = torch.from_numpy(gates).float()[None]
        logits = self.network.forward_gated(self._inputs(pixels), chosen)
        return Answer(logits[0].softmax(0).numpy(), round(self.cost(chosen).item()))

    def nearest(
        self, gates: Gates, number: int = 12
    ) -> tuple[Int[NDArray[np.int64], " n"], Int[NDArray[np.int64], " n"]]:
        """Places among the known images whose gates differ least, nearest first, and in how many gates they do."""
        differ = (self._gates != gates).sum(1)
        places = np.argsort(differ, kind="stable")[:number]
        return places, differ[places]

    def picture(self, pixels: Pixels) -> UInt8[NDArray[np.uint8], "rows columns 3"]:
        """Pixels for the eye, of at least 192 on the shorter side."""
        image = np.repeat(pixels.transpose(1, 2, 0), 3 // len(pixels), 2)
        times = max(1, -(-192 // min(image.shape[:2])))
        return image.repeat(times, 0).repeat(times, 1)

    def layers(self, gates: Gates) -> go.Figure:
        """The gates of each layer, open ones marked."""
        sites = self.network.sites
        width = max(site.stop - site.start for site in sites)
        grid = np.full((len(sites), width), np.nan)
        for row, site in enumerate(sites):
            grid[row, : site.stop - site.start] = gates[site.start : site.stop]
        starts = np.array([[site.start] for site in sites]) + np.arange(width)
        heat = go.Heatmap(
            z=grid,
            y=plotly_names(site.conv for site in sites),
            customdata=starts,
            colorscale=[[0, "#B8B8B8"], [1, "#0072B2"]],
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=1 if width <= 128 else 0,
            ygap=1,
            hovertemplate="%{y}, gate %{customdata}: %{z} (1 is open)<extra></extra>",
        )
        drawn = figure([heat], "gate of the layer", height=max(260, min(900, 90 + 14 * len(sites))))
        drawn.update_xaxes(showgrid=False)
        drawn.update_yaxes(autorange="reversed", type="category", showgrid=False)
        # The page is light or dark, which is not known here. Dragging is off so that a finger scrolls the page.
        drawn.update_layout(font_color="#808080", dragmode=False, modebar_remove=_BUTTONS)
        return drawn

    def _inputs(self, pixels: Pixels) -> torch.Tensor:
        return self.preprocessing.normalize(torch.from_numpy(np.ascontiguousarray(pixels))[None])


def build_app(explorer: Explorer, title: str) -> Any:
    """The page, a `gradio.Blocks`; ValueError if Gradio is not installed."""
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("Gradio is not installed: pip install gradio") from error
    sites = explorer.network.sites
    names = [site.conv for site in sites]

    def choices(gates: Gates, layer: str) -> list[tuple[str, int]]:
        site = sites[names.index(layer)]
        return [(f"{gate} {'open' if gates[gate] else 'closed'}", gate) for gate in range(site.start, site.stop)]

    def show(state: dict[str, Any] | None, layer: str) -> Any:
        if state is None:  # the first image is still to come
            return gr.skip()
        pixels, gates, own = state["pixels"], state["gates"], state["own"]
        answer = explorer.answer(pixels, gates)
        said = f"**{gates.sum():,} of {len(gates):,} gates open**, {answer.macs / 1e6:,.1f} of "
        said += f"{explorer.cost.dense / 1e6:,.1f} million multiply-accumulates; "
        if flipped := int((gates != own).sum()):
            before = explorer.answer(pixels, own).probabilities
            shown = dict.fromkeys([before.argmax(), answer.probabilities.argmax()])  # both where they differ
            said += f"{flipped} flipped by hand. Under the gater's gates: "
            said += ", ".join(f"{_markdown(explorer.classes[best])} {100 * before[best]:.1f} %" for best in shown)
        else:
            said += "the gater's choice"
        places, differ = explorer.nearest(gates)
        near = [
            (
                explorer.picture(explorer.known[place].numpy()),
                f"{explorer.classes[explorer.labels[place]]}: {count}",
            )
            for place, count in zip(places.tolist(), differ.tolist(), strict=True)
        ]
        likely = dict(zip(explorer.classes, answer.probabilities.tolist(), strict=True))
        picker = gr.Dropdown(choices=choices(gates, layer), value=[], multiselect=True)
        return state, explorer.picture(pixels), likely, said, explorer.layers(gates), near, picker

    def start(pixels: Pixels, layer: str) -> Any:
        own = explorer.gates(pixels)
        return show({"pixels": pixels, "own": own, "gates": own}, layer)

    def upload(path: str | None, layer: str) -> Any:
        if path is None:
            raise gr.Error("choose an image file first")
        return show_one(lambda: explorer.open(path), layer)

    def show_one(opened: Callable[[], Pixels], layer: str) -> Any:
        try:
            return start(opened(), layer)
        except DataError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def force(state: dict[str, Any] | None, layer: str, chosen: list[int], what: str) -> Any:
        if state is None:
            return gr.skip()
        gates, site = state["gates"].copy(), sites[names.index(layer)]
        if what == "flip":
            gates[chosen] = ~gates[chosen]
        elif what == "reset":
            gates = state["own"]
        else:
            gates[site.start : site.stop] = what == "open"
        return show({**state, "gates": gates}, layer)

    # Pictures of an hour ago, uploaded ones above all, are deleted; the rest when the page is closed.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"# {_markdown(title)}")
        state = gr.State()
        with gr.Row():
            with gr.Column(scale=1):
                file = gr.File(
                    label=f"An image file, at most {MAX_BYTES // 2**20} MiB", file_types=["image"], height=150
                )
                another = gr.Button("Another test image")
                picture = gr.Image(label="What the model sees", interactive=False, height=260, buttons=[])
            with gr.Column(scale=2):
                prediction = gr.Label(label="Prediction", num_top_classes=5)
                summary = gr.Markdown()
        gr.Markdown("## Gates, layer by layer: blue ones are open")
        layers = gr.Plot(show_label=False)
        gr.Markdown("## Flip gates by hand")
        with gr.Row():
            layer = gr.Dropdown(names, value=names[-1], label="Layer")
            picker = gr.Dropdown([], multiselect=True, label="Gates")
        with gr.Row():
            buttons = {
                what: gr.Button(text)
                for what, text in (
                    ("flip", "Flip these gates"),
                    ("close", "Close the layer"),
                    ("open", "Open the layer"),
                    ("reset", "As the gater says"),
                )
            }
        gr.Markdown("## Training images with the most similar gates\nTheir class, and how many of their gates differ.")
        near = gr.Gallery(show_label=False, columns=6, height="auto", buttons=[], elem_id="near")
        outputs = [state, picture, prediction, summary, layers, near, picker]
        file.upload(upload, [file, layer], outputs)
        another.click(partial(show_one, explorer.at_random), [layer], outputs)
        app.load(partial(show_one, explorer.at_random), [layer], outputs)
        layer.change(show, [state, layer], outputs)
        for what, button in buttons.items():
            button.click(partial(force, what=what), [state, layer, picker], outputs)
    return app


def _markdown(name: str) -> str:
    """A name as Markdown that shows just that, and loads no image that it names."""
    return re.sub(f"[{re.escape(string.punctuation)}]", r"\\\g<0>", name)


def explore(
    explorer: Explorer, title: str, host: str = "127.0.0.1", port: int | None = None, block: bool = True
) -> Any:
    """Serve the page until Ctrl-C; by default for this machine alone.

    Raises:
        ValueError: Gradio is not installed.
        OSError: the port is taken, or the host is not this machine's.
    """
    app = build_app(explorer, title)
    _check_address(host, port)
    from gradio.themes import Default

    theme = Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    app.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        theme=theme,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
    )
    if block:
        print(f"open {app.local_url} in a browser; Ctrl-C ends it", flush=True)
        app.block_thread()
    return app


def _check_address(host: str, port: int | None) -> None:
    """OSError where nothing can be served: Gradio would try a hundred ports, for minutes, and name the wrong cause."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            # Or a port that was just closed would count as taken
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise OSError(f"cannot serve at {where} ({error.strerror}): name another --host or --port") from error
