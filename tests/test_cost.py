"""Multiply-accumulates against hand counts, and against convolutions that really lack their closed filters."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import IMAGES, Net, conv, norm, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gaternet import count_macs, find_sites
from gaternet.channels import ALIVE
from gaternet.cost import CostModel, _Runs, count_dense_macs
from gaternet.graph import read_graph
from gaternet.method import Gater, GaterNet, GateSite
from gaternet.models.cifar_resnet import BasicBlock, CifarResNet
from gaternet.models.create import create_backbone

Open = list[int]  # the channels that are open


def cost_of(net: nn.Module, sites: list[GateSite] | None = None, images: Tensor = IMAGES[:1]) -> CostModel:
    sites = find_sites(net, images, "all") if sites is None else sites
    return CostModel(read_graph(net, images), sites)


def random_gates(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randint(2, (rows, columns), generator=seeded(seed)).float()


def opened(gates: Tensor) -> Open:
    """Of one site and one image."""
    return gates.nonzero().flatten().tolist()


def measured(layer: nn.Conv2d, reads: int, writes: int, pixels: int, groups: int = 1) -> int:
    """MACs of a convolution like `layer` with so many channels, as PyTorch counts them when it runs."""
    if not reads or not writes:
        return 0
    sliced = nn.Conv2d(reads, writes, layer.kernel_size, layer.stride, layer.padding, groups=groups, bias=False)  # pyright: ignore[reportArgumentType]
    with FlopCounterMode(display=False) as counter:
        sliced(torch.zeros(1, reads, pixels, pixels))
    return counter.get_total_flops() // 2


def by_hand(net: nn.Module, images: Tensor) -> int:
    """MACs of one image in all convolutions and linear layers: each output number takes one row of weights."""
    total = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        total.append(output[0].numel() * module.get_parameter("weight")[0].numel())

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    net(images)
    for handle in handles:
        handle.remove()
    return sum(total)


# --- The plain network


def test_dense_macs_of_a_network_counted_by_hand():
    net = Net(lambda net, x: net.two(net.one(x)), one=conv(3, 6, 5), two=conv(6, 8, groups=2, stride=2))
    assert count_dense_macs(net, IMAGES) == 64 * 25 * 3 * 6 + 16 * 9 * 3 * 8 + 8 * 4
    assert by_hand(net, IMAGES) == count_dense_macs(net, IMAGES)


@pytest.mark.parametrize("name", ["resnet20_se", "torchvision:resnet18", "torchvision:mobilenet_v3_small"])
def test_dense_macs_are_those_of_all_convolutions_and_linear_layers(name):
    net, images = create_backbone(name).eval(), torch.zeros(2, 3, 64, 64)
    graph = read_graph(net, images)
    dense = CostModel(graph, find_sites(net, images)).dense
    linear = sum(m.in_features * m.out_features for m in net.modules() if isinstance(m, nn.Linear))
    assert dense == count_dense_macs(net, images) == by_hand(net, images)
    assert sum(found.macs for found in graph.convs.values()) + linear == dense


@pytest.mark.parametrize("training", [True, False])
def test_counting_changes_neither_modes_nor_statistics(training):
    net = Net(lambda net, x: net.bn(net.one(x)), one=conv(3, 8), bn=norm()).train(training)
    net.fc.train(not training)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    count_dense_macs(net, IMAGES)
    assert (net.training, net.bn.training, net.fc.training) == (training, training, not training)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_groups_of_a_function_that_convolves_are_counted():
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)
    net = Net(lambda net, x: torch.convolution(net.stem(x), net.grouped.weight, None, *options), stem=conv(3, 8))
    net.grouped = conv(8, 8, groups=2)
    assert sum(found.macs for found in read_graph(net, IMAGES).convs.values()) + 32 == count_dense_macs(net, IMAGES)


# --- Under gates, against convolutions that lack their closed filters


def resnet20_macs(net: CifarResNet, sites: list[GateSite], gates: Tensor, pixels: int) -> int:
    """One image's, from what a unit is: its second convolution reads gated filters, and the first unit the stem's."""
    of = {site.conv: opened(gates[site.start : site.stop]) for site in sites}
    total = measured(net.conv1, 3, len(of["conv1"]), pixels) + net.fc.get_parameter("weight").numel()
    stream = len(of["conv1"])  # what the first unit reads; behind it all channels are alive, for units add to them
    for stage in (1, 2, 3):
        for index, unit in enumerate(net.get_submodule(f"layer{stage}").children()):
            assert isinstance(unit, BasicBlock)
            inner, last = (len(of[f"layer{stage}.{index}.conv{i}"]) for i in (1, 2))
            total += measured(unit.conv1, stream, inner, pixels)
            if isinstance(unit.downsample, nn.Sequential):
                shortcut = unit.downsample[0]
                assert isinstance(shortcut, nn.Conv2d)
                total += measured(shortcut, stream, len(of[f"layer{stage}.{index}.downsample.0"]), pixels)
            pixels //= unit.conv1.stride[0]
            total += measured(unit.conv2, inner, last, pixels)
            stream = unit.conv2.out_channels
    return total


def test_gated_macs_of_resnet20_are_those_of_sliced_convolutions():
    net = create_backbone("resnet20").eval()
    assert isinstance(net, CifarResNet)
    sites = find_sites(net, IMAGES, "all")
    assert len(sites) == 21  # every convolution
    cost, gates = cost_of(net, sites), random_gates(3, sites[-1].stop)
    gates[2, : sites[0].stop] = 0  # nothing for the first unit to read
    expected = [resnet20_macs(net, sites, row, 8) for row in gates]
    assert cost(gates).tolist() == expected
    assert len({*expected, cost.dense}) == 4


def test_gated_macs_with_the_papers_sites():
    net = create_backbone("resnet20").eval()
    assert isinstance(net, CifarResNet)
    everywhere, sites = find_sites(net, IMAGES, "all"), find_sites(net, IMAGES)
    gates = random_gates(2, sites[-1].stop)
    ours = {site.conv: (site.start, site.stop) for site in sites}
    all_gates = torch.ones(2, everywhere[-1].stop)
    for site in everywhere:
        if site.conv in ours:
            all_gates[:, site.start : site.stop] = gates[:, slice(*ours[site.conv])]
    assert cost_of(net, sites)(gates).tolist() == [resnet20_macs(net, everywhere, row, 8) for row in all_gates]


def depthwise_net() -> Net:
    """MobileNetV2's order of convolutions, on 8 by 8 pixels; then a depthwise one that has a bias."""
    return Net(
        lambda net, x: net.last(net.biased(net.project(net.depthwise(net.expand(x))))),
        expand=nn.Sequential(conv(3, 7, 1), norm(7), nn.ReLU6()),
        depthwise=nn.Sequential(conv(7, 7, groups=7), norm(7), nn.ReLU6()),
        project=conv(7, 6, 1),
        biased=conv(6, 6, groups=6),
        last=conv(6, 8, 1),
    ).eval()


def each_row(cost: CostModel, gates: Tensor) -> Iterator[tuple[float, Tensor]]:
    return zip(cost(gates).tolist(), gates, strict=True)


def test_gated_macs_with_depthwise_convolutions():
    net = depthwise_net()
    sites = find_sites(net, IMAGES, "all")
    assert [(s.conv, s.start, s.stop) for s in sites] == [
        ("expand.0", 0, 7),
        ("depthwise.0", 0, 7),
        ("project", 7, 13),
        ("biased", 7, 13),
        ("last", 13, 21),
    ]
    for found, row in each_row(cost_of(net, sites), random_gates(4, 21)):
        wide, narrow, last = (len(opened(part)) for part in row.split([7, 6, 8]))
        expected = measured(net.expand[0], 3, wide, 8) + measured(net.depthwise[0], wide, wide, 8, max(wide, 1))
        expected += measured(net.project, wide, narrow, 8) + measured(net.biased, narrow, narrow, 8, max(narrow, 1))
        assert found == expected + measured(net.last, narrow, last, 8) + 32


def test_gated_macs_with_depthwise_convolutions_that_have_no_gates():
    net = depthwise_net()
    sites = find_sites(net, IMAGES, lambda name, module: name in ("expand.0", "project"))
    for found, row in each_row(cost_of(net, sites), random_gates(4, 13)):
        wide, narrow = (len(opened(part)) for part in row.split([7, 6]))
        expected = measured(net.expand[0], 3, wide, 8)
        expected += measured(net.depthwise[0], wide, wide, 8, max(wide, 1))  # filters of zeros give a constant
        expected += measured(net.project, 7, narrow, 8)  # which its BatchNorm makes another than 0
        expected += measured(net.biased, narrow, narrow, 8, max(narrow, 1)) + measured(net.last, 6, 8, 8)
        assert found == expected + 32


def test_gated_macs_of_a_depthwise_convolution_with_gates_of_its_own():
    net = Net(
        lambda net, x: net.last(net.depthwise(net.first(x))),
        first=conv(3, 6),
        depthwise=conv(6, 6, groups=6, bias=False),
        last=conv(6, 8),
    ).eval()
    sites = [GateSite("first", "first", 0, 6), GateSite("depthwise", "depthwise", 6, 12)]
    for found, row in each_row(cost_of(net, sites), random_gates(4, 12)):
        first, own = (opened(part) for part in row.split([6, 6]))
        both = len(set(first) & set(own))
        expected = measured(net.first, 3, len(first), 8) + measured(net.depthwise, both, both, 8, max(both, 1))
        assert found == expected + measured(net.last, len(own), 8, 8) + 32


def test_gated_macs_with_grouped_convolutions():
    net = Net(
        lambda net, x: net.last(net.grouped(net.first(x).relu())),
        first=conv(3, 6),
        grouped=conv(6, 9, groups=3, stride=2),
        last=conv(9, 8, 1),
    ).eval()
    sites = find_sites(net, IMAGES, "all")
    for found, row in each_row(cost_of(net, sites), random_gates(4, 23)):
        first, grouped, last = row.split([6, 9, 8])
        expected = measured(net.first, 3, len(opened(first)), 8)
        for reads, writes in zip(first.split(2), grouped.split(3), strict=True):
            expected += measured(net.grouped, len(opened(reads)), len(opened(writes)), 8)
        assert found == expected + measured(net.last, len(opened(grouped)), len(opened(last)), 4) + 32


def test_gated_macs_follow_channels_through_concatenation_and_shuffle():
    net = Net(
        lambda net, x: net.last(
            torch.cat([net.one(x), net.two(x)], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        ),
        one=conv(3, 4),
        two=conv(3, 4),
        last=conv(8, 8, groups=4),
    ).eval()
    sites = find_sites(net, IMAGES, lambda name, module: name != "last")
    for found, row in each_row(cost_of(net, sites), random_gates(4, 8)):
        expected = measured(net.one, 3, len(opened(row[:4])), 8) + measured(net.two, 3, len(opened(row[4:])), 8)
        for group in range(4):  # reads one channel of each
            expected += measured(net.last, len(opened(row[[group, 4 + group]])), 2, 8)
        assert found == expected + 32


# --- As a function of gates


def small() -> CostModel:
    return cost_of(depthwise_net())


def test_cost_is_of_each_sample_and_not_of_mean_densities():
    net = Net(lambda net, x: net.two(net.one(x)), one=conv(3, 6), two=conv(6, 8)).eval()
    cost = cost_of(net)
    gates = torch.cat([torch.ones(1, 14), torch.zeros(1, 14)])
    assert cost(gates).tolist() == [cost.dense, 32]
    assert cost(gates).mean() > cost(gates.mean(0, keepdim=True)).item() + 1000
    rows = random_gates(5, 14)
    assert cost(rows).tolist() == [cost(row[None]).item() for row in rows]


def test_savings_are_what_closing_one_gate_saves():
    cost = small()
    one_closed = 1 - torch.eye(cost.num_gates)
    assert torch.equal(cost.savings(), cost.dense - cost(one_closed))
    assert cost(torch.ones(1, cost.num_gates)).item() == cost.dense
    assert (cost.savings() > 0).all()
    # an expanding filter: its own, the depthwise one, and its channel in what projects
    assert cost.savings()[0] == 64 * (3 + 9 + 6)
    assert cost.savings()[20] == 64 * 6


def test_gateable_share_is_what_all_closed_gates_save():
    cost = small()
    assert cost.gateable() == 1 - 32 / cost.dense  # all but the classifier
    net = create_backbone("resnet20_se").eval()
    few, many = (cost_of(net, find_sites(net, IMAGES, selection)).gateable() for selection in ("residual", "all"))
    assert 0 < few < many < 1


def test_cost_of_soft_gates_has_its_gradient():
    cost = small()
    gates = torch.rand(2, cost.num_gates, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gates: cost(gates) / 1000, gates)
    lower, upper = cost(gates.detach() - 0.1), cost(gates.detach() + 0.1)
    assert (lower < cost(gates)).all()
    assert (cost(gates) < upper).all()


def test_cost_counts_in_double_precision():
    net, images = create_backbone("torchvision:resnet18").eval(), torch.zeros(1, 3, 64, 64)
    cost = cost_of(net, find_sites(net, images, "all"), images)
    gates = torch.ones(1, cost.num_gates)
    gates[0, -1] = 0
    assert cost.dense - cost(gates).item() == 4 * 9 * 512
    assert cost(gates.bfloat16()).item() == cost(gates).item()


# --- count_macs


def gated(gater: nn.Module | None = None) -> GaterNet:
    torch.manual_seed(0)
    net = depthwise_net()
    features = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return GaterNet(net, gater or Gater(features, 5, 21, bottleneck=4), find_sites(net, IMAGES, "all")).eval()


def test_count_macs_counts_backbone_gater_and_each_images_gates():
    model, images = gated(), torch.rand(6, 3, 8, 8, generator=seeded(3)) * 20
    macs, gates = count_macs(model, images), model.gates(images)
    assert macs.backbone == count_dense_macs(model.ungate(), images)
    assert macs.gater == 3 * 3 * 9 * 3 * 5 + 5 * 4 + 4 * 21
    assert macs.gated.tolist() == cost_of(model.backbone)(gates).tolist()
    assert len(set(macs.gated.tolist())) > 1
    assert torch.equal(macs.total, macs.gated + macs.gater)
    assert all(0 < gated < macs.backbone for gated in macs.gated.tolist())


def test_count_macs_of_open_gates_is_the_plain_backbones():
    class OpenGater(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.ones(len(images), 21)

    macs = count_macs(gated(OpenGater()), IMAGES)
    assert macs.gated.tolist() == [macs.backbone] * 2
    assert macs.gater == 0


def test_count_macs_leaves_the_model_as_it_was():
    model = gated().train()
    model.backbone.eval()
    before = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    count_macs(model, IMAGES)
    assert [module.training for module in model.modules()] == before
    assert any(name.startswith("gater") and name.endswith("running_mean") for name in state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert torch.equal(count_macs(model, IMAGES).gated, count_macs(model, IMAGES).gated)


def by_image(net: Any, x: Tensor) -> Tensor:
    """A convolution of its own for each image, run as groups: CondConv's trick."""
    y = net.first(x)
    weights = net.weight.repeat(len(x), 1, 1, 1)
    return F.conv2d(y.reshape(1, -1, 8, 8), weights, padding=1, groups=len(x)).unflatten(1, (len(x), 8))[0]


@pytest.mark.parametrize("batch", [2, 3])
def test_images_folded_into_groups_save_no_more_than_one_image_does(batch):
    net = Net(by_image, first=conv(3, 6), weight=nn.Parameter(torch.rand(8, 6, 3, 3))).eval()
    sites = find_sites(net, IMAGES, "all")
    expected = cost_of(net, sites).gateable()  # from one image
    assert 0 < cost_of(net, sites, torch.zeros(batch, 3, 8, 8)).gateable() <= expected <= 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_savings_are_the_same_without_gradients(mode):
    cost = small()
    expected = cost.savings()
    with mode():
        assert torch.equal(cost.savings(), expected)


@pytest.mark.usefixtures("unchecked_types")
def test_gates_of_another_number_are_refused():
    for gates in (torch.ones(1, 22), torch.ones(1, 20), torch.ones(21)):
        with pytest.raises(ValueError, match=r"gates must be \(B, 21\), a column per gate, but are"):
            cost_of(gated().ungate())(gates)


def test_attention_layers_are_counted():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), Transposed(), layer).eval()
    tokens, width = 4, 16
    linear = tokens * (width * 3 * width + width * width + 2 * width * 32)
    assert count_dense_macs(net, IMAGES) == tokens * 3 * 16 * width + linear + 2 * tokens * tokens * width
    assert torch.backends.mha.get_fastpath_enabled()


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@given(
    terms=st.lists(st.lists(st.sampled_from([ALIVE, *range(6)]), min_size=1, max_size=9), max_size=4),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_sums_of_runs_are_those_of_single_columns(terms, seed):
    """However often a column comes, and in whatever order."""
    gates = torch.rand(3, 7, dtype=torch.float64, generator=seeded(seed))
    gates[:, ALIVE] = 1
    runs = _Runs.of([torch.tensor(term) for term in terms], 7).to(gates.device, gates.dtype)
    found = runs.sums(F.pad(gates.cumsum(1), (1, 0)))
    expected = torch.stack([gates[:, term].sum(1) for term in terms], 1) if terms else gates[:, :0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
