"""What is exported: a model with its preprocessing, as exporters trace it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from gaternet import __version__
from gaternet.checkpoint import without_paths
from gaternet.data import Preprocessing
from gaternet.errors import first_line
from gaternet.export.gathered import OpenFilters
from gaternet.export.parity import FAULT, ExportError, Parity, Run, RunGated, compare, make_images
from gaternet.method import GaterNet
from gaternet.modes import full_copy, quiet, without_autocast
from gaternet.wrapping import uncompiled

Form = Literal["masked", "skipping"]
_HELD_OUT = 16
_OF_OTHER_SIZES = 4


class Source:
    """A copy of a model on the CPU in evaluation mode and float32, and what is known of its images.

    The arguments, and the errors that they raise, are those of `export_onnx`.

    Attributes:
        gated: whether it is a GaterNet.
        example: one image (1, channels, H, W) as the file is to take it.
        preprocessing: how the file normalises pixels; None where it takes images as the model does.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        form: Form = "masked",
        dynamic_size: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        model = uncompiled(model)
        self.gated = isinstance(model, GaterNet)
        if form not in get_args(Form):
            raise ValueError(f"there is no form {form!r}: choose {' or '.join(get_args(Form))}")
        inside = [name or "it" for name, module in model.named_modules() if isinstance(module, GaterNet)]
        if inside and not self.gated:  # as a plain network, its gates would be compared with nothing
            raise ValueError(f"the GaterNet is {inside[0]} in a {type(model).__name__}: export that module itself")
        if form == "skipping" and (dynamic_size or not self.gated):
            raise ValueError("the skipping form is for a GaterNet and images of one size: export the masked form")
        if example_input.ndim != 4 or not len(example_input):
            raise ValueError(f"example_input must be images (B, channels, H, W), but is {tuple(example_input.shape)}")
        if not (example_input.is_floating_point() or example_input.dtype == torch.uint8):
            raise ValueError(f"example_input must be float, or pixels, uint8, but is {example_input.dtype}: convert it")
        self.form, self.dynamic_size = form, dynamic_size
        self.model: Any = full_copy(model).cpu().float().eval().requires_grad_(False)
        self.example = example_input[:1].detach().cpu()
        own: Any = getattr(model, "metadata", None)
        self._metadata = _plain(metadata if metadata is not None else own or {})
        self.preprocessing = None
        if self.example.dtype != torch.uint8:
            self.example = self.example.float()
        elif "preprocessing" not in self._metadata:
            raise ValueError("pixels need metadata with their preprocessing: pass it, or images that are normalised")
        else:
            made = self.preprocessing = Preprocessing.from_metadata(self._metadata)
            wanted = (made.channels, *((made.height, made.width) if not dynamic_size else self.example.shape[2:]))
            if self.example.shape[1:] != wanted:
                raise ValueError(
                    f"the preprocessing makes images {wanted}, but the example's are {tuple(self.example.shape[1:])}: "
                    "pass an example of that size, or the metadata of those images"
                )

    def network(self, gates: bool) -> nn.Module:
        """What is traced: from images to logits, and to the gates with `gates`.

        Raises:
            ValueError: it gives something else, or not as many logits as there are classes.
        """
        model, preprocessing = self.model, self.preprocessing
        logits = model(self.inputs(self.example))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(f"it gives a {type(logits).__name__} that is not logits (B, K)")
        if len(self._metadata.get("classes", logits[0])) != logits.shape[1]:
            classes = len(self._metadata["classes"])
            raise ValueError(f"it gives {logits.shape[1]} logits, but the metadata names {classes} classes")
        backbone = None
        if self.form == "skipping":
            own = model.gates(self.inputs(self.example))
            if not ((own == 0) | (own == 1)).all():
                raise ValueError("its gates are not all 0 or 1, as the skipping form needs them")
            backbone = OpenFilters(model, self.inputs(self.example))
        return _Exportable(model, preprocessing, backbone, gates and self.gated).eval()

    def inputs(self, images: Tensor) -> Tensor:
        """What the model sees of images that the file takes."""
        return images if self.preprocessing is None else self.preprocessing.normalize(images)

    @property
    def batch(self) -> Tensor:
        """Images to trace with: made, for a .pt2 file keeps them."""
        return make_images(self.example, 1 if self.form == "skipping" else 2)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any]] | None:
        """Which of the images' sizes are open, as `torch.export` wants it."""
        if self.form == "skipping":
            return None
        return ({0: Dim("batch"), **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if self.dynamic_size else {})},)

    def metadata(self) -> dict[str, Any]:
        """What is kept in the file; of the data that it was trained on the name alone, not where they lay."""
        own = without_paths(self._metadata)
        kept = {key: own[key] for key in ("classes", "preprocessing", "trained") if key in own}
        return {
            "gaternet": __version__,
            "form": self.form,
            "input": "images" if self.preprocessing is None else "pixels",
            "num_gates": self.model.num_gates if self.gated else 0,
            "sites": [asdict(site) for site in self.model.sites] if self.gated else [],
            **kept,
        }

    def held_out(self, images: Tensor | None) -> Tensor:
        """Images to compare on: those given, or some made of noise."""
        if images is None:
            return make_images(self.example, _HELD_OUT)
        images = images.float() if images.is_floating_point() else images
        if images.dtype != self.example.dtype or images.shape[1:] != self.example.shape[1:] or not len(images):
            raise ValueError(
                f"held_out must be images like the example, (B, {', '.join(map(str, self.example.shape[1:]))}) of "
                f"{self.example.dtype}, but is {tuple(images.shape)} of {images.dtype}"
            )
        return images.detach().cpu()

    def compare(self, images: Tensor, run: Run, run_gated: RunGated | None) -> Parity:
        """Compare a file with the model, on images of another size too where it takes them; see `parity.compare`."""
        mend = FAULT
        try:
            with without_autocast("cpu"):
                parity = compare(self.model, self.inputs, images, run, run_gated)
                if self.dynamic_size:
                    mend = "leave dynamic_size out"
                    others = list(self._of_other_sizes(images[:_OF_OTHER_SIZES]))
                    if not others:
                        raise ExportError(f"the model takes images of no other size than {tuple(images.shape[2:])}")
                    for other in others:
                        compare(self.model, self.inputs, other, run, run_gated)
        except ExportError as error:
            raise ExportError(f"{error}: {mend}") from error
        return parity

    def _of_other_sizes(self, images: Tensor) -> Iterator[Tensor]:
        """The images larger and smaller, with even and odd sides, as far as the model takes such.

        What a network decides by the size of an image, a file has decided for good: it is wrong at some of them.
        """
        height, width = images.shape[2:]
        sizes = [tuple(side + min(32, side & -side) for side in (height, width))]  # of a network that halves, too
        sizes += [(height + 1, width + 1), (2 * height, 2 * width + 1), (height // 2 + 1, max(1, width // 2))]
        for size in sizes:
            other = F.interpolate(images, size)
            try:
                self.model(self.inputs(other))
            except Exception:  # its own code may raise anything
                continue
            yield other

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Quiet, without gradients; what a network's own code raises becomes one sentence."""
        try:
            with torch.no_grad(), without_autocast("cpu"), quiet():
                yield
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # exporters wrap what names the operation in what does not
                cause = cause.__cause__
            mend = "leave dynamic_size out" if self.dynamic_size else "mend what that names"
            mend += ", or export the masked form" if self.form == "skipping" else ""
            name = type(self.model.backbone if self.gated else self.model).__name__
            raise ExportError(
                f"{name} cannot be exported with images {tuple(self.example.shape)} ({first_line(cause)}): {mend}"
            ) from error


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, as the file will give it back."""
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain data that JSON can hold ({error}): make lists of it") from error


class _Exportable(nn.Module):
    """What a file holds: normalisation if it takes pixels, the gater and the backbone."""

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing | None, backbone: OpenFilters | None, gates: bool
    ) -> None:
        super().__init__()
        self.model, self.preprocessing, self.backbone, self.gates = model, preprocessing, backbone, gates

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        inputs = images if self.preprocessing is None else self.preprocessing.normalize(images)
        if not isinstance(self.model, GaterNet):
            return self.model(inputs)
        gates = self.model.gates(inputs)
        logits = (self.backbone or self.model.forward_gated)(inputs, gates)
        return (logits, gates) if self.gates else logits
