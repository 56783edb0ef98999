"""Which gate decides each channel that a convolution reads: by hand, and as the network computes it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import IMAGES, Block, Net, conv, norm, squeeze_excite
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.channels import ALIVE, contiguous, gate_columns
from gaternet.cost import CostModel
from gaternet.graph import op, read_graph
from gaternet.method import Gater, GaterNet, GateSite

A, B = [0, 1, 2, 3], [4, 5, 6, 7]  # columns of the filters of net.a and of net.b
NONE = [ALIVE] * 4
SITES = [GateSite("a", "a", 0, 4), GateSite("b", "b", 4, 8)]
Body = Callable[[Any, Tensor, Tensor], Tensor]


def reader(body: Body, channels: int = 4, **parts: nn.Module | Tensor) -> Net:
    """A network in which convolution `end` reads what `body` makes of two gated ones; `side` reads both as they are."""

    def run(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        side = net.side(torch.cat([a, b], 1))
        return side + net.end(body(net, a, b)).mean((2, 3), keepdim=True)[: len(x)]

    torch.manual_seed(0)
    ends = {"a": conv(3, 4), "b": conv(3, 4), "end": conv(channels, 8), "side": conv(8, 8)}
    return Net(run, **ends, **parts).eval()


def columns_read(net: nn.Module, name: str = "end", sites: list[GateSite] = SITES) -> list[int]:
    graph = read_graph(net, IMAGES)
    (read,) = (found for found in graph.convs.values() if found.name == name)
    return gate_columns(graph, sites).of(read.source).tolist()


def columns_computed(net: nn.Module) -> list[int]:
    """The same, seen in what `end` really reads when each gate is closed by itself."""
    gater = Gater(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, 8, batch_norm=False)
    model, seen = GaterNet(net, gater, SITES).eval(), []
    handle = net.get_submodule("end").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for column in range(8):
        gates = torch.ones(2, 8)
        gates[:, column] = 0
        model.forward_gated(IMAGES, gates)
    handle.remove()
    model.ungate()
    zeros = torch.stack([(read == 0).transpose(0, 1).flatten(1).all(1) for read in seen])  # (8, channels)
    assert (zeros.sum(0) <= 1).all()
    return [rows.index(True) if any(rows) else ALIVE for rows in zeros.T.tolist()]


def windows(x: Tensor) -> Tensor:
    """(B, C, 8, 8) -> (4 B, C, 4, 4)"""
    return x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


EXACT: dict[str, tuple[Net, list[int]]] = {
    "itself": (reader(lambda net, a, b: a), A),
    "the other": (reader(lambda net, a, b: b), B),
    "relu": (reader(lambda net, a, b: a.relu()), A),
    "relu in place": (reader(lambda net, a, b: F.relu(a * 2, inplace=True)), A),
    "gelu, silu, hardswish": (reader(lambda net, a, b: F.hardswish(F.silu(F.gelu(a)))), A),
    "prelu": (reader(lambda net, a, b: net.act(a), act=nn.PReLU(4)), A),
    "relu6": (reader(lambda net, a, b: F.relu6(a)), A),
    "leaky_relu, rrelu": (reader(lambda net, a, b: F.rrelu(F.leaky_relu(a))), A),
    "clamp around 0": (reader(lambda net, a, b: a.clamp(-0.1, 0.1)), A),
    "clamp above 0": (reader(lambda net, a, b: a.clamp(min=0.1)), NONE),
    "clamp below 0": (reader(lambda net, a, b: a.clamp(max=-0.1)), NONE),
    "sigmoid": (reader(lambda net, a, b: a.sigmoid()), NONE),
    "hardsigmoid": (reader(lambda net, a, b: F.hardsigmoid(a)), NONE),
    "softplus": (reader(lambda net, a, b: F.softplus(a)), NONE),
    "exp": (reader(lambda net, a, b: a.exp()), NONE),
    "softmax": (reader(lambda net, a, b: a.softmax(1)), NONE),
    "dropout": (reader(lambda net, a, b: net.drop(a), drop=nn.Dropout2d()), A),
    "max pooling": (reader(lambda net, a, b: F.max_pool2d(a, 3, 2, 1)), A),
    "average pooling": (reader(lambda net, a, b: F.avg_pool2d(a, 2)), A),
    "global pooling": (reader(lambda net, a, b: F.adaptive_avg_pool2d(a, 1)), A),
    "mean": (reader(lambda net, a, b: a.mean((2, 3), keepdim=True)), A),
    "mean of the last two": (reader(lambda net, a, b: a.mean((-2, -1), keepdim=True)), A),
    "mean over as many channels as rows": (reader(lambda net, a, b: F.avg_pool2d(a, 2).mean(1).unsqueeze(3)), NONE),
    "mean over channels": (reader(lambda net, a, b: a.mean(1, keepdim=True).expand(-1, 4, -1, -1)), NONE),
    "upsampling": (reader(lambda net, a, b: F.interpolate(F.interpolate(a, scale_factor=2.0), (5, 5))), A),
    "bilinear": (reader(lambda net, a, b: F.interpolate(a, (5, 5), mode="bilinear")), A),
    "zero padding": (reader(lambda net, a, b: F.pad(a, (1, 2, 0, 1))), A),
    "reflection": (reader(lambda net, a, b: F.pad(a, (1, 1, 1, 1), "reflect")), A),
    "padding with ones": (reader(lambda net, a, b: F.pad(a, (1, 1, 1, 1), value=1.0)), NONE),
    "cat": (reader(lambda net, a, b: torch.cat([b, a], 1), 8), B + A),
    "cat with an image": (
        reader(
            lambda net, a, b: torch.cat([a, net.image.expand(len(a), -1, -1, -1)], 1), 5, image=torch.ones(1, 1, 8, 8)
        ),
        [*A, ALIVE],
    ),
    "cat of pixels": (reader(lambda net, a, b: torch.cat([a, a], 2)), A),
    "cat of pixels of different gates": (reader(lambda net, a, b: torch.cat([a, b], 3)), NONE),
    "activated pixels of different gates": (reader(lambda net, a, b: torch.cat([a, b], 3).tanh()), NONE),
    "stacked as a larger batch": (reader(lambda net, a, b: torch.cat([a, b]).relu().chunk(2)[1]), B),
    "slice": (reader(lambda net, a, b: a[:, 1:3], 2), [1, 2]),
    "split": (reader(lambda net, a, b: torch.cat(a.split([1, 3], 1)[::-1], 1)), [1, 2, 3, 0]),
    "chunk": (reader(lambda net, a, b: torch.cat([a.chunk(2, 1)[1], b.chunk(2, 1)[0]], 1)), [2, 3, 4, 5]),
    "unbind": (reader(lambda net, a, b: torch.cat([c.unsqueeze(1) for c in a.unbind(1)[::-1]], 1)), [3, 2, 1, 0]),
    "roll": (reader(lambda net, a, b: a.roll(1, 1)), [3, 0, 1, 2]),
    "shuffle": (reader(lambda net, a, b: a.view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(-1, 4, 8, 8)), [0, 2, 1, 3]),
    "ChannelShuffle": (
        reader(lambda net, a, b: net.mix(torch.cat([a, b], 1)), 8, mix=nn.ChannelShuffle(2)),
        [0, 4, 1, 5, 2, 6, 3, 7],
    ),
    "pixel unshuffle": (reader(lambda net, a, b: F.pixel_unshuffle(a, 2), 16), [c for c in A for _ in range(4)]),
    "pixel shuffle": (reader(lambda net, a, b: F.pixel_shuffle(torch.cat([a, b], 1), 2), 2), [ALIVE] * 2),
    "permuted and back": (reader(lambda net, a, b: a.permute(0, 2, 3, 1).permute(0, 3, 1, 2)), A),
    "swapped with rows": (reader(lambda net, a, b: a.transpose(1, 2), 8), [ALIVE] * 8),
    "scaled": (reader(lambda net, a, b: a * 3 / net.by, by=torch.full((4, 1, 1), 2.0)), A),
    "what it divides": (reader(lambda net, a, b: net.by / a, by=torch.full((4, 1, 1), 2.0)), NONE),
    "to the power of 2": (reader(lambda net, a, b: a.pow(2.0)), A),
    "to the power of 0": (reader(lambda net, a, b: a.pow(0)), NONE),
    "to the power of -2": (reader(lambda net, a, b: a.pow(-2)), NONE),
    "shifted": (reader(lambda net, a, b: a + 1), NONE),
    "SE": (reader(lambda net, a, b: net.se(a.relu()), se=squeeze_excite(4)), A),
    "mask": (reader(lambda net, a, b: net.mask(b).sigmoid() * a, mask=conv(4, 1)), A),
    "times sigmoid of the other": (reader(lambda net, a, b: b.sigmoid() * a), A),
    "sum of different gates": (reader(lambda net, a, b: a + b), NONE),
    "sum in place": (reader(lambda net, a, b: (a * 1).add_(b)), NONE),
    "sum of the same gates": (reader(lambda net, a, b: a + F.avg_pool2d(a, 3, 1, 1)), A),
    "difference of the same gates": (reader(lambda net, a, b: F.max_pool2d(a, 3, 1, 1) - a), A),
    "sum of some same gates": (
        reader(lambda net, a, b: torch.cat([a[:, :2], b[:, 2:]], 1) + a.tanh()),
        [0, 1, ALIVE, ALIVE],
    ),
    "maximum of different gates": (reader(lambda net, a, b: torch.maximum(a, b)), NONE),
    "maximum of the same gates": (reader(lambda net, a, b: torch.maximum(a, -a)), A),
    "depthwise": (reader(lambda net, a, b: net.depthwise(a), depthwise=conv(4, 4, groups=4, bias=False)), A),
    "depthwise with bias": (reader(lambda net, a, b: net.depthwise(a), depthwise=conv(4, 4, groups=4)), NONE),
    "grouped": (reader(lambda net, a, b: net.grouped(a), grouped=conv(4, 4, groups=2, bias=False)), NONE),
    "conv": (reader(lambda net, a, b: net.mix(a), mix=conv(4, 4, bias=False)), NONE),
    "BatchNorm": (reader(lambda net, a, b: net.bn(a), bn=norm(4)), NONE),
    "GroupNorm": (reader(lambda net, a, b: net.gn(a), gn=nn.GroupNorm(2, 4)), NONE),
}
CAUTIOUS: dict[str, tuple[Net, list[int]]] = {  # zeros that are not claimed
    "windows": (reader(lambda net, a, b: windows(a)), NONE),
    "images behind each other": (reader(lambda net, a, b: a.flatten(0, 1).unflatten(0, (4, 2))[:, [0, 1, 0, 1]]), NONE),
    "product of different gates": (reader(lambda net, a, b: a * b), A),
    "padding of channels": (reader(lambda net, a, b: F.pad(a, (0, 0, 0, 0, 1, 1)), 6), [ALIVE] * 6),
    "padding that moves channels": (reader(lambda net, a, b: F.pad(a, (0, 0, 0, 0, 1, -1))), NONE),
    "stack": (reader(lambda net, a, b: torch.stack(a.unbind(1), 1)), NONE),
    "flip": (reader(lambda net, a, b: a.flip(1)), NONE),
    "picked by index": (reader(lambda net, a, b: a[:, [0, 2]], 2), [ALIVE] * 2),
    "two filters a channel": (
        reader(lambda net, a, b: net.depthwise(a), 8, depthwise=conv(4, 8, groups=4, bias=False)),
        [ALIVE] * 8,
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_columns_are_those_that_the_network_computes(case):
    net, expected = EXACT[case]
    assert columns_read(net) == expected
    assert columns_computed(net) == expected


@pytest.mark.parametrize("case", CAUTIOUS)
def test_what_is_not_followed_is_alive(case):
    net, expected = CAUTIOUS[case]
    assert columns_read(net) == expected


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_windows_are_no_images_whatever_the_example_batch(batch):
    net = reader(lambda net, a, b: windows(a))
    graph = read_graph(net, torch.zeros(batch, 3, 8, 8))
    (read,) = (found for found in graph.convs.values() if found.name == "end")
    assert gate_columns(graph, SITES).of(read.source).tolist() == NONE


@pytest.mark.parametrize("flatten", [lambda x: x.flatten(1), lambda x: x.view(len(x), 4 * 64)])
def test_flattening_repeats_each_column_for_each_pixel(flatten):
    net = Block(lambda net, x: net.fc(flatten(net.a(x))), a=conv(3, 4), fc=nn.Linear(256, 4))
    graph = read_graph(net, IMAGES)
    flow = gate_columns(graph, SITES[:1])
    (linear,) = (node for node in graph.nodes if op(node) == "linear")
    assert flow.of(graph.sources(linear)[0]).tolist() == [column for column in A for _ in range(64)]
    assert flow.of(linear).tolist() == NONE


def test_gates_begin_behind_the_module_of_their_site():
    net = Net(lambda net, x: net.end(net.bn(net.a(x)).relu()), a=conv(3, 4), bn=norm(4), end=conv(4, 8))
    assert columns_read(net, sites=[GateSite("bn", "a", 0, 4)]) == A
    assert columns_read(net, sites=[GateSite("a", "a", 0, 4)]) == NONE
    assert columns_read(net, "a", [GateSite("bn", "a", 0, 4)]) == [ALIVE] * 3


def test_sites_may_share_columns():
    net = Net(lambda net, x: net.end(net.bn(net.b(net.a(x)))), a=conv(3, 4), b=conv(4, 4), bn=norm(4), end=conv(4, 8))
    sites = [GateSite("a", "a", 0, 4), GateSite("bn", "b", 0, 4)]
    assert columns_read(net, "b", sites) == A
    assert columns_read(net, "end", sites) == A
    cost = CostModel(read_graph(net, IMAGES[:1]), sites)
    assert cost(torch.tensor([[1.0, 0.0, 1.0, 0.0]])).item() == (3 * 2 + 2 * 2 + 2 * 8) * 9 * 64 + 32


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (Net(lambda net, x: net.two(net.one(net.one(x))), one=conv(3, 3), two=conv(3, 8)), "one"),
        (Net(lambda net, x: net.two(x), one=conv(3, 3), two=conv(3, 8)), "one"),
        (Net(lambda net, x: net.two(x), two=conv(3, 8)), "three"),
    ],
    ids=["twice", "never", "unknown"],
)
def test_a_site_that_does_not_run_once_is_refused_by_name(net, name):
    with pytest.raises(
        ValueError, match=f"site {name} does not run exactly once here, or does not give out one tensor"
    ):
        gate_columns(read_graph(net, IMAGES), [GateSite(name, name, 0, 3)])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([3, 4, 5], (3, 6, 1)),
        ([0], (0, 1, 1)),
        ([2, 2, 3, 3], (2, 4, 2)),
        ([2, 2, 3], None),
        ([4, 3], None),
        ([1, 3], None),
        ([ALIVE, 0], None),
        ([ALIVE, ALIVE], None),
    ],
)
def test_columns_in_order_are_a_slice_that_may_repeat(columns, expected):
    assert contiguous(torch.tensor(columns)) == expected


# --- What cannot be followed counts as alive


def in_place_on_a_part(net: Any, a: Tensor, b: Tensor) -> Tensor:
    a = a * 1
    a[:, :2] += 1
    return a


def in_place_on_filters(net: Any, a: Tensor, b: Tensor) -> Tensor:
    a.detach().add_(1)
    return a


def written_behind_a_view(net: Any, a: Tensor, b: Tensor) -> Tensor:
    a = a * 1
    view = a[:, :2]
    a += 1
    return torch.cat([view, view], 1)


def written_through_detach(net: Any, a: Tensor, b: Tensor) -> Tensor:
    a = a * 1
    a.detach().add_(1)
    return a


def written_in_a_list(net: Any, a: Tensor, b: Tensor) -> Tensor:
    a = a * 1
    torch._foreach_add_([a], 1.0)  # pyright: ignore[reportPrivateImportUsage]
    return a


WRITTEN = [in_place_on_a_part, in_place_on_filters, written_behind_a_view, written_through_detach, written_in_a_list]


@pytest.mark.parametrize("body", WRITTEN)
def test_a_tensor_that_is_changed_through_another_is_alive(body):
    net = reader(body)
    assert columns_read(net) == [ALIVE] * 4
    assert columns_computed(net)[:2] == [ALIVE] * 2


def test_parts_of_a_split_are_not_changed_through_each_other():
    def body(net: Any, a: Tensor, b: Tensor) -> Tensor:
        one, two = (a * 1).chunk(2, 1)
        one += 1
        return torch.cat([one, two], 1)

    with torch.no_grad():
        net = reader(body)
        assert not read_graph(net, IMAGES).rewritten
        assert columns_read(net) == columns_computed(net) == [ALIVE, ALIVE, 2, 3]


def test_a_view_that_takes_its_shape_from_a_buffer_is_alive():
    net = reader(lambda net, a, b: a.mean((2, 3), keepdim=True).expand_as(net.like), like=torch.zeros(2, 4, 8, 8))
    assert columns_read(net) == [ALIVE] * 4
