"""One pass over a data set that gathers what a trained model's gates do there: `analyze`.

The paper's four analyses (section 4.3), and past them: what each gate tells about the class beside what chance would,
which images open it most surely, what classes cost. `gaternet.findings` holds what is found, `gaternet.forcing` asks
what gates are for, and `gaternet.report` draws.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from gaternet.cost import CostModel, count_dense_macs
from gaternet.data import Preprocessing, images_of
from gaternet.findings import GateAnalysis, Samples
from gaternet.method import GaterNet
from gaternet.modes import evaluation_mode
from gaternet.wrapping import require_gated

THUMBNAIL = 48  # longest side of a small picture, in pixels


@torch.no_grad()
def analyze(
    model: GaterNet,
    loader: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    samples: int = 2000,
    extremes: int = 6,
    seed: int = 0,
) -> GateAnalysis:
    """Run a model over a data set once, and gather what its gates do. Memory does not grow with the data set.

    Args:
        model: in any mode; it is run in evaluation mode, and left as it was.
        loader: batches of images, or of (images, labels): inputs of the model (B, channels, H, W), or uint8 pixels
            where `preprocessing` is given. Labels are integers in [0, K), K the model's number of outputs.
        classes: names of the K classes; default: their numbers.
        preprocessing: turns pixels into inputs; a run's is `Preprocessing.from_metadata(metadata)`.
        samples: number of images to draw at random, for pictures of the gate vectors.
        extremes: number of images to keep for each gate that open it most surely, and that close it.
        seed: of that draw.

    Raises:
        ValueError: there are no images, or labels that do not go with the model or the names.
        TypeError: the model is no GaterNet.
    """
    require_gated(model)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, but is {samples}")
    if extremes < 0:
        raise ValueError(f"extremes must be at least 0, but is {extremes}")
    pass_ = None
    with evaluation_mode(model):
        for batch in loader:
            images, labels = images_and_labels(batch)
            if not len(images):
                continue
            if pass_ is None:
                pass_ = _Pass(
                    model,
                    images,
                    labels,
                    preprocessing=preprocessing,
                    classes=classes,
                    samples=samples,
                    extremes=extremes,
                    seed=seed,
                )
            pass_.add(images, labels)
    if pass_ is None or not pass_.seen:
        raise ValueError("there are no images to analyze: the loader is empty")
    return pass_.result()


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Of a batch of images, (images,) or (images, labels, ...)."""
    images = images_of(batch)
    labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if images.ndim != 4:
        raise ValueError(
            f"images must be (B, channels, H, W), but are {tuple(images.shape)}: pass a DataLoader of the data set"
        )
    try:
        labels = None if labels is None else torch.as_tensor(labels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"labels must be integers, one an image, not a {type(labels).__name__}: {error}") from error
    if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be integers, one an image: {len(images)}, not {tuple(labels.shape)}, {labels.dtype}"
        )
    return images, labels if labels is None else labels.long()


def thumbnail(image: Tensor) -> NDArray[np.uint8]:
    """A small picture (h, w, 1 or 3) of pixels, or of a model's input, which is stretched to 0 to 255."""
    if image.dtype != torch.uint8:
        image = image.float()
        low, high = image.min(), image.max()
        image = ((image - low) * (255 / (high - low).clamp(min=1e-12))).to(torch.uint8)
    if image.shape[0] not in (1, 3):
        image = image[:1]
    longest = max(image.shape[1:])
    if longest > THUMBNAIL:
        size = [max(1, round(side * THUMBNAIL / longest)) for side in image.shape[1:]]
        image = tv.resize(image, size)
    return image.permute(1, 2, 0).cpu().numpy().copy()  # a view would hold the whole batch, which may change


class _Pass:
    """The sums and the selections of one pass."""

    def __init__(
        self,
        model: GaterNet,
        images: Tensor,
        labels: Tensor | None,
        *,
        preprocessing: Preprocessing | None,
        classes: Sequence[str] | None,
        samples: int,
        extremes: int,
        seed: int,
    ) -> None:
        self.model, self.preprocessing, self.num_samples, self.extremes = model, preprocessing, samples, extremes
        self.classes = None if classes is None else tuple(map(str, classes))
        self.device = next(model.parameters()).device
        self.shape = images.shape[1:]
        example = inputs_of(images[:1], preprocessing, self.device)
        self.cost = CostModel.of(model, example)
        self.gater_macs = count_dense_macs(model.gater, example)
        self.labeled, self.seen = labels is not None, 0
        self.generator = np.random.default_rng(seed)
        gates = model.num_gates
        self.histogram = torch.zeros(gates + 1, dtype=torch.int64, device=self.device)
        self.sums: dict[str, Tensor] = {}  # by class
        shape = (extremes, gates)
        self.scores = [torch.full(shape, -math.inf, device=self.device) for _ in range(2)]
        self.places = [torch.full(shape, -1, dtype=torch.int64, device=self.device) for _ in range(2)]
        self.has_logits = model.plain_gater is not None
        self.kept = {name: _Kept() for name in ("samples", "cheapest", "dearest")}
        self.thumbnails: dict[int, NDArray[np.uint8]] = {}
        self.facts: dict[int, tuple[int, int, int, int]] = {}

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Count one batch."""
        if images.shape[1:] != self.shape:
            sizes = " and ".join(str(tuple(shape)) for shape in (self.shape, images.shape[1:]))
            raise ValueError(f"images are {sizes}, and costs are counted for one size: bring them to one")
        inputs = inputs_of(images, self.preprocessing, self.device)
        if (gater := self.model.plain_gater) is not None:
            scores = gater.logits(inputs)
            gates = gater.sample(scores)
        else:
            scores, gates = None, self.model.gates(inputs)
        logits: Any = self.model.forward_gated(inputs, gates)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"the backbone must give logits (B, K), but gives {given}: wrap it")
        predictions, opened = predictions_of(logits), gates > 0.5
        if (labels is None) == self.labeled:
            raise ValueError("some batches have labels and others have not: give all or none of them")
        if labels is not None:
            labels = labels.to(self.device)
            if labels.min() < 0 or labels.max() >= logits.shape[1]:
                raise ValueError(f"labels must lie in [0, {logits.shape[1]}): the model's classes")
        macs = self.cost(gates)
        self._sum(logits.shape[1], predictions if labels is None else labels, predictions, opened, macs)
        self.histogram += torch.bincount(opened.sum(1), minlength=len(self.histogram))
        places = torch.arange(self.seen, self.seen + len(images), device=self.device)
        if scores is not None and self.extremes:
            for side, (sign, others) in enumerate(((1, ~opened), (-1, opened))):
                own = (sign * scores.float()).masked_fill(others, -math.inf)
                self.scores[side], chosen = torch.cat([self.scores[side], own]).topk(self.extremes, 0)
                every = torch.cat([self.places[side], places[:, None].expand(-1, gates.shape[1])])
                self.places[side] = every.gather(0, chosen).masked_fill(self.scores[side].isinf(), -1)
        rows = [torch.full_like(predictions, -1) if labels is None else labels, predictions, opened, macs]
        batch = Samples(places.cpu().numpy(), *(row.cpu().numpy() for row in rows))
        self.kept["samples"].add(batch, self.generator.random(len(images)), self.num_samples)
        self.kept["cheapest"].add(batch, batch.macs, 12)
        self.kept["dearest"].add(batch, -batch.macs, 12)
        self._keep_images(images, batch)
        self.seen += len(images)

    def _sum(self, classes: int, by: Tensor, predictions: Tensor, opened: Tensor, macs: Tensor) -> None:
        if not self.sums:
            if self.classes is not None and len(self.classes) != classes:
                raise ValueError(f"there are {len(self.classes)} names of classes, but the model has {classes} outputs")
            for name, shape in {"count": (), "right": (), "macs": (), "open": (opened.shape[1],)}.items():
                dtype = macs.dtype if name == "macs" else torch.int32
                self.sums[name] = torch.zeros(classes, *shape, dtype=dtype, device=self.device)
        values = {"count": torch.ones_like(by), "right": by == predictions, "macs": macs, "open": opened}
        for name, value in values.items():
            self.sums[name].index_add_(0, by, value.to(self.sums[name].dtype))

    def _keep_images(self, images: Tensor, batch: Samples) -> None:
        """Of the images that are still named somewhere; the others are dropped."""
        named = [kept.samples.index for kept in self.kept.values() if kept.samples is not None]
        named += [places.flatten().cpu().numpy() for places in self.places]
        wanted = set(np.unique(np.concatenate(named)).tolist()) - {-1}
        for place in self.thumbnails.keys() - wanted:
            del self.thumbnails[place], self.facts[place]
        columns = (batch.label, batch.prediction, batch.gates.sum(1), batch.macs.round().astype(np.int64))
        for place in sorted(place for place in wanted if place >= self.seen):
            self.thumbnails[place] = thumbnail(images[place - self.seen])
            label, prediction, opened, macs = (int(column[place - self.seen]) for column in columns)
            self.facts[place] = label, prediction, opened, macs

    def result(self) -> GateAnalysis:
        """What was found."""
        sums = {name: total.cpu().numpy() for name, total in self.sums.items()}
        counts = sums["count"].astype(np.int64)
        samples, cheapest, dearest = (kept.samples for kept in self.kept.values())
        assert samples is not None
        assert cheapest is not None
        assert dearest is not None
        return GateAnalysis(
            classes=tuple(self.classes or map(str, range(len(counts)))),
            labeled=self.labeled,
            sites=tuple({**asdict(site), "channels": site.channels} for site in self.model.sites),
            histogram=self.histogram.cpu().numpy(),
            counts=counts,
            class_open=sums["open"].astype(np.int64),
            class_right=sums["right"].astype(np.int64),
            class_macs=np.divide(sums["macs"], counts, out=np.full(len(counts), math.nan), where=counts > 0),
            backbone_macs=self.cost.dense,
            gater_macs=self.gater_macs,
            samples=samples,
            cheapest=cheapest,
            dearest=dearest,
            surest=torch.stack(self.places).cpu().numpy() if self.extremes and self.has_logits else None,
            thumbnails=self.thumbnails,
            facts=self.facts,
        )


def inputs_of(images: Tensor, preprocessing: Preprocessing | None, device: torch.device) -> Tensor:
    """What a model takes of a batch: pixels, uint8, go with a preprocessing, and other images with none."""
    pixels = images.dtype == torch.uint8
    if pixels != (preprocessing is not None):
        if pixels:
            raise ValueError("the images are pixels in uint8: pass preprocessing=..., which makes inputs of them")
        raise ValueError("the images are no pixels in uint8, which preprocessing makes inputs of: leave it out")
    images = images.to(device)
    return images if preprocessing is None else preprocessing.normalize(images)


def predictions_of(logits: Tensor) -> Tensor:
    """The likeliest classes, (B,); ValueError where the logits (B, K) say nothing."""
    if not logits.isfinite().all():
        raise ValueError("the model gives logits that are no finite numbers: its weights, or the images, are damaged")
    return logits.argmax(1)


class _Kept:
    """The images with the smallest keys so far."""

    def __init__(self) -> None:
        self.samples: Samples | None = None
        self.keys = np.zeros(0)

    def add(self, batch: Samples, keys: NDArray[np.float64], number: int) -> None:
        both = [batch] if self.samples is None else [self.samples, batch]
        self.keys = np.concatenate([self.keys, keys])
        order = np.argsort(self.keys, kind="stable")[:number]
        self.keys = self.keys[order]
        fields = ("index", "label", "prediction", "gates", "macs")
        self.samples = Samples(*(np.concatenate([getattr(part, name) for part in both])[order] for name in fields))
