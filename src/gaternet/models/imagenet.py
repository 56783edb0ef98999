"""The ImageNet networks of Table 3: timm's, widened as the paper's Wider rows are, and their gate sites."""

import re
from typing import Any

from torch import nn

from gaternet.method import GateSite
from gaternet.models.common import number_sites

# name: timm's name
IMAGENET = {
    **{name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "inception_v4")},
    **{f"{name}_se": f"se{name}" for name in ("resnet34", "resnet101", "resnet152")},
    **{f"{name}_wider": name for name in ("resnet34", "resnet101", "resnet152")},
}
# Not published: the stages' widths, about 1.25 and 1.16 times the plain ones, that give Table 3's parameter counts.
_WIDTHS = {
    "resnet34_wider": (80, 160, 320, 640),
    "resnet101_wider": (74, 148, 296, 592),
    "resnet152_wider": (75, 150, 299, 593),
}


def imagenet_network(name: str, num_classes: int = 1000, in_chans: int = 3) -> nn.Module:
    """A network of `IMAGENET`, with fresh weights; with 0 classes it gives features (B, h)."""
    import timm

    shape: Any = {"num_classes": num_classes, "in_chans": in_chans}
    if name not in _WIDTHS:
        return timm.create_model(IMAGENET[name], **shape)
    network: Any = timm.create_model(IMAGENET[name], channels=_WIDTHS[name], **shape)
    _widen_stem(network, _WIDTHS[name][0])
    return network


def _widen_stem(network: Any, width: int) -> None:
    """timm's ResNets have a stem of 64 filters: give one `width`, and make the first stage anew behind it."""
    from timm.models.resnet import make_blocks

    old = network.conv1
    network.conv1 = nn.Conv2d(old.in_channels, width, old.kernel_size, old.stride, old.padding, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    block, units = type(network.layer1[0]), len(network.layer1)
    kinds = {"cardinality": 1, "base_width": 64, "act_layer": nn.ReLU, "norm_layer": nn.BatchNorm2d}
    ((_, network.layer1),), _ = make_blocks((block,), (width,), (units,), width, **kinds)
    network.init_weights()


def imagenet_sites(backbone: nn.Module) -> list[GateSite]:
    """The published sites in execution order: of a ResNet the last convolution of each unit, after its BatchNorm.

    For Inception-v4 only the number of gates is published, 16,608: just so many filters have those convolutions whose
    output one further convolution of the same branch reads, without the network's first.
    """
    places: list[tuple[str, str, str]] = []
    for name, module in backbone.named_modules():
        if re.fullmatch(r"layer\d\.\d+", name):  # a residual unit
            last = "3" if hasattr(module, "conv3") else "2"
            places.append((f"{name}.bn{last}", f"{name}.conv{last}", "residual"))
        elif hasattr(module, "conv") and hasattr(module, "bn") and _is_read_in_branch(backbone, name):
            places.append((f"{name}.bn", f"{name}.conv", "inner"))
    return number_sites(backbone, places)


def _is_read_in_branch(backbone: nn.Module, name: str) -> bool:
    """Whether a convolution of Inception-v4 is one of the stem after its first, or in a branch and not its last."""
    if re.fullmatch(r"features\.[12]|.*\.branch\d_\d", name):  # branches that fork at their end have `branch1_1a`
        return True
    parent, _, index = name.rpartition(".")
    branch = backbone.get_submodule(parent)
    return ".branch" in parent and isinstance(branch, nn.Sequential) and int(index) < len(branch) - 1
