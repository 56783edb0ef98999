"""What tests ask of the sites of a network."""

import copy

import torch
from families import check_dead_channels, check_gates, small_gater_net, unsettle_
from small_networks import IMAGES
from torch import nn

from gaternet import find_sites
from gaternet.cost import CostModel
from gaternet.graph import read_graph
from gaternet.sites import Selection, SiteReport, examine


def listed(net: nn.Module, selection: Selection = "residual") -> list[tuple[str, str, int, int, str]]:
    """(name, conv, start, stop, role) of each site."""
    return [(s.name, s.conv, s.start, s.stop, s.role) for s in find_sites(net, IMAGES, selection)]


def reasons(net: nn.Module, selection: Selection = "all") -> dict[str, str]:
    return examine(read_graph(net, IMAGES), selection).left_out


def check_promises(net: nn.Module, *selections: Selection) -> list[SiteReport]:
    """Those that benchmarks/families.py checks: open gates change nothing, a closed filter does not matter, ..."""
    torch.manual_seed(0)
    net = copy.deepcopy(net).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    unsettle_(net)
    graph = read_graph(net, IMAGES)
    reports = [examine(graph, selection) for selection in selections]
    for report in reports:
        model = small_gater_net(net, report.sites)
        check_gates(model, IMAGES, report.left_out)
        check_dead_channels(model, CostModel(graph, report.sites), IMAGES)
        model.ungate()
    return reports
