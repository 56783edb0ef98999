"""What the networks of this folder share: how weights begin, and how their sites' gates are numbered."""

from collections.abc import Iterable

from torch import nn

from gaternet.method import GateSite


def initialize_(network: nn.Module) -> None:
    """The public code's initialisation: He's normal one by fan-out for convolutions, and biases of zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def number_sites(backbone: nn.Module, places: Iterable[tuple[str, str, str]]) -> list[GateSite]:
    """Sites with a gate for each filter, numbered in the order of the places.

    A place is the names of the module that is scaled and of the convolution, and the role; see `GateSite`.
    """
    sites: list[GateSite] = []
    for name, conv, role in places:
        filters = backbone.get_submodule(conv)
        assert isinstance(filters, nn.Conv2d)
        start = sites[-1].stop if sites else 0
        sites.append(GateSite(name, conv, start, start + filters.out_channels, role))
    return sites
