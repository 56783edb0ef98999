"""The model card that `save_pretrained` writes: what a stranger must know of a model, from what was saved with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gaternet import checkpoint, files
from gaternet.cost import count_dense_macs
from gaternet.errors import some
from gaternet.method import Gater, GaterNet
from gaternet.models.create import fitting
from gaternet.recipe import data_name
from gaternet.wrapping import unwrapped

MARK = "<!-- Written by gaternet's save_pretrained, which writes it anew as long as this line is here. -->"
UNKNOWN = "not recorded"


def is_ours(path: Path) -> bool:
    """Whether a card was written by `make_card` and may be replaced."""
    return path.is_file() and MARK in path.read_text(errors="replace")


@contextmanager
def staged_model(directory: Path) -> Iterator[Path]:
    """`files.staged` for a saved model and its card; ValueError for the folder of a run, which would be lost."""
    found: Mapping[str, Any] = {}
    with suppress(ValueError, OSError):  # what is damaged may be replaced
        found = files.read_json(directory / checkpoint.CONFIG)
    if "recipe" in found:
        raise ValueError(f"{directory} is a run, whose config.json this would replace: name another folder")
    card = directory / "README.md"
    with files.staged(directory, () if is_ours(card) else (card.name,)) as staging:
        yield staging


def make_card(model: GaterNet) -> ModelCard:
    """A Hugging Face model card: data, recipe, accuracy, gates, cost, use and limits. What is not known says so."""
    with unwrapped(model):
        return _card(model)


def _card(model: GaterNet) -> ModelCard:
    metadata = fitting(model.metadata, model)
    trained = _part(metadata, "trained")
    if trained.get("weights") not in (None, checkpoint.fingerprint(model)):  # it went on learning somewhere else
        trained = {}
    classes, data = metadata.get("classes"), _text(trained, "data")
    accuracy, density = _number(trained, "test_accuracy"), _number(trained, "density")
    backbone = _text(_part(metadata, "backbone"), "name") or type(model.backbone).__name__
    if isinstance(model.gater, Gater) and checkpoint.gater_options(model.gater) is not None:
        extractor = _text(_part(metadata, "extractor"), "name") or type(model.gater.extractor).__name__
        gater = f"{extractor}, without its classifier, and two linear layers"
        parts = "".join(f", {name}={name}" for name in ("backbone", "extractor") if not metadata.get(name))
        load = f'model = gaternet.GaterNet.from_pretrained("this repository, or this folder"{parts})'
    else:
        gater = type(model.gater).__name__
        load = "model = gaternet.GaterNet(backbone, gater, sites)  # as it was built; then load model.safetensors"
    name = f"{backbone.removeprefix('timm:').removeprefix('torchvision:')}-gated"
    results = None
    if data and accuracy is not None:
        shown = data_name(data)
        results = [
            EvalResult("image-classification", shown, shown, "accuracy", accuracy, dataset_split="test", verified=False)
        ]
    header = ModelCardData(
        library_name="gaternet",
        pipeline_tag="image-classification",
        tags=["gaternet", "conditional-computation", "image-classification"],
        model_name=name,
        eval_results=results,
        ignore_metadata_errors=True,
    )
    backbone_macs, gater_macs = _macs(model)
    rows = {
        "trained on": data_name(data) if data else UNKNOWN,
        "recipe": f"`{trained['recipe']}`" if "recipe" in trained else UNKNOWN,
        "epochs, seed": f"{trained['epochs']}, {trained.get('seed', UNKNOWN)}" if "epochs" in trained else UNKNOWN,
        "accuracy": UNKNOWN if accuracy is None else f"{100 * accuracy:.2f} % on its test images, after these epochs",
        "open gates": UNKNOWN if density is None else f"{100 * density:.1f} % in the mean over these images",
        "classes": f"{len(classes):,}: {some(classes)}".replace("|", "\\|")
        if isinstance(classes, list | tuple)
        else UNKNOWN,
        "images": _images(metadata),
        "backbone": f"{backbone}, {model.num_gates:,} gates at {len(model.sites)} sites",
        "gater": gater,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "MACs an image": f"{backbone_macs} in the backbone with all gates open, {gater_macs} in the gater",
    }
    limit = (
        "No accuracy is recorded."
        if accuracy is None
        else "The accuracy is that of one run on the test images of that data set; of other images it says nothing."
    )
    table = "\n".join(f"| {title} | {value} |" for title, value in rows.items())
    text = f"""
{MARK}

# {name}

A [GaterNet](https://arxiv.org/abs/1811.11205): a gater looks at an image first and decides which filters of its
backbone run.

| | |
|---|---|
{table}

## Use

```python
import gaternet

{load}
logits, gates = model(images, return_gates=True)  # images (B, channels, H, W), normalised as above
fast = gaternet.skip(model, images)  # the same logits; closed filters are not computed
```

## Limits

- {limit}
- The model always names one of its classes, whatever the image shows.
- Called as it is, it computes all filters and multiplies with the gates; `gaternet.skip` leaves the closed ones out.
- The MACs above are counted, not timed, and with all gates open; how far closed ones lower them depends on the image.
"""
    return ModelCard(f"---\n{header.to_yaml()}\n---\n{text}", ignore_metadata_errors=True)


def _part(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the metadata, which may be anybody's, say of one subject; nothing where they say it in another way."""
    found = metadata.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(part: Mapping[str, Any], name: str) -> str | None:
    found = part.get(name)
    return found if isinstance(found, str) else None


def _number(part: Mapping[str, Any], name: str) -> float | None:
    found = part.get(name)
    return found if isinstance(found, int | float) else None


def _preprocessing(metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
    made = _part(metadata, "preprocessing")
    if not {"height", "width", "mean", "std"} <= made.keys():
        return None
    lists = [made[name] for name in ("mean", "std")]
    numbers = (isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values) for values in lists)
    return made if all(numbers) else None


def _images(metadata: Mapping[str, Any]) -> str:
    made = _preprocessing(metadata)
    if made is None:
        return UNKNOWN
    mean, std = (" ".join(f"{value:.4g}" for value in made[name]) for name in ("mean", "std"))
    kind = "grey" if len(made["mean"]) == 1 else "RGB"
    return f"{made['height']} x {made['width']} pixels, {kind}, mean {mean}, deviation {std}"


def _macs(model: GaterNet) -> tuple[str, str]:
    """Of backbone and gater for an image; unknown where its size is, or where they do not run on it."""
    made = _preprocessing(model.metadata)
    if made is None:
        return UNKNOWN, UNKNOWN
    counts = []
    for part in (model.backbone, model.gater):
        try:
            image = next(model.parameters()).new_zeros(1, len(made["mean"]), made["height"], made["width"])
            counts.append(f"{count_dense_macs(part, image) / 1e6:,.1f}M")
        except Exception:  # a network's own, of any kind: no reason to save nothing
            counts.append(UNKNOWN)
    return counts[0], counts[1]
