"""The model card that `save_pretrained` writes: what a stranger must know of a model, from what was saved with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gaternet import checkpoint
from gaternet.cost import count_dense_macs
from gaternet.errors import some
from gaternet.method import Gater, GaterNet
from gaternet.models.create import fitting
from gaternet.recipe import data_name

MARK = "<!-- Written by gaternet's save_pretrained, which writes it anew as long as this line is here. -->"
UNKNOWN = "not recorded"


def is_ours(path: Path) -> bool:
    """Whether a card was written by `make_card` and may be replaced."""
    return path.is_file() and MARK in path.read_text(errors="replace")


def make_card(model: GaterNet) -> ModelCard:
    """A Hugging Face model card: data, recipe, accuracy, gates, cost, use and limits. What is not known says so."""
    metadata = fitting(model.metadata, model)
    trained: Mapping[str, Any] = metadata.get("trained") or {}
    if trained.get("weights") not in (None, checkpoint.fingerprint(model)):  # it went on learning somewhere else
        trained = {}
    classes, data, accuracy = metadata.get("classes"), trained.get("data"), trained.get("test_accuracy")
    backbone = (metadata.get("backbone") or {}).get("name", type(model.backbone).__name__)
    if type(model.gater) is Gater:
        extractor = (metadata.get("extractor") or {}).get("name", type(model.gater.extractor).__name__)
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
    density = trained.get("density")
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

- The accuracy is that of one run on the test images of the data set above; of other images it says nothing.
- The model always names one of its classes, whatever the image shows.
- Called as it is, it computes all filters and multiplies with the gates; `gaternet.skip` leaves the closed ones out.
- The MACs above are counted, not timed, and closed gates lower them by what the image at hand allows.
"""
    return ModelCard(f"---\n{header.to_yaml()}\n---\n{text}", ignore_metadata_errors=True)


def _preprocessing(metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
    made: Mapping[str, Any] = metadata.get("preprocessing") or {}
    if not {"height", "width", "mean", "std"} <= made.keys():
        return None
    return made if all(isinstance(made[name], list | tuple) for name in ("mean", "std")) else None


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
