"""What a network gives out when filters are skipped, what its images do to each other, what becomes of the model."""

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_networks import chain_of
from skipped_networks import KERNELS, THREE, assert_skips_exactly, gated, plan_of, random_gates
from small_networks import IMAGES, Block, Net, conv, norm
from torch import Tensor, nn

import gaternet
from gaternet.method import Gater, GaterNet, GateSite
from gaternet.skipping.specialise import Specialised

FEATURES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "concatenated": lambda net, x: torch.cat([net.one(x), net.two(x)], 1),
    "added": lambda net, x: x + net.depthwise(x),
    "filters": lambda net, x: net.one(x),
}


def features(body: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    def whole(net: Any, x: Tensor) -> Tensor:
        return body(net, net.stem(x))

    def unit(groups: int = 1) -> nn.Sequential:
        return nn.Sequential(conv(8, 8, groups=groups, bias=False), norm(8), nn.ReLU())

    stem = nn.Sequential(conv(3, 8), norm(8), nn.ReLU())
    return Block(whole, stem=stem, one=unit(), two=unit(), depthwise=unit(8), end=conv(16, 4))


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_gates_decide_are_given_out_whole(name, unchecked_types):
    model = gated(features(FEATURES[name]), sites=lambda name, _: True)
    for density in (0.0, 0.5):
        gates = random_gates(model, density)
        assert_skips_exactly(model, THREE, gates)
        special = gaternet.skip(model, THREE, "specialise", calibration=gates, subnetworks=2)
        torch.testing.assert_close(special.forward_gated(THREE, gates), model.forward_gated(THREE, gates))


@pytest.mark.parametrize("name", ["dict", "several", "list of one"])
def test_a_network_that_gives_other_than_one_tensor_is_refused(name, unchecked_types):
    wrap: Callable[[Tensor], Any] = {
        "dict": lambda x: {"logits": x},
        "several": lambda x: (x, x.sum(1)),
        "list of one": lambda x: [x],
    }[name]
    model = gated(Block(lambda net, x: wrap(net.fc(net.conv(x).mean((2, 3)))), conv=conv(3, 8), fc=nn.Linear(8, 4)))
    with pytest.raises(ValueError, match=r"Block must give one tensor, to skip filters: wrap it so"):
        gaternet.skip(model, THREE)


def test_a_network_that_drops_the_dimension_of_a_batch_of_one_is_refused():
    model = gated(Block(lambda net, x: net.fc(net.conv(x).mean((2, 3)).squeeze()), conv=conv(3, 8), fc=nn.Linear(8, 4)))
    with pytest.raises(ValueError, match=r"gives \(4,\) for one image.*use flatten\(1\)"):
        gaternet.skip(model, THREE)


def test_a_network_that_gives_a_number_for_one_image_is_refused(unchecked_types):
    model = gated(Block(lambda net, x: net.fc(net.conv(x).mean((2, 3))).squeeze(), conv=conv(3, 8), fc=nn.Linear(8, 1)))
    with pytest.raises(ValueError, match=r"gives \(\) for one image.*use flatten\(1\)"):
        gaternet.skip(model, THREE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "trace", [torch.jit.trace, lambda fast, images: torch.export.export(fast, (images,))], ids=["jit", "export"]
)
def test_a_skipper_is_not_traced(trace, unchecked_types):
    fast = gaternet.skip(gated(chain_of(["residual"])), THREE, "slice")
    with pytest.raises(
        ValueError, match=r"a Skipper's code cannot be traced: export its model by gaternet.export_onnx"
    ):
        trace(fast, THREE)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("mean", lambda x: x - x.mean()),
        ("std", lambda x: x / x.std()),
        ("max", lambda x: x / x.abs().max()),
        ("mean", lambda x: x - x.mean((0, 2, 3), keepdim=True)),
        ("var_mean", lambda x: x - torch.var_mean(x, dim=[-4], keepdim=True)[1]),
        ("softmax", lambda x: x.softmax(0)),
    ],
)
def test_images_that_change_each_others_results_are_refused(name, act):
    part = Block(lambda net, x: act(net.conv(x)), conv=conv(3, 8))
    model = gated(Net(lambda net, x: net.part(x) + net.other(x), part=part, other=conv(3, 8)))
    with pytest.raises(ValueError, match=rf"part computes {name} over the images of a batch.*leave the batch's dim"):
        gaternet.skip(model, THREE)


def add_one(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output + 1


def add_one_behind(model: GaterNet) -> GaterNet:
    model.backbone.get_submodule("one").register_forward_hook(add_one)
    return model


def refill(channel: int) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook that gives one filter other numbers where its gate is closed."""
    return lambda module, args, output: torch.where(
        (output == 0) & (torch.arange(8) == channel)[:, None, None], 5, output
    )


UNPLANNED: dict[str, Callable[[], GaterNet]] = {
    "images that are exchanged": lambda: gated(Net(lambda net, x: net.one(x).flip(0), one=conv(3, 8))),
    "by the number of images": lambda: gated(
        Net(lambda net, x: net.one(x) * 2 if len(x) > 1 else net.one(x), one=conv(3, 8))
    ),
    "a hook behind the gates": lambda: add_one_behind(
        gated(Net(lambda net, x: net.two(net.one(x)), one=conv(3, 8), two=conv(8, 8)))
    ),
}


@pytest.mark.parametrize("name", UNPLANNED)
def test_what_a_plan_does_not_see_is_refused(name):
    model = UNPLANNED[name]()
    for engine in ("slice", "auto"):
        with pytest.raises(ValueError, match=r"computes something else than its plan.*use the model itself"):
            gaternet.skip(model, THREE, engine)
    gates = random_gates(model, 0.5)
    assert torch.equal(
        gaternet.skip(model, THREE, "mask").forward_gated(THREE, gates), model.forward_gated(THREE, gates)
    )


@pytest.mark.parametrize("channel", range(8))
def test_each_gate_is_closed_and_opened_when_a_plan_is_tried(channel):
    model = gated(Net(lambda net, x: net.two(net.one(x)), one=conv(3, 8), two=conv(8, 8)))
    model.backbone.get_submodule("one").register_forward_hook(refill(channel))
    with pytest.raises(ValueError, match="computes something else than its plan"):
        gaternet.skip(model, IMAGES, "slice")


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x - x.mean((1, 2, 3), keepdim=True),
        lambda x: x * x.softmax(1) + x.amax(-1, keepdim=True),
        lambda x: torch.max(x, -x) + x.sort()[0],
        lambda x: x.unflatten(1, (2, 4)).flatten(0, 1).softmax(1).unflatten(0, (-1, 2)).flatten(1, 2),
        lambda x: (x.mean(), x.relu())[1],
    ],
)
def test_reductions_within_an_image_are_not(act):
    model = gated(Net(lambda net, x: net.two(act(net.one(x))), one=conv(3, 8), two=conv(8, 8)))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


@pytest.mark.parametrize("act", [lambda x, scale: x * scale, lambda x, scale: scale * x])
def test_a_factor_for_each_channel_may_stand_on_either_side(act):
    """torchvision writes the second, timm the first; the convolution behind it reads open channels alone."""
    model = gated(
        Net(
            lambda net, x: net.two(act(y := net.one(x), net.scale(y.mean((2, 3), keepdim=True)).sigmoid())),
            one=conv(3, 8),
            scale=conv(8, 8, 1),
            two=conv(8, 8),
        )
    )
    assert "two: reads open channels of 8" in str(plan_of(model))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


def test_a_factor_within_a_sum_counts():
    body: Callable[[Any, Tensor], Tensor] = lambda net, x: torch.add(net.one(x), net.two(x), alpha=2)  # noqa: E731
    model = gated(Net(body, one=conv(3, 8), two=conv(3, 8)))
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


def test_the_last_site_need_not_have_the_last_gates():
    """A depthwise convolution that shares those of the first."""
    parts = {"first": conv(3, 8), "second": conv(8, 8), "depthwise": conv(8, 8, groups=8)}
    model = gated(Net(lambda net, x: net.second(y := net.first(x)) + net.depthwise(y), **parts))
    assert (model.sites[-1].stop, model.num_gates, plan_of(model).num_gates) == (8, 16, 16)
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))
    assert gaternet.count_macs(model, THREE).gated.shape == (3,)


def test_the_model_is_left_in_its_mode():
    model = gated(Net(lambda net, x: net.one(x), one=conv(3, 8))).train()
    model.backbone.eval()  # frozen
    for engine in ("slice", "mask", "auto"):
        fast = gaternet.skip(model, THREE, engine)
        assert model.training
        assert model.gater.training
        assert not any(module.training for module in [fast, *model.backbone.modules()])
        gates = fast.gates(THREE)
        assert torch.equal(gates, fast.gates(THREE))  # without noise
        assert fast(THREE).shape == (3, 4)
        logits, used = fast(THREE, return_gates=True)
        assert torch.equal(logits, fast(THREE))
        assert torch.equal(used, gates)


@pytest.mark.parametrize("kernels", KERNELS)
def test_copies_skip_as_well(kernels):
    model = gated(Net(lambda net, x: net.two(net.one(x)), one=conv(3, 8), two=conv(8, 8)))
    fast = gaternet.skip(model, THREE, "slice", kernels=kernels)
    assert torch.equal(copy.deepcopy(fast)(THREE), fast(THREE))


def test_what_is_saved_can_be_read_by_whom_the_umask_allows(tmp_path):
    model = gated(Net(lambda net, x: net.one(x), one=conv(3, 8)))
    gaternet.skip(model, THREE, "slice").save(tmp_path)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}


@pytest.mark.parametrize("engine", ["slice", "mask", "auto"])
def test_it_is_made_under_autocast_as_it_is_without(engine):
    model = gated(chain_of(["grouped", "residual"]))
    with torch.autocast("cpu", torch.bfloat16):
        fast = gaternet.skip(model, IMAGES, engine)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_it_may_be_sent_to_where_it_is_and_nowhere_else():
    model = gated(chain_of(["residual"]))
    fast = gaternet.skip(model, IMAGES, "slice")
    whole = nn.Sequential(nn.Identity(), fast).to("cpu").float()
    assert torch.equal(whole(IMAGES), fast(IMAGES))
    for moved in (lambda: whole.double(), lambda: whole.to("meta")):
        with pytest.raises(RuntimeError, match="a Skipper stays where it was made: move the model"):
            moved()


def test_the_engine_mask_keeps_its_precision_under_autocast_too():
    model = gated(Net(lambda net, x: net.two(net.one(x)), one=conv(3, 8), two=conv(8, 8)))
    fast = gaternet.skip(model, THREE, "mask")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(THREE), fast.forward_gated(THREE, fast.gates(THREE)))
        assert fast(THREE).dtype == torch.float32


def test_what_is_no_gaternet_or_no_image_is_refused(unchecked_types):
    model = gated(Net(lambda net, x: net.one(x), one=conv(3, 8)))
    wrongs: list[Any] = [nn.DataParallel(model), model.backbone]
    for wrong in wrongs:
        for call in (gaternet.skip, gaternet.count_macs, gaternet.analyze):
            with pytest.raises(TypeError, match=f"must be a GaterNet, but is a {type(wrong).__name__}: gate it with"):
                call(wrong, THREE)
    with pytest.raises(TypeError, match=r"the backbone must be a network, not 'resnet18': make it first, say by timm"):
        gaternet.gate("resnet18", THREE)  # pyright: ignore[reportArgumentType]
    for call in (gaternet.skip, gaternet.count_macs):
        with pytest.raises(ValueError, match=r"the example must have images, but is \(0, 3, 8, 8\): pass one"):
            call(model, THREE[:0])


# --- What a plan cannot follow


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "shuffled": lambda net, x: torch.roll(net.two(x), 1, 1) * net.one(x),
    "shuffled behind": lambda net, x: net.one(x) * torch.roll(net.two(x), 1, 1),
    "pooled": lambda net, x: net.two(x).mean((2, 3))[:, :, None, None] * net.one(x),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_channels_with_gates_of_their_own_are_concatenated_exactly(name):
    model = gated(
        features(lambda net, x: net.end(torch.cat([PRODUCTS[name](net, x), net.depthwise(x)], 1)).mean((2, 3)))
    )
    gates = random_gates(model, 0.5)
    assert_skips_exactly(model, THREE, gates)
    special = gaternet.skip(model, THREE, "specialise", calibration=gates, subnetworks=2)
    torch.testing.assert_close(special.forward_gated(THREE, gates), model.forward_gated(THREE, gates))


@pytest.mark.parametrize(
    "site",
    [
        GateSite("act", "conv", 0, 8),
        GateSite("conv", "conv", 0, 8),
        GateSite("bn", "act", 0, 8),
    ],
    ids=["identity", "before the norm", "no convolution's"],
)
def test_gates_that_a_plan_does_not_follow_are_refused(site):
    net = Net(
        lambda net, x: net.end(net.act(net.bn(net.conv(x)))),
        conv=conv(3, 8),
        bn=norm(8),
        act=nn.Identity(),
        end=conv(8, 8),
    ).eval()
    gater = gated(Net(lambda net, x: net.end(x), end=conv(3, 8))).gater
    model = GaterNet(net, gater, [site]).eval()
    with pytest.raises(ValueError, match=f"the gates at {site.name} cannot be followed: gate what gaternet.find_sites"):
        gaternet.skip(model, THREE)


class SoftGater(Gater):
    """A gater that was changed: its gates are between 0 and 1 in evaluation, too."""

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.logits(images).sigmoid()


def test_a_changed_gater_with_soft_gates_is_refused():
    model = gated(chain_of(["residual"]))
    assert isinstance(model.gater, Gater)
    own = SoftGater(model.gater.extractor, model.gater.fc1.in_features, model.num_gates)
    soft = gaternet.GaterNet(model.ungate(), own, model.sites).eval()
    with pytest.raises(ValueError, match="gates must be 0 or 1 for filters to be skipped"):
        gaternet.skip(soft, IMAGES, "slice")(IMAGES)


@pytest.mark.parametrize("fastest", ["slice", "mask", "specialise"])
def test_auto_chooses_of_all_engines_and_holds_a_copy(fastest, monkeypatch):
    module = sys.modules[gaternet.skip.__module__]  # the package has a function of its name
    monkeypatch.setattr(
        module, "time_engines", lambda engines, *rest: {name: float(name != fastest) for name in engines}
    )
    model = gated(chain_of(["residual"]))
    gates = random_gates(model, 0.5, batch=2)
    fast = gaternet.skip(model, IMAGES, calibration=gates)
    assert fast.engine == fastest
    assert fast.timings.keys() == {"slice", "mask", "specialise"}
    assert isinstance(fast.program, Specialised) == (fastest == "specialise")
    with torch.no_grad():
        expected = model.forward_gated(IMAGES, gates)
        torch.testing.assert_close(fast.forward_gated(IMAGES, gates), expected)
        for parameter in model.backbone.parameters():  # it goes on learning
            parameter.add_(1)
    torch.testing.assert_close(fast.forward_gated(IMAGES, gates), expected)


@pytest.mark.parametrize("engine", ["slice", "mask"])
def test_no_gradients_under_given_gates(engine):
    model = gated(chain_of(["residual"]))
    fast = gaternet.skip(model, IMAGES, engine)
    assert not fast.forward_gated(IMAGES, random_gates(model, 0.5, batch=2)).requires_grad


@pytest.mark.parametrize(("padding", "kernel", "skipped"), [("same", 3, True), ("valid", 3, True), ("same", 2, False)])
def test_paddings_by_name_are_skipped_where_their_edges_are_equal(padding, kernel, skipped):
    """PyTorch pads an even kernel's image more on the right."""
    named = nn.Conv2d(8, 8, kernel, padding=padding, dilation=(2, 1))
    model = gated(Net(lambda net, x: net.named(net.first(x).relu()), first=conv(3, 8), named=named))
    assert ("named: reads open channels of 8" in str(plan_of(model))) == skipped
    assert_skips_exactly(model, THREE, random_gates(model, 0.5))


class Squared(nn.Module):
    """Of pairs of numbers as complex ones, which PyTorch takes where they lie side by side alone."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2).contiguous())
        return torch.view_as_real(pairs * pairs).reshape(x.shape)


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_wants_numbers_in_their_order_has_them(kernels):
    model = gated(Net(lambda net, x: net.two(net.square(net.one(x))), one=conv(3, 8), square=Squared(), two=conv(8, 8)))
    gates = random_gates(model, 0.5)
    fast = gaternet.skip(model, THREE, "slice", kernels="native" if kernels == "native" else "torch")
    torch.testing.assert_close(fast.forward_gated(THREE, gates), model.forward_gated(THREE, gates))


@pytest.mark.parametrize("engine", ["slice", "specialise"])
def test_a_skipper_is_pickled_and_computes_the_same(engine):
    model = gated(chain_of(["residual with SE", "inverted residual"]))
    gates = random_gates(model, 0.5)
    fast = gaternet.skip(model, THREE, engine, calibration=gates)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again.forward_gated(THREE, gates), fast.forward_gated(THREE, gates))
    assert torch.equal(again(THREE), fast(THREE))


def test_a_model_that_cannot_be_copied_says_so():
    model = gated(Net(lambda net, x: net.conv(x), conv=conv(3, 8)))
    model.backbone.get_submodule("conv").held = model.backbone.fc.weight * 2  # pyright: ignore
    with pytest.raises(ValueError, match=r"the GaterNet cannot be copied .*run it once under torch\.no_grad\(\) first"):
        gaternet.skip(model, THREE, "mask")
