"""`gate`: any CNN becomes a GaterNet, in one call."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gaternet.cost import count_dense_macs
from gaternet.leaks import leaks
from gaternet.method import Gater, GaterNet, refuse_gated
from gaternet.models.create import create_extractor, describe_backbone
from gaternet.modes import run_once
from gaternet.sites import Selection, find_sites
from gaternet.wrapping import require_network

OPEN_BIAS = 2.0  # with the paper's noise, 98 % of the hard gates are then open in the first training step
_BUDGET = 0.05  # share of the backbone's MACs that the default gater may cost
_LARGE = 0.5e9  # MACs above which a backbone has that budget; smaller ones may pay more for a gater that sees enough


@torch.inference_mode(False)  # its parts are to learn, wherever it is called
def gate(
    backbone: nn.Module,
    example_input: Tensor,
    *,
    gater: str | nn.Module | None = None,
    shrink: int | None = None,
    sites: Selection = "residual",
    group_size: int = 1,
    bottleneck: int | None = None,
    open: bool = False,  # noqa: A002 (the word for it)
    batch_norm: bool = True,
    initial_bias: float = 0.0,
    noise_std: float = 1.0,
    hard_probability: float = 0.5,
) -> GaterNet:
    """Gate the filters of a network. The network stays as it is, and so do its weights; `ungate()` gives it back.

    Args:
        backbone: any CNN that `torch.export` can export; maps images to logits.
        example_input: images (B, channels, H, W), normalised, as it takes them.
        gater: the extractor E, a network without its output layer: a module that maps images to features (B, h), or a
            name: one of the paper's CIFAR models ("resnet20") or of timm's ("resnet18"), with fresh weights. Default:
            cheap, a ResNet-20 on the shrunk image, which costs at most 5 % of the MACs of backbones above 0.5 GMAC,
            unless that would leave less than 8 pixels of the image's short side. Of smaller backbones it may take more,
            for it leaves them 16 pixels: a quarter of a ResNet-20's MACs at 32 pixels.
        shrink: a gater given by name sees the image average-pooled by this factor. Default: 1, or what the default
            gater needs to be cheap.
        sites: which filters, see `find_sites`: "residual" (the paper's), "all", or a predicate.
        group_size: number of neighbouring filters that share a gate, the paper's is 1. Larger groups make skipping
            faster and choice coarser.
        bottleneck: width of the middle of the gater's D. Default: 8 for images up to 64 pixels, else 256, see `Gater`.
        open: start with every gate open, so that the model begins as the plain backbone (but for noise while it
            trains). Default: the paper's start, with about half of the gates open.
        batch_norm, initial_bias, noise_std, hard_probability: see `Gater`.

    Returns:
        The GaterNet, on the backbone's device and in its mode. `save_pretrained` knows how to rebuild backbones from
        timm and from `create_model`; others are given to `from_pretrained`.

    Raises:
        ValueError: no filter can be gated, the network cannot be exported or is gated already, or reads what filters
            compute past their gates; the extractor gives no features (B, h); the example is no float tensor of images;
            an option is out of range, or goes with another: an initial bias with `open`, `shrink` with a gater that is
            a module.
        TypeError: the backbone is no module; or the gater neither that nor a name, or a `Gater`.
    """
    if open and initial_bias:
        raise ValueError("initial_bias says how open the gates start: leave it out where open is set")
    require_network(backbone, "backbone")
    if gater is not None and not isinstance(gater, str | nn.Module):
        raise TypeError(f"gater must be a network or the name of one, not {gater!r}")
    if isinstance(gater, Gater | GaterNet):
        raise TypeError("gater is the network that features come from: pass the extractor of your Gater")
    if isinstance(example_input, Tensor) and not example_input.is_floating_point():
        raise ValueError(f"images must be normalised, but are {example_input.dtype}: do that outside of the backbone")
    refuse_gated(backbone)
    found = find_sites(backbone, example_input, sites, group_size)
    num_gates = max(site.stop for site in found)
    if bottleneck is None:
        bottleneck = 8 if max(example_input.shape[2:]) <= 64 else 256
    source: dict[str, Any] | None = None
    if isinstance(gater, nn.Module):
        if shrink is not None:
            raise ValueError(
                "shrink goes with a gater that is given by name: let your network shrink its images itself"
            )
        extractor = gater
    else:
        if shrink is None:
            shrink = 1 if gater else _shrink(backbone, example_input, bottleneck * num_gates)
        source = {"name": gater or "resnet20", "in_chans": example_input.shape[1]}
        source |= {"shrink": shrink} if shrink != 1 else {}
        extractor = create_extractor(**source)
    extractor.to(example_input.device, example_input.dtype)
    built = Gater(
        extractor,
        _num_features(extractor, example_input),
        num_gates,
        bottleneck=bottleneck,
        batch_norm=batch_norm,
        initial_bias=OPEN_BIAS if open else initial_bias,
        noise_std=noise_std,
        hard_probability=hard_probability,
    ).to(example_input.device, example_input.dtype)
    if open:
        nn.init.zeros_(built.fc2.weight)
    metadata = {"backbone": describe_backbone(backbone, example_input.shape[1]), "extractor": source}
    model = GaterNet(backbone, built, found, metadata)
    try:
        felt = leaks(model, example_input[:2])
    except BaseException:  # the network's own code may raise anything, and so may Ctrl-C
        model.ungate()
        raise
    if felt:
        kind = type(model.ungate()).__name__
        raise ValueError(
            f"closed filters of {', '.join(felt[:5])} would still be felt, for the {kind} reads what these modules "
            "compute by another way than as what they return: leave them out, with a predicate as sites"
        )
    mode, extractors = backbone.training, extractor.training
    for module in (model, built, built.fc1, built.norm, built.fc2):  # not train(): parts may be in another mode
        module.training = mode
    if extractors != mode:  # a network that is in the other mode itself comes over with all of its parts
        extractor.train(mode)
    return model


def _num_features(extractor: nn.Module, example_input: Tensor) -> int:
    """How many features the extractor gives an image, found by a run on the example."""
    features = run_once(extractor, example_input, f"the gater's extractor, a {type(extractor).__name__},")
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(example_input):
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the gater's extractor, a {type(extractor).__name__}, must return features (B, h), but returns {given}: "
            "remove its output layer and pool over the image"
        )
    return features.shape[1]


def _shrink(backbone: nn.Module, example_input: Tensor, decider: int) -> int:
    """The factor by which the default gater shrinks images to keep within its budget of MACs; `decider` are D's."""
    macs = count_dense_macs(backbone, example_input)
    budget, smallest = _BUDGET * macs - decider, 8 if macs > _LARGE else 16
    channels, height, width = example_input.shape[1:]
    macs_per_pixel = count_dense_macs(create_extractor("resnet20", channels), torch.zeros(1, channels, 32, 32)) / 32**2
    shrink = 1
    while min(height, width) // (shrink + 1) >= smallest and (
        macs_per_pixel * math.ceil(height / shrink) * math.ceil(width / shrink) > budget
    ):
        shrink += 1
    return shrink
