"""Every model of the paper's tables by name."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from gaternet.method import Gater, GaterNet
from gaternet.models.cifar_resnet import BasicBlock, Bottleneck, CifarResNet, residual_sites

# name: block, units per stage, stem filters, inner widths, unit widths
_CIFAR_RESNETS = {
    "resnet20": (BasicBlock, 3, 16, (16, 32, 64), (16, 32, 64)),
    "resnet56": (BasicBlock, 9, 16, (16, 32, 64), (16, 32, 64)),
    "resnet110": (BasicBlock, 18, 16, (16, 32, 64), (16, 32, 64)),
    "resnet164": (Bottleneck, 18, 16, (4, 32, 64), (16, 128, 256)),
}
# Not published: the factor on all widths, and the SE reduction, that give Table 1's parameter counts on both data sets.
_WIDER = {"resnet20": 1.44, "resnet56": 1.12, "resnet110": 1.12, "resnet164": 1.12}
_SE_REDUCTION = {"resnet20": 4, "resnet56": 4, "resnet110": 4, "resnet164": 8}
_BACKBONES = [f"{name}{suffix}" for name in _CIFAR_RESNETS for suffix in ("", "_wider", "_se")]
_GATED = "_gated"


def model_names() -> list[str]:
    """All names that `create_model` knows."""
    return sorted([*_BACKBONES, *(f"{name}{_GATED}" for name in _CIFAR_RESNETS)], key=lambda name: (len(name), name))


def create_model(
    name: str,
    num_classes: int = 10,
    in_chans: int = 3,
    *,
    extractor: str = "resnet20",
    bottleneck: int = 8,
    batch_norm: bool = True,
    initial_bias: float = 0.0,
    noise_std: float = 1.0,
    hard_probability: float = 0.5,
    threshold: float = 0.0,
) -> nn.Module:
    """A model of the paper's tables with fresh weights: a GaterNet if the name ends in `_gated`, else a plain net.

    Args:
        name: one of `model_names()`, for example "resnet56_gated".
        num_classes: classes K.
        in_chans: channels of the images.
        extractor: for gated models, the name of the plain network that serves as the gater's E, without its classifier.
        bottleneck, batch_norm, initial_bias, noise_std, hard_probability, threshold: for gated models, see `Gater`.

    Raises:
        ValueError: for a name that is not known.
    """
    if name not in model_names():
        raise ValueError(_unknown(name, model_names()))
    if not name.endswith(_GATED):
        return create_backbone(name, num_classes, in_chans)
    shape = {"num_classes": num_classes, "in_chans": in_chans}
    return build_gated(
        {
            "backbone": {"name": name.removesuffix(_GATED), **shape},
            "extractor": {"name": extractor, "in_chans": in_chans},
        },
        {
            "bottleneck": bottleneck,
            "batch_norm": batch_norm,
            "initial_bias": initial_bias,
            "noise_std": noise_std,
            "hard_probability": hard_probability,
            "threshold": threshold,
        },
    )


def create_backbone(name: str, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """A plain network by name, such as "resnet20" or "resnet20_wider"; with `num_classes=0` its features (B, h)."""
    if name not in _BACKBONES:
        raise ValueError(_unknown(name, _BACKBONES))
    base, _, variant = name.partition("_")
    block, depth, stem, inner, widths = _CIFAR_RESNETS[base]
    factor = _WIDER[base] if variant == "wider" else 1
    return CifarResNet(
        block,
        depth,
        round(stem * factor),
        [round(width * factor) for width in inner],
        [round(width * factor) for width in widths],
        num_classes,
        in_chans,
        _SE_REDUCTION[base] if variant == "se" else None,
    )


def build_gated(metadata: Mapping[str, Any], gater_options: Mapping[str, Any]) -> GaterNet:
    """A GaterNet from plain data: `metadata` says how backbone and extractor are made, the options are `Gater`'s."""
    backbone = create_backbone(**metadata["backbone"])
    sites = residual_sites(backbone)
    extractor = create_backbone(**metadata["extractor"], num_classes=0)
    gater = Gater(extractor, extractor.num_features, sites[-1].stop, **gater_options)
    return GaterNet(backbone, gater, sites, metadata)


def _unknown(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f"unknown model {name!r}: " + (f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}")
