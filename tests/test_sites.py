"""Which filters get gates, where, and why the others get none; random networks keep what gating promises."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import check_dead_channels, check_gates, small_gater_net, unsettle_
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import IMAGES, Block, FusedNorm, Net, conv, norm, squeeze_excite
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from gaternet import find_sites
from gaternet.cost import CostModel
from gaternet.graph import read_graph
from gaternet.method import GateSite
from gaternet.models.cifar_resnet import CifarResNet, residual_sites
from gaternet.models.create import create_backbone
from gaternet.sites import Selection, SiteReport, examine


def listed(net: nn.Module, selection: Selection = "residual") -> list[tuple[str, str, int, int, str]]:
    """(name, conv, start, stop, role) of each site."""
    return [(s.name, s.conv, s.start, s.stop, s.role) for s in find_sites(net, IMAGES, selection)]


def reasons(net: nn.Module, selection: Selection = "all") -> dict[str, str]:
    return examine(read_graph(net, IMAGES), selection).left_out


# --- The paper's networks


@pytest.mark.parametrize("name", ["resnet20", "resnet20_se", "resnet164"])
def test_residual_sites_are_those_of_the_published_models(name):
    net = create_backbone(name)
    assert isinstance(net, CifarResNet)
    assert find_sites(net, IMAGES) == residual_sites(net)


@pytest.mark.parametrize(("name", "gates"), [("resnet34", 3776), ("resnet101", 32512)])
def test_imagenet_resnets_have_as_many_gates_as_in_the_paper(name, gates):
    sites = find_sites(create_backbone(f"torchvision:{name}"), torch.zeros(1, 3, 64, 64))
    assert sites[-1].stop == gates
    assert {site.role for site in sites} == {"residual"}


# --- Units


def with_stem(unit: nn.Module) -> Net:
    """Reads the image with a convolution of 8 filters; what it gives is used by whatever the unit holds first."""
    return Net(lambda net, x: net.unit(net.stem(x)), stem=conv(3, 8), unit=unit)


def basic(body: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> Net:
    """A unit whose body begins with block.inner: convolution of 6 filters, BatchNorm and ReLU."""
    inner = nn.Sequential(conv(8, 6), norm(6), nn.ReLU())
    return with_stem(Block(body, inner=inner, **parts))


BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).expand(8, 1, 3, 3) / 16
STEM = ("stem", "stem", 0, 8, "inner")
INNER = ("unit.inner.1", "unit.inner.0", 8, 14, "inner")
LAST = ("unit.bn", "unit.conv", 14, 22, "residual")
BRANCH = {
    "first": nn.Sequential(nn.ReLU(), conv(8, 5), norm(5), nn.ReLU(), conv(5, 8), norm(8)),
    "second": nn.Sequential(nn.ReLU(), conv(8, 5), norm(5), nn.ReLU(), conv(5, 8), norm(8)),
}
UNITS: dict[str, tuple[Net, list[tuple[str, str, int, int, str]]]] = {
    "plain": (
        basic(lambda u, x: (x + u.bn(u.conv(u.inner(x)))).relu(), conv=conv(6, 8), bn=norm()),
        [STEM, INNER, LAST],
    ),
    "SE": (
        basic(lambda u, x: x + u.se(u.bn(u.conv(u.inner(x)))), conv=conv(6, 8), bn=norm(), se=squeeze_excite()),
        [STEM, INNER, LAST],
    ),
    "dropout and stochastic depth": (
        basic(
            lambda u, x: x + u.depth(u.drop(u.bn(u.conv(u.inner(x))))),
            conv=conv(6, 8),
            bn=norm(),
            drop=nn.Dropout2d(0.5),
            depth=StochasticDepth(0.5, "row"),
        ),
        [STEM, INNER, LAST],
    ),
    "layer scale": (
        basic(
            lambda u, x: x + u.scale * u.bn(u.conv(u.inner(x))),
            conv=conv(6, 8),
            bn=norm(),
            scale=nn.Parameter(torch.rand(8, 1, 1)),
        ),
        [STEM, INNER, LAST],
    ),
    "blur behind the BatchNorm": (
        basic(
            lambda u, x: x + F.conv2d(u.bn(u.conv(u.inner(x))), u.blur, padding=1, groups=8),
            conv=conv(6, 8),
            bn=norm(),
            blur=BLUR,
        ),
        [STEM, INNER, LAST],
    ),
    "blur before the BatchNorm": (
        basic(
            lambda u, x: x + u.bn(F.conv2d(u.conv(u.inner(x)), u.blur, padding=1, groups=8)),
            conv=conv(6, 8),
            bn=norm(),
            blur=BLUR,
        ),
        [STEM, INNER, LAST],
    ),
    "pre-activation": (
        with_stem(
            Block(
                lambda u, x: x + u.conv2(u.bn2(u.conv1(u.bn1(x).relu())).relu()),
                bn1=norm(),
                conv1=conv(8, 6),
                bn2=norm(6),
                conv2=conv(6, 8),
            )
        ),
        [STEM, ("unit.bn2", "unit.conv1", 8, 14, "inner"), ("unit.conv2", "unit.conv2", 14, 22, "residual")],
    ),
    "projection": (
        basic(
            lambda u, x: u.bn(u.conv(u.inner(x))) + u.shortcut(x),
            shortcut=nn.Sequential(conv(8, 8, 1), norm()),
            conv=conv(6, 8),
            bn=norm(),
        ),
        [STEM, INNER, LAST, ("unit.shortcut.1", "unit.shortcut.0", 22, 30, "shortcut")],
    ),
    "two branches": (
        with_stem(Block(lambda u, x: x + (u.first(x) + u.second(x)), **BRANCH)),
        [
            STEM,
            ("unit.first.2", "unit.first.1", 8, 13, "inner"),
            ("unit.first.5", "unit.first.4", 13, 21, "residual"),
            ("unit.second.2", "unit.second.1", 21, 26, "inner"),
            ("unit.second.5", "unit.second.4", 26, 34, "residual"),
        ],
    ),
    "bottleneck with fused norms": (
        with_stem(
            Block(
                lambda u, x: F.relu(x + u.bn3(u.conv3(u.bn2(u.conv2(u.bn1(u.conv1(x))))))),
                conv1=conv(8, 4, 1),
                bn1=FusedNorm(4),
                conv2=conv(4, 5),
                bn2=FusedNorm(5),
                conv3=conv(5, 8, 1),
                bn3=norm(),
            )
        ),
        [
            STEM,
            ("unit.bn1", "unit.conv1", 8, 12, "inner"),
            ("unit.bn2", "unit.conv2", 12, 17, "inner"),
            ("unit.bn3", "unit.conv3", 17, 25, "residual"),
        ],
    ),
    "densely connected": (
        Net(
            lambda net, x: net.third(net.second(net.first(net.stem(x)))),
            stem=conv(3, 2),
            first=Block(lambda u, x: torch.cat([x, u.conv(u.bn(x).relu())], 1), bn=norm(2), conv=conv(2, 3)),
            second=Block(lambda u, x: torch.cat([x, u.conv(u.bn(x).relu())], 1), bn=norm(5), conv=conv(5, 3)),
            third=conv(8, 8, 1),
        ),
        [
            ("stem", "stem", 0, 2, "inner"),
            ("first.conv", "first.conv", 2, 5, "dense"),
            ("second.conv", "second.conv", 5, 8, "dense"),
            ("third", "third", 8, 16, "inner"),
        ],
    ),
}


@pytest.mark.parametrize("unit", UNITS)
def test_sites_of_a_unit(unit):
    net, expected = UNITS[unit]
    assert listed(net, "all") == expected
    role = "dense" if unit == "densely connected" else "residual"
    last = [(name, conv, role) for name, conv, _, _, role_ in expected if role_ == role]
    found = listed(net, "residual")
    assert [(name, conv, role) for name, conv, _, _, role in found] == last
    assert [start for _, _, start, _, _ in found] == [0, *(stop for _, _, _, stop, _ in found[:-1])]
    widths = [len(net.get_parameter(f"{conv}.weight")) for _, conv, *_ in found]
    assert [stop - start for _, _, start, stop, _ in found] == widths


@pytest.mark.parametrize("unit", UNITS)
def test_sites_of_a_unit_keep_what_gating_promises(unit):
    check_promises(UNITS[unit][0], "residual", "all")


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


def test_the_papers_rule_says_why_the_others_have_no_gates():
    assert reasons(UNITS["plain"][0], "residual") == dict.fromkeys(
        ["stem", "unit.inner.0"], "it is not the last convolution of a residual unit"
    )
    assert reasons(UNITS["densely connected"][0], "residual") == dict.fromkeys(
        ["stem", "third"], "it is not the last convolution of a densely connected unit"
    )


def vgg() -> Net:
    layers = [conv(3, 5), norm(5), nn.ReLU(), conv(5, 6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8), norm(), nn.ReLU()]
    return Net(lambda net, x: net.layers(x), layers=nn.Sequential(*layers))


def inception() -> Net:
    return Net(
        lambda net, x: torch.cat([net.first(x), net.second(F.max_pool2d(x, 3, 1, 1))], 1),
        first=nn.Sequential(conv(3, 5), norm(5), nn.ReLU()),
        second=nn.Sequential(conv(3, 3, 1), norm(3), nn.ReLU()),
    )


@pytest.mark.parametrize("selection", ["residual", "all"])
def test_networks_without_units_have_gates_at_every_convolution(selection):
    assert listed(vgg(), selection) == [
        ("layers.1", "layers.0", 0, 5, "inner"),
        ("layers.3", "layers.3", 5, 11, "inner"),
        ("layers.7", "layers.6", 11, 19, "inner"),
    ]
    assert listed(inception(), selection) == [
        ("first.1", "first.0", 0, 5, "inner"),
        ("second.1", "second.0", 5, 8, "inner"),
    ]


# --- Columns


def inverted_residual() -> Net:
    """Expands to 12 channels, filters each by itself, and projects: MobileNetV2's unit."""
    return with_stem(
        Block(
            lambda u, x: x + u.project(u.depthwise(u.expand(x))),
            project=nn.Sequential(conv(12, 8, 1), norm()),  # in another order than they run
            depthwise=nn.Sequential(conv(12, 12, groups=12), norm(12), nn.ReLU6()),
            expand=nn.Sequential(conv(8, 12, 1), norm(12), nn.ReLU6()),
        )
    )


def test_a_depthwise_convolution_shares_the_gates_of_the_filters_that_it_reads():
    assert listed(inverted_residual(), "all") == [
        STEM,
        ("unit.expand.1", "unit.expand.0", 8, 20, "inner"),
        ("unit.depthwise.1", "unit.depthwise.0", 8, 20, "depthwise"),
        ("unit.project.1", "unit.project.0", 20, 28, "residual"),
    ]


def test_a_depthwise_convolution_has_gates_of_its_own_where_its_input_has_none():
    assert listed(inverted_residual(), lambda name, module: not name.startswith("unit.expand")) == [
        STEM,
        ("unit.depthwise.1", "unit.depthwise.0", 8, 20, "inner"),
        ("unit.project.1", "unit.project.0", 20, 28, "residual"),
    ]
    behind_a_sum = Net(
        lambda net, x: net.depthwise(net.first(x) + net.second(x)),
        first=conv(3, 8),
        second=conv(3, 8),
        depthwise=conv(8, 8, groups=8),
    )
    assert listed(behind_a_sum, "all")[-1] == ("depthwise", "depthwise", 16, 24, "inner")
    of_the_image = Net(lambda net, x: net.last(net.depthwise(x)), depthwise=conv(3, 3, groups=3), last=conv(3, 8))
    assert listed(of_the_image, "all")[0] == ("depthwise", "depthwise", 0, 3, "inner")


def test_a_predicate_picks_by_name_and_module():
    net = UNITS["bottleneck with fused norms"][0]
    asked: dict[str, nn.Module] = {}

    def small(name: str, module: nn.Module) -> bool:
        asked[name] = module
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)

    assert listed(net, small) == [
        ("unit.bn1", "unit.conv1", 0, 4, "inner"),
        ("unit.bn3", "unit.conv3", 4, 12, "residual"),
    ]
    convs = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert asked == convs
    assert reasons(net, small) == dict.fromkeys(["stem", "unit.conv2"], "the predicate does not pick it")


def test_sites_stand_in_the_order_in_which_they_run():
    net = Net(lambda net, x: net.a(net.b(net.c(x))), a=conv(6, 8), b=conv(5, 6), c=conv(3, 5))
    assert [name for name, *_ in listed(net)] == ["c", "b", "a"]
    assert find_sites(net, IMAGES)[0] == GateSite("c", "c", 0, 5, "inner")


def test_reading_sites_changes_nothing():
    net = UNITS["SE"][0]
    before = copy.deepcopy(net.state_dict())
    assert listed(net) == listed(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


# --- What is left out


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(Block):
    """Every pixel looks at every pixel."""

    def __init__(self) -> None:
        super().__init__(attend, q=conv(8, 8, 1), k=conv(8, 8, 1), v=conv(8, 8, 1), out=conv(8, 8, 1))


def attend(block: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).flatten(2) for part in (block.q, block.k, block.v))  # (B, 8, H W)
    weights = (q.transpose(1, 2) @ k).softmax(-1)  # (B, H W, H W)
    return block.out((v @ weights).reshape(x.shape))


def in_windows(block: Any, x: Tensor) -> Tensor:
    """The convolution sees windows of 4 by 4 pixels as images of their own."""
    b, c, h, w = x.shape
    windows = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
    windows = block.conv(windows).reshape(b, h // 4, w // 4, c, 4, 4)
    return windows.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def shared_weights() -> Net:
    net = Net(lambda net, x: net.two(net.one(net.stem(x)).relu()), stem=conv(3, 8), one=conv(8, 8), two=conv(8, 8))
    net.two.weight = net.one.weight
    return net


POOLED = "it acts on pooled features: there is nothing to save"
SHARED = "it shares its weights with another layer"
ATTENTION = "it is part of an attention block, Attention"
LEFT_OUT: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "GroupNorm": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x)), conv=conv(8, 8), norm=nn.GroupNorm(2, 8))),
        {"unit.conv": "GroupNorm behind it mixes channels"},
    ),
    "GroupNorm behind an activation": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x).relu()), conv=conv(8, 8), norm=nn.GroupNorm(2, 8))),
        {"unit.conv": "GroupNorm behind it mixes channels"},
    ),
    "LayerNorm": (
        with_stem(Block(lambda u, x: u.norm(u.conv(x)), conv=conv(8, 8), norm=LayerNorm2d(8))),
        {"unit.conv": "LayerNorm2d behind it mixes channels"},
    ),
    "conv run twice": (
        with_stem(Block(lambda u, x: u.conv(u.conv(x + u.bn(x)).relu()), bn=norm(), conv=conv(8, 8))),
        {"unit.conv": "it runs 2 times"},
    ),
    "shared weights": (shared_weights(), {"one": SHARED, "two": SHARED}),
    "function": (
        with_stem(Block(lambda u, x: F.conv2d(x, u.weight), weight=nn.Parameter(torch.rand(8, 8, 1, 1)))),
        {"conv2d_1": "a function computes it within Block, not an nn.Conv2d"},
    ),
    "attention": (
        with_stem(Block(lambda u, x: u.bn(x) + u.attention(u.bn(x)), bn=norm(), attention=Attention())),
        {f"unit.attention.{name}": ATTENTION for name in ["q", "k", "v", "out"]},
    ),
    "attention in the root": (
        Net(lambda net, x: attend(net, net.stem(x)), stem=conv(3, 8), **dict(Attention().named_children())),
        dict.fromkeys("qkv", "it leads into attention"),
    ),
    "sigmoid weights": (
        with_stem(Block(lambda u, x: x * u.conv(x).sigmoid(), conv=conv(8, 8))),
        {"unit.conv": "it computes weights between 0 and 1, not features"},
    ),
    "mask of one channel": (
        with_stem(Block(lambda u, x: x * u.norm(u.conv(x)).sigmoid(), conv=conv(8, 1), norm=norm(1))),
        {"unit.conv": "it computes weights between 0 and 1, not features"},
    ),
    "SE": (with_stem(squeeze_excite()), {"unit.fc1": POOLED, "unit.fc2": POOLED}),
    "outputs": (
        Block(lambda net, x: net.head(net.stem(x).relu()).mean((2, 3)), stem=conv(3, 8), head=conv(8, 4, 1)),
        {"head": "its filters are the network's outputs"},
    ),
    "outputs, pooled first": (
        Block(
            lambda net, x: net.head(F.adaptive_avg_pool2d(net.stem(x), 1)).flatten(1).log_softmax(1),
            stem=conv(3, 8),
            head=conv(8, 4, 1),
        ),
        {"head": POOLED},
    ),
    "windows": (
        with_stem(Block(in_windows, conv=conv(8, 8))),
        {"unit.conv": "it runs on parts of images, such as windows, stacked as a larger batch"},
    ),
    "functional BatchNorm": (
        with_stem(
            Block(
                lambda u, x: x + F.batch_norm(u.conv(x), u.mean, u.variance),
                conv=conv(8, 8),
                mean=torch.zeros(8),
                variance=torch.ones(8),
            )
        ),
        {"unit.conv": "batch_norm behind it is a function within Block: make it a module"},
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_filters_whose_closing_would_not_be_exact_are_left_out_with_the_reason(case):
    net, expected = LEFT_OUT[case]
    assert reasons(net) == expected
    convs = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert {conv for _, conv, *_ in listed(net, "all")} == convs - expected.keys()


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_not_left_out_keeps_what_gating_promises(case):
    check_promises(LEFT_OUT[case][0], "all")


def test_a_functional_norm_is_gated_where_its_block_gives_out_nothing_else():
    unit = Block(
        lambda u, x: F.batch_norm(u.conv(x), u.mean, u.variance).relu(),
        conv=conv(8, 8),
        mean=torch.ones(8),
        variance=torch.ones(8),
    )
    assert listed(with_stem(unit), "all") == [STEM, ("unit", "unit.conv", 8, 16, "inner")]
    check_promises(with_stem(unit), "all")


# --- Errors


def branching() -> Net:
    return Net(lambda net, x: net.conv(x) if x.sum() > 0 else net.conv(-x), conv=conv(3, 8))


def test_no_site_at_all_is_an_error_that_lists_near_misses():
    net = Net(lambda net, x: net.norm(net.conv(x)), conv=conv(3, 8), norm=nn.GroupNorm(2, 8))
    with pytest.raises(ValueError, match=r"no filter of Net can be gated .*'all': conv: GroupNorm behind it mixes"):
        find_sites(net, IMAGES, "all")
    with pytest.raises(ValueError, match=r"no filter of Net can be gated .*stem: the predicate does not pick it"):
        find_sites(UNITS["plain"][0], IMAGES, lambda name, module: False)


def test_another_selection_is_refused_with_the_choice(unchecked_types):
    with pytest.raises(ValueError, match=r"sites must be 'residual', 'all' or a predicate .*, not 'every'"):
        find_sites(vgg(), IMAGES, "every")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("net", "images"),
    [
        (branching(), IMAGES),
        (vgg(), torch.zeros(2, 4, 8, 8)),
        (vgg(), torch.zeros(2, 3, 8)),
        (vgg(), torch.zeros(2, 3, 1, 1)),
    ],
    ids=["control flow", "channels", "dimensions", "too small"],
)
def test_a_network_that_cannot_be_exported_is_named_with_the_images(net, images):
    with pytest.raises(
        ValueError, match=r"Net cannot be exported with images \(2, .* give images of another"
    ) as refused:
        find_sites(net, images)
    assert str(tuple(images.shape)) in str(refused.value)
    assert "\n" not in str(refused.value)


class MLP(nn.Sequential):
    pass


def test_a_network_that_is_no_cnn_is_named():
    with pytest.raises(ValueError, match=r"no filter of MLP can be gated .* it has no nn\.Conv2d"):
        find_sites(MLP(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 4)), IMAGES)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("net", "fails"), [(vgg(), False), (branching(), True)])
def test_training_modes_stay_as_they_were(net, fails, training):
    net.train(training)
    net.fc.train(not training)
    before = [module.training for module in net.modules()]
    with pytest.raises(ValueError, match="cannot be exported") if fails else nullcontext():
        find_sites(net, IMAGES)
    assert [module.training for module in net.modules()] == before


# --- Random networks


def shuffled(block: Any, x: Tensor) -> Tensor:
    """ShuffleNetV2's unit: half of the channels pass by, then the halves are mixed."""
    left, right = x.chunk(2, 1)
    x = torch.cat([left, block.right(right)], 1)
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


def layers(*given: nn.Module) -> nn.Sequential:
    return nn.Sequential(*given)


LINKS: dict[str, Callable[[], nn.Module]] = {  # from 8 channels to 8 channels
    "conv and BatchNorm": lambda: layers(conv(8, 8), norm(), nn.ReLU()),
    "conv and fused norm": lambda: layers(conv(8, 8, bias=False), FusedNorm(8)),
    "conv alone": lambda: layers(conv(8, 8), nn.GELU()),
    "conv and shift": lambda: layers(conv(8, 8), nn.Sigmoid(), conv(8, 8)),
    "residual": lambda: Block(
        lambda u, x: (x + u.second(u.first(x).relu())).relu(),
        first=layers(conv(8, 6), norm(6)),
        second=layers(conv(6, 8), norm()),
    ),
    "residual in place": lambda: Block(
        lambda u, x: u.layers(x).add_(x).relu_(), layers=layers(conv(8, 5), nn.ReLU(True), conv(5, 8), norm())
    ),
    "residual with SE": lambda: Block(
        lambda u, x: x + u.layers(x), layers=layers(conv(8, 8), norm(), nn.SiLU(), squeeze_excite(), conv(8, 8), norm())
    ),
    "pre-activation": lambda: Block(
        lambda u, x: x + u.layers(x), layers=layers(norm(), nn.ReLU(), conv(8, 6), norm(6), nn.ReLU(), conv(6, 8))
    ),
    "inverted residual": lambda: Block(
        lambda u, x: x + u.layers(x),
        layers=layers(
            conv(8, 12, 1), norm(12), nn.Hardswish(), conv(12, 12, groups=12), norm(12), nn.ReLU6(), conv(12, 8, 1)
        ),
    ),
    "projection": lambda: Block(
        lambda u, x: u.main(x) + u.shortcut(x),
        main=layers(conv(8, 6), norm(6), nn.ReLU(), conv(6, 8)),
        shortcut=layers(conv(8, 8, 1), norm()),
    ),
    "depthwise": lambda: conv(8, 8, groups=8, bias=False),
    "depthwise, two filters a channel": lambda: layers(conv(8, 16, groups=8), nn.ReLU(), conv(16, 8, 1)),
    "grouped": lambda: layers(conv(8, 12, groups=4), norm(12), nn.LeakyReLU(), conv(12, 8, groups=2)),
    "branches": lambda: Block(
        lambda u, x: torch.cat([u.one(x), u.two(x)], 1), one=layers(conv(8, 3), norm(3)), two=conv(8, 5, 1)
    ),
    "twice": lambda: Block(
        lambda u, x: u.down(torch.cat([u.more(x)] * 2, 1)), more=layers(conv(8, 6), nn.ReLU()), down=conv(12, 8)
    ),
    "dense": lambda: Block(
        lambda u, x: u.down(torch.cat([x, u.more(x)], 1)), more=layers(norm(), nn.ReLU(), conv(8, 4)), down=conv(12, 8)
    ),
    "shuffle": lambda: Block(shuffled, right=layers(conv(4, 4), norm(4), nn.ReLU())),
    "product": lambda: Block(lambda u, x: u.one(x) * u.two(x), one=layers(conv(8, 8), nn.ReLU()), two=conv(8, 8)),
    "mask": lambda: Block(lambda u, x: x * u.layers(x), layers=layers(conv(8, 1), nn.Sigmoid())),
    "max pooling": lambda: nn.MaxPool2d(3, 1, 1),
    "padding": lambda: layers(nn.ZeroPad2d(1), nn.AvgPool2d(3, 1)),
    "GroupNorm": lambda: layers(conv(8, 8), nn.GroupNorm(4, 8), nn.ReLU()),
    "LayerNorm": lambda: layers(LayerNorm2d(8), conv(8, 8, 1)),
    "windows": lambda: Block(in_windows, conv=conv(8, 8)),
    "attention": Attention,
}


def chain_of(names: list[str]) -> Net:
    return Net(lambda net, x: net.links(net.stem(x)), stem=conv(3, 8), links=layers(*[LINKS[name]() for name in names]))


@pytest.mark.parametrize("name", LINKS)
def test_every_link_of_random_networks_keeps_what_gating_promises(name):
    check_promises(chain_of([name, "conv alone"]), "all")


@given(names=st.lists(st.sampled_from(sorted(LINKS)), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_random_networks_keep_what_gating_promises(names):
    net = chain_of(names)
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for report in check_promises(net, "residual", "all"):  # each convolution is gated or left out, once
        assert sorted([*(site.conv for site in report.sites), *report.left_out]) == sorted(convs)


@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm2d"])
def test_the_check_fails_where_a_site_lies_behind_what_mixes_channels(name):
    mixer = nn.GroupNorm(2, 8) if name == "GroupNorm" else LayerNorm2d(8)
    net = Net(lambda net, x: net.mixer(net.conv(x)), conv=conv(3, 8), mixer=mixer).eval()
    unsettle_(net)
    wrong = small_gater_net(net, [GateSite("mixer", "conv", 0, 8)])
    with pytest.raises(AssertionError, match="a closed filter still matters"):
        check_gates(wrong, IMAGES, {})
    wrong.ungate()
    check_gates(small_gater_net(net, [GateSite("conv", "conv", 0, 8)]), IMAGES, {})


def test_the_check_fails_where_a_site_names_another_convolution():
    net = Net(lambda net, x: net.two(net.one(x)), one=conv(3, 8), two=conv(8, 8)).eval()
    with pytest.raises(AssertionError, match="a closed filter still matters"):
        check_gates(small_gater_net(net, [GateSite("two", "one", 0, 8)]), IMAGES, {})


def test_the_check_fails_where_dead_channels_are_revived_by_a_batch_norm():
    net = Net(lambda net, x: net.two(net.bn(net.one(x)).relu()), one=conv(3, 8), bn=norm(), two=conv(8, 8)).eval()
    before, behind = [GateSite("one", "one", 0, 8)], [GateSite("bn", "one", 0, 8)]
    graph = read_graph(net, IMAGES)
    model = small_gater_net(net, before)
    check_dead_channels(model, CostModel(graph, before), IMAGES)
    with pytest.raises(AssertionError, match="two reads what is said to be dead"):
        check_dead_channels(model, CostModel(graph, behind), IMAGES)


def test_two_convolutions_that_are_multiplied_are_both_accounted_for():
    net = Net(lambda net, x: net.bn(net.one(x) * net.two(x)), one=conv(3, 8), two=conv(3, 8), bn=norm())
    report = examine(read_graph(net, IMAGES), "all")
    assert {site.conv for site in report.sites} | report.left_out.keys() == {"one", "two"}


def test_a_batch_norm_behind_global_pooling_is_no_site():
    net = Block(
        lambda net, x: net.fc(net.bn(net.conv(x).mean((2, 3)))),
        conv=conv(3, 8),
        bn=nn.BatchNorm1d(8),
        fc=nn.Linear(8, 4),
    )
    check_promises(net, "all")


def test_a_clamp_with_tensor_bounds_is_read():
    net = Net(lambda net, x: net.conv(x).clamp(min=net.floor), conv=conv(3, 8), floor=torch.zeros(8, 1, 1))
    check_promises(net, "all")


def test_a_shortcut_around_pooling_makes_no_convolution_residual():
    net = Net(lambda net, x: net.last(F.avg_pool2d(y := net.stem(x), 3, 1, 1) + y), stem=conv(3, 8), last=conv(8, 8))
    assert listed(net, "residual") == [("stem", "stem", 0, 8, "inner"), ("last", "last", 8, 16, "inner")]


def test_the_last_convolutions_of_three_branches_are_all_residual():
    unit = Block(
        lambda u, x: x + (u.one(x) + u.two(x) + u.three(x)),
        one=layers(conv(8, 4), conv(4, 8)),
        two=layers(conv(8, 4), conv(4, 8)),
        three=layers(conv(8, 4), conv(4, 8)),
    )
    assert [name for name, *_ in listed(with_stem(unit))] == ["unit.one.1", "unit.two.1", "unit.three.1"]


def test_pooled_features_stay_pooled_where_ways_part_and_join():
    unit = Block(
        lambda u, x: x + u.two((y := u.one(x.mean((2, 3), keepdim=True))) * y.sigmoid()),
        one=conv(8, 8, 1),
        two=conv(8, 8, 1),
    )
    assert reasons(with_stem(unit)) == {"unit.one": POOLED, "unit.two": POOLED}


class TwoNames(nn.Module):
    """Its layers have two names each, and run by the second, as in networks whose head was cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.fc = conv(3, 8), norm(8), conv(8, 8), nn.Linear(8, 4)
        self.body = nn.Sequential(self.first, self.norm, nn.ReLU(), self.second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def test_a_layer_with_two_names_goes_by_its_first():
    sites = find_sites(TwoNames().eval(), IMAGES, "all")
    assert [(site.conv, site.name) for site in sites] == [("first", "norm"), ("second", "second")]
    check_promises(TwoNames().eval(), "all")


@pytest.mark.parametrize("pool", ["mean", "amax", "sum"])
def test_channels_are_followed_through_pooling_of_one_side(pool):
    """The image's columns become channels: 8 of them, as many as there are filters."""

    def body(net: Any, x: Tensor) -> Tensor:
        return net.last(getattr(net.conv(x), pool)(2).permute(0, 2, 1).unsqueeze(3))

    check_promises(Net(body, conv=conv(3, 8), last=nn.Conv2d(8, 8, 1)).eval(), "all")
