"""Which filters get gates, where, and how they are counted."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from site_checks import check_promises, listed, reasons
from small_networks import IMAGES, Block, FusedNorm, Net, conv, norm, squeeze_excite, with_stem
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from gaternet import find_sites
from gaternet.method import GateSite
from gaternet.models.cifar_resnet import CifarResNet, residual_sites
from gaternet.models.create import create_backbone

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


def late_depthwise() -> Net:
    """Its depthwise convolution runs behind another than the one whose filters it reads."""
    return Net(
        lambda net, x: net.third(net.second(y := net.first(x)) + net.depthwise(y)),
        first=conv(3, 6),
        second=conv(6, 6),
        depthwise=conv(6, 6, groups=6),
        third=conv(6, 8),
    )


def test_columns_go_on_behind_a_depthwise_convolution_that_runs_late():
    sites = [("first", "first", 0, 6), ("second", "second", 6, 12), ("depthwise", "depthwise", 0, 6)]
    assert [site[:4] for site in listed(late_depthwise(), "all")] == [*sites, ("third", "third", 12, 20)]
    check_promises(late_depthwise(), "all")


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
    for wrong in (None, ["layers.0"], find_sites(vgg(), IMAGES)):
        with pytest.raises(ValueError, match="or a predicate on"):
            find_sites(vgg(), IMAGES, wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("net", "images"),
    [
        (branching(), IMAGES),
        (vgg(), torch.zeros(2, 4, 8, 8)),
        (vgg(), torch.zeros(2, 3, 1, 1)),
    ],
    ids=["control flow", "channels", "too small"],
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


def test_a_mean_over_everything_mixes_channels():
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.one(x)
        return net.two(x - x.mean(dim=None, keepdim=True))

    assert reasons(Net(forward, one=conv(3, 1), two=conv(1, 8))) == {}


def test_ways_that_part_and_meet_again_are_followed_once():
    """x + x * a(x) behind each addition: the number of ways doubles with each unit."""
    units = [(conv(8, 8), conv(8, 8, 1)) for _ in range(20)]

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        for i in range(len(units)):
            x = x + getattr(net, f"conv{i}")(x)
            x = x + x * getattr(net, f"scale{i}")(x.mean((2, 3), keepdim=True)).sigmoid()
        return x

    parts = {
        f"{name}{i}": part for i, pair in enumerate(units) for name, part in zip(("conv", "scale"), pair, strict=True)
    }
    start = time.monotonic()
    found = find_sites(Net(forward, first=conv(3, 8), **parts), IMAGES)
    assert [site.conv for site in found if site.role == "residual"][-1] == "conv19"
    assert time.monotonic() - start < 60
