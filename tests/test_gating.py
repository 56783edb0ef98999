"""`gate`: any CNN in one call, and back again, and to the disk and back."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from small_networks import IMAGES, Block, Net, conv, norm, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import normalize

from gaternet import GaterNet, count_macs, create_model, gate, load_pretrained, skip
from gaternet.checkpoint import load_model, save_model
from gaternet.cost import CostModel, count_dense_macs
from gaternet.graph import read_graph
from gaternet.method import Gater
from gaternet.models.create import create_backbone, create_extractor, describe_backbone

SMALL = torch.zeros(2, 3, 32, 32)
PIXELS = torch.rand(2, 3, 64, 64, generator=seeded(1))  # for networks that shrink them 32 times


def custom() -> Net:
    """A stem of 8 filters and two residual units, the first of which runs 6 inner ones: 16 gates."""
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.two(net.one(net.stem(x))),
        stem=nn.Sequential(conv(3, 8), norm(), nn.ReLU()),
        one=Block(
            lambda u, x: x + u.layers(x), layers=nn.Sequential(conv(8, 6), norm(6), nn.ReLU(), conv(6, 8), norm())
        ),
        two=Block(lambda u, x: x + u.layers(x), layers=nn.Sequential(conv(8, 8), norm())),
    ).eval()


def features(channels: int = 3, width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gater_of(model: GaterNet) -> Gater:
    assert isinstance(model.gater, Gater)
    return model.gater


def assert_same(model: nn.Module, other: nn.Module, images: Tensor) -> None:
    """In what they compute, in evaluation, and in what they hold."""
    for ours, theirs in zip(model(images, return_gates=True), other(images, return_gates=True), strict=True):
        assert torch.equal(ours, theirs)
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)


# --- The model as it begins


@pytest.mark.parametrize("batch_norm", [True, False])
def test_open_begins_as_the_plain_backbone_for_any_image(batch_norm):
    backbone = custom()
    plain = copy.deepcopy(backbone)
    model = gate(backbone, IMAGES, open=True, batch_norm=batch_norm)
    for scale in (0.0, 1.0, -100.0):
        images = scale * torch.randn(4, 3, 8, 8, generator=seeded(2))
        logits, gates = model(images, return_gates=True)
        assert torch.equal(gates, torch.ones(4, 16))
        assert torch.equal(logits, plain(images))


def test_gates_start_as_open_as_asked():
    assert gater_of(gate(custom(), IMAGES, initial_bias=1.5)).fc2.bias.eq(1.5).all()
    with pytest.raises(ValueError, match="leave it out where open is set"):
        gate(custom(), IMAGES, open=True, initial_bias=1.5)


def test_open_gates_are_open_in_training_too():
    model = gate(custom().train(), IMAGES, open=True, hard_probability=1.0)
    plain = copy.deepcopy(model).ungate()
    images = torch.randn(4, 3, 8, 8, generator=seeded(3)) * 5
    for _ in range(3):  # the gater's BatchNorms learn, and change nothing
        assert torch.equal(gater_of(model).logits(images), torch.full((4, 16), 2.0))
    gater_of(model).noise_std = 0.0
    assert torch.equal(model(images), plain(images))  # with the statistics of the batch
    gater_of(model).noise_std = 1.0
    share = torch.cat([model.gates(images) for _ in range(50)]).mean()
    assert 0.96 < share < 0.99  # with the paper's noise


def test_default_begins_with_about_half_of_the_gates_open_and_they_depend_on_the_image():
    model = gate(custom(), IMAGES)
    gates = model.gates(torch.randn(64, 3, 8, 8, generator=seeded(4)) * 2)
    assert 0.2 < gates.mean() < 0.8
    assert len(gates.unique(dim=0)) > 1


def test_an_open_model_learns_to_close_gates():
    model = gate(custom().train(), IMAGES, open=True)
    images = torch.randn(8, 3, 8, 8, generator=seeded(5))
    optimizer = torch.optim.SGD(model.gater.parameters(), 1.0)
    for step in range(30):
        optimizer.zero_grad()
        model(images, return_gates=True)[1].sum(1).mean().backward()
        if step == 1:  # one step behind the start, where FC2's weights are zeros
            for name, parameter in model.gater.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.any() or name == "fc1.bias", name  # BatchNorm takes any shift away again
        optimizer.step()
    assert model.eval().gates(images).mean() < 0.1


# --- The gater


def shrink_of(model: GaterNet) -> int:
    extractor = gater_of(model).extractor
    return int(extractor[0].kernel_size) if isinstance(extractor, nn.Sequential) else 1  # pyright: ignore[reportArgumentType]


def test_default_gater_costs_at_most_5_percent_of_a_large_backbone():
    images = torch.zeros(1, 3, 224, 224)
    model = gate(create_backbone("torchvision:resnet18"), images)
    macs = count_macs(model.eval(), images)
    assert macs.backbone > 1.8e9
    assert 0.02 * macs.backbone < macs.gater <= 0.05 * macs.backbone  # neither more than it may, nor blind
    assert shrink_of(model) > 1
    assert gater_of(model).fc1.out_features == 256


def test_default_gater_sees_small_images_as_they_are():
    model = gate(create_backbone("resnet20"), torch.zeros(1, 3, 8, 8))
    assert shrink_of(model) == 1
    assert gater_of(model).fc1.in_features == 64  # ResNet-20's
    assert gater_of(model).fc1.out_features == 8


@pytest.mark.parametrize(("pixels", "bottleneck"), [((64, 64), 8), ((64, 65), 256), ((72, 20), 256)])
def test_default_bottleneck_is_the_papers(pixels, bottleneck):
    model = gate(custom(), torch.zeros(1, 3, *pixels), gater=features())
    assert gater_of(model).fc1.out_features == bottleneck
    assert gater_of(gate(custom(), torch.zeros(1, 3, *pixels), gater=features(), bottleneck=7)).fc1.out_features == 7


@pytest.mark.parametrize(
    ("name", "width"), [("resnet20", 64), ("resnet20_se", 64), ("test_resnet", 96), ("timm:test_efficientnet", 256)]
)
def test_gater_by_name(name, width):
    model = gate(custom(), IMAGES, gater=name)
    assert gater_of(model).fc1.in_features == width
    assert model.metadata is not None
    assert model.metadata["extractor"] == {"name": name, "in_chans": 3}
    assert set(model.gates(PIXELS).unique().tolist()) <= {0.0, 1.0}


def test_gater_of_a_timm_model_with_another_number_of_channels():
    backbone = Net(lambda net, x: net.conv(x), conv=conv(5, 8))
    model = gate(backbone, torch.zeros(1, 5, 32, 32), gater="mobilenetv3_small_050")
    assert model.eval().gates(torch.zeros(3, 5, 32, 32)).shape == (3, 8)


def test_gater_by_module_is_that_module():
    extractor = features()
    model = gate(custom(), IMAGES, gater=extractor, noise_std=0.3, hard_probability=0.2, batch_norm=False)
    gater = gater_of(model)
    assert gater.extractor is extractor
    assert gater.fc1.in_features == 5
    assert (gater.noise_std, gater.hard_probability) == (0.3, 0.2)
    assert isinstance(gater.norm, nn.Identity)
    assert model.metadata is not None
    assert model.metadata["extractor"] is None


class Maps(nn.Sequential):
    """Gives what no extractor may."""


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), images


@pytest.mark.parametrize(
    ("extractor", "given"),
    [
        (Maps(nn.Conv2d(3, 5, 3)), r"a Maps, must return features \(B, h\), but returns \(2, 5, 6, 6\)"),
        (Maps(nn.Conv2d(3, 5, 3), nn.Flatten(0)), r"a Maps, .* but returns \(360,\)"),
        (Maps(nn.Flatten(0, 1)), r"a Maps, .* but returns \(6, 8, 8\)"),
        (Maps(nn.Flatten(2), nn.Flatten(0, 1)), r"a Maps, .* but returns \(6, 64\)"),
        (Pair(), r"a Pair, .* but returns tuple"),
    ],
)
def test_an_extractor_that_gives_no_features_is_named_with_what_it_gives(extractor, given):
    backbone = custom()
    with pytest.raises(ValueError, match=given + ": remove its output layer and pool over the image"):
        gate(backbone, IMAGES, gater=extractor)
    assert not any(module._forward_hooks for module in backbone.modules())


def test_unknown_gater_is_refused_with_a_near_name():
    with pytest.raises(ValueError, match="unknown model of timm 'resnt18': did you mean 'resnet18'"):
        gate(custom(), IMAGES, gater="resnt18")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extractor", [None, features()])
def test_gater_has_the_dtype_of_the_example(dtype, extractor):
    images = IMAGES.to(dtype)
    model = gate(custom().to(dtype), images, gater=extractor)
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    logits, gates = model(images, return_gates=True)
    assert (logits.dtype, gates.dtype) == (dtype, dtype)


# --- The backbone


def test_backbone_stays_as_it_was_and_comes_back():
    backbone = custom()
    plain = copy.deepcopy(backbone)
    model = gate(backbone, IMAGES)
    assert model.backbone is backbone
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(backbone.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(backbone(IMAGES), plain(IMAGES))
    assert not torch.equal(model(IMAGES), plain(IMAGES))
    assert model.ungate() is backbone
    assert torch.equal(backbone(IMAGES), plain(IMAGES))
    again = gate(backbone, IMAGES, open=True)
    assert torch.equal(again(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("training", [True, False])
def test_model_is_in_its_backbones_mode(training):
    backbone = custom().train(training)
    statistics = copy.deepcopy(backbone.state_dict())
    model = gate(backbone, IMAGES)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in backbone.state_dict().items())


def test_sites_are_those_that_were_asked_for():
    assert gate(custom(), IMAGES, gater=features()).num_gates == 16
    assert gate(custom(), IMAGES, gater=features(), sites="all").num_gates == 8 + 6 + 8 + 8
    model = gate(custom(), IMAGES, sites=lambda name, module: name.startswith("two"))
    assert [site.conv for site in model.sites] == ["two.layers.0"]


def test_a_gated_backbone_is_refused():
    model = gate(custom(), IMAGES, gater=features())
    before = model(IMAGES)
    for gated in (model.backbone, model, copy.deepcopy(model.backbone)):
        with pytest.raises(ValueError, match="gated already: call ungate"):
            gate(gated, IMAGES, gater=features())
    assert torch.equal(model(IMAGES), before)


def test_gated_timm_model_compiles_in_one_graph(unchecked_types):
    model = gate(create_backbone("timm:test_efficientnet").eval(), PIXELS, gater=features(), sites="all")
    assert {"inner", "depthwise"} == {site.role for site in model.sites}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(PIXELS), model(PIXELS))


def test_gated_timm_model_in_distributed_data_parallel(tmp_path):
    model = gate(create_backbone("timm:test_resnet").eval(), PIXELS, gater="test_resnet")
    expected = model(PIXELS)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert torch.equal(wrapped(PIXELS), expected)
        wrapped.train()(PIXELS).sum().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
    finally:
        torch.distributed.destroy_process_group()


# --- Networks by name


@pytest.mark.parametrize("options", [{"num_classes": 4}, {"num_classes": 0}, {"num_classes": 3, "in_chans": 1}, {}])
def test_timm_models_are_recognised(options):
    network = timm.create_model("test_resnet", **options)
    channels = options.get("in_chans", 3)
    expected = {"name": "timm:test_resnet", "num_classes": options.get("num_classes", 1000), "in_chans": channels}
    assert describe_backbone(network, channels) == expected
    twin = create_backbone(**expected)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(PIXELS[:, :channels]), network.eval()(PIXELS[:, :channels]))


def replaced(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    module.set_submodule(name, part)
    return module


@pytest.mark.parametrize(
    "network",
    [
        timm.create_model("test_resnet", drop_path_rate=0.1),
        timm.create_model("test_resnet", act_layer=nn.SiLU),
        timm.create_model("test_resnet", output_stride=8),
        timm.create_model("test_resnet", global_pool="max"),
        replaced(timm.create_model("test_resnet"), "act1", nn.SiLU()),
        replaced(timm.create_model("test_resnet"), "fc", nn.Linear(96, 3)),
        replaced(timm.create_model("test_resnet"), "layer1.0.bn1", nn.Identity()),
        custom(),
        nn.Sequential(timm.create_model("test_resnet")),
    ],
    ids=["drop path", "activation", "stride", "pooling", "module", "classifier", "norm", "custom", "wrapped"],
)
def test_other_networks_are_not(network):
    assert describe_backbone(network, 3) is None
    assert describe_backbone(timm.create_model("test_resnet"), 4) is None  # images of other channels


@pytest.mark.parametrize("name", ["resnet20_wider", "timm:test_resnet", "torchvision:resnet18"])
def test_networks_of_create_backbone_are_described_by_its_arguments(name):
    expected = {"name": name, "num_classes": 4, "in_chans": 3}
    network = create_backbone(**expected)
    assert describe_backbone(network, 3) == expected
    assert describe_backbone(copy.deepcopy(network), 3) == expected
    create_backbone(**expected).load_state_dict(network.state_dict())
    assert create_model(name, 4).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnt18", "unknown model of timm 'resnt18': did you mean 'resnet18'"),
        ("torchvision:resnet19", r"unknown classification model of torchvision 'resnet19': did you mean 'resnet1\d'"),
        ("timm:", "unknown model of timm ''"),
        ("torchvision:fcn_resnet50", "unknown classification model of torchvision 'fcn_resnet50'"),  # segments
        ("resnet19", "unknown model 'resnet19': did you mean 'resnet1"),
    ],
)
def test_unknown_names_are_refused_with_a_near_one(name, message):
    for create in (create_model, create_backbone):
        with pytest.raises(ValueError, match=message):
            create(name)


def test_torchvision_takes_color_images_only():
    with pytest.raises(
        ValueError, match=r"torchvision:resnet18 takes images of 3 channels, not 1: choose one of timm's"
    ):
        create_model("torchvision:resnet18", in_chans=1)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_heads_for_training_are_left_out(name):
    network = create_backbone(f"torchvision:{name}", 4)
    assert isinstance(network.train()(torch.zeros(2, 3, 96, 96)), Tensor)


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> None:
    """Nothing is in the caches, and every download fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known\nand more lines")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_trained_weights_without_a_network_are_one_clear_error(no_network, name):
    message = (
        f"the trained weights of {name} are not here and cannot be downloaded \\(ConnectionError\\): start without"
    )
    for create in (create_model, create_backbone):
        with pytest.raises(ValueError, match=message) as refused:
            create(name, pretrained=True)
        assert "\n" not in str(refused.value)
    create_model(name)


def test_there_are_no_trained_weights_of_the_papers_models():
    for create in (create_model, create_backbone):
        with pytest.raises(ValueError, match="no trained weights for resnet20: train it"):
            create("resnet20", pretrained=True)


def test_torchvisions_trained_weights_fill_all_but_another_classifier(monkeypatch):
    trained = create_backbone("torchvision:resnet18", 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(trained))
    network, fresh = (
        create_backbone("torchvision:resnet18", 4, pretrained=True),
        create_backbone("torchvision:resnet18"),
    )
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained[name]) if not name.startswith("fc.") else tensor.shape[0] == 4
    assert not torch.equal(fresh.get_parameter("conv1.weight"), trained["conv1.weight"])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_networks_that_transform_their_input_come_back_as_they_were(monkeypatch, tmp_path, name):
    theirs: Any = torchvision.models.get_model(name, weights=None, transform_input=True, init_weights=False).eval()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(theirs.state_dict())
    )
    network: Any = create_backbone(f"torchvision:{name}", 1000, pretrained=True).eval()
    save_model(network, tmp_path, {"backbone": network.gaternet_source})
    loaded, _ = load_model(tmp_path)
    pixels = torch.rand(2, 3, 96, 96)
    known = normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images = normalize(pixels, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    torch.testing.assert_close(images, theirs._transform_input(known))
    torch.testing.assert_close(network(images), theirs(known))
    assert torch.equal(loaded(images), network(images))


def test_a_named_gater_can_see_a_smaller_image():
    model = gate(create_model("resnet20"), SMALL, gater="resnet8", shrink=2)
    assert isinstance(model.gater, Gater)
    macs = count_macs(model.eval(), SMALL)
    dense = count_macs(gate(create_model("resnet20"), SMALL, gater="resnet8").eval(), SMALL)
    assert macs.gater < 0.3 * dense.gater
    built = create_model("resnet20_gated", extractor="resnet8", shrink=2)
    assert isinstance(built, GaterNet)
    assert count_dense_macs(built.gater, SMALL) == macs.gater
    with pytest.raises(ValueError, match="shrink goes with a gater that is given by name"):
        gate(create_model("resnet20"), SMALL, gater=nn.Flatten(), shrink=2)
    with pytest.raises(ValueError, match="shrink must be at least 1, not 0"):
        create_model("resnet20_gated", shrink=0)


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "lcnet_035"])
def test_an_extractor_may_have_a_layer_between_pooling_and_classifier(tmp_path, name, shrink):
    model = create_model("resnet20_gated", extractor=name, shrink=shrink).eval()
    assert isinstance(model, GaterNet)
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model, PIXELS)


@pytest.mark.parametrize("shrink", [1, 3])
def test_extractor_sees_averages_of_pixels(shrink):
    extractor = create_extractor("resnet20", 1, shrink).eval()
    images = torch.rand(2, 1, 24, 24, generator=seeded(6))
    means = images.unflatten(3, (-1, shrink)).unflatten(2, (-1, shrink)).mean((3, 5))
    inner = extractor[1] if isinstance(extractor, nn.Sequential) else extractor
    torch.testing.assert_close(extractor(images), inner(means))
    assert extractor(images).shape == (2, 64)
    assert count_dense_macs(extractor, images) == count_dense_macs(inner, means)


# --- To the disk and back


def spoiled(model: GaterNet) -> GaterNet:
    """With BatchNorms that are not as new."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "gater"),
    [("timm:test_resnet", None), ("torchvision:resnet18", "test_resnet"), ("resnet20_se", "resnet20_wider")],
)
def test_a_gated_network_by_name_comes_back_by_itself(tmp_path, name, gater):
    model = spoiled(gate(create_backbone(name, 4), PIXELS, gater=gater, bottleneck=5, sites="all"))
    model.save_pretrained(tmp_path)
    for loaded in (GaterNet.from_pretrained(tmp_path), load_pretrained(tmp_path), load_model(tmp_path)[0]):
        assert_same(loaded, model, PIXELS)
        assert isinstance(loaded, GaterNet)
        assert loaded.sites == model.sites
        assert not loaded.training
    load_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert_same(load_pretrained(tmp_path / "again"), model, PIXELS)


def test_a_timm_model_of_the_users_comes_back_by_itself(tmp_path):
    network = timm.create_model("test_efficientnet", num_classes=4, in_chans=1)
    model = spoiled(gate(network, PIXELS[:, :1], open=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["metadata"]["backbone"] == {"name": "timm:test_efficientnet", "num_classes": 4, "in_chans": 1}
    assert_same(load_pretrained(tmp_path), model, PIXELS[:, :1])


def test_a_shrinking_gater_comes_back_by_itself(tmp_path):
    model = spoiled(gate(create_backbone("torchvision:squeezenet1_1", 4), PIXELS))
    assert shrink_of(model) == 4
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model, PIXELS)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, GaterNet]:
    """A custom backbone with a custom extractor."""
    model = spoiled(gate(custom(), IMAGES, gater=features()))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def other_weights(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return network


@pytest.mark.parametrize("load", [GaterNet.from_pretrained, load_pretrained])
def test_a_custom_network_comes_back_with_one_of_its_kind(saved, load):
    directory, model = saved
    backbone, extractor = other_weights(custom()), other_weights(features())
    loaded = load(directory, backbone=backbone, extractor=extractor)
    assert loaded.backbone is backbone
    assert gater_of(loaded).extractor is extractor
    assert_same(loaded, model, IMAGES)


@pytest.mark.parametrize(
    ("parts", "missing"),
    [({}, "backbone"), ({"extractor": features()}, "backbone"), ({"backbone": custom()}, "extractor")],
)
def test_without_one_of_its_kind_the_error_says_what_to_give(saved, parts, missing):
    for load in (GaterNet.from_pretrained, load_pretrained, lambda path, **parts: load_model(path, **parts)[0]):
        with pytest.raises(
            ValueError, match=rf"config.json does not say how its {missing} was .* with {missing}=\.\.\."
        ):
            load(saved[0], **parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"backbone": create_backbone("resnet20"), "extractor": features()}, "the backbone has no module"),
        ({"backbone": custom(), "extractor": features(width=6)}, "holds the weights of another model"),
        ({"backbone": replaced(custom(), "fc", nn.Linear(8, 5)), "extractor": features()}, "weights of another model"),
    ],
)
def test_parts_of_another_kind_are_refused(saved, parts, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_pretrained(saved[0], **parts)
    assert str(saved[0]) in str(refused.value)


def test_frozen_parts_of_the_backbone_stay_in_their_mode():
    backbone = custom().train()
    backbone.stem.eval()
    before = [module.training for module in backbone.modules()]
    gate(backbone, IMAGES)
    assert [module.training for module in backbone.modules()] == before


@pytest.mark.parametrize(("name", "size"), [("resnet50", (168, 168)), ("resnet18", (64, 512))])
def test_default_gater_keeps_within_its_budget_as_a_whole(name, size):
    images = torch.zeros(1, 3, *size)
    macs = count_macs(gate(create_backbone(f"torchvision:{name}").eval(), images), images)
    assert macs.backbone > 0.5e9
    assert macs.gater <= 0.05 * macs.backbone


def test_a_bottleneck_of_0_is_refused():
    with pytest.raises(ValueError, match="bottleneck must be at least 1"):
        gate(custom(), IMAGES, bottleneck=0)


@pytest.mark.parametrize("name", ["resnet20", "timm:test_resnet"])
def test_networks_of_create_backbone_that_were_changed_are_not_described(name):
    part = "layer1.0.se" if name == "resnet20" else "act1"
    network = replaced(create_backbone(name), part, nn.Sigmoid())  # no weights that would tell
    assert describe_backbone(network, 3) is None


def test_torchvision_with_0_classes_is_refused():
    with pytest.raises(ValueError, match="resnet18 gives no features without its classifier"):
        create_backbone("torchvision:resnet18", 0)


def test_gated_models_of_timm_are_not_made_by_name():
    with pytest.raises(ValueError, match="unknown model of timm 'test_resnet_gated'"):
        create_model("timm:test_resnet_gated")


def test_there_are_no_trained_weights_of_gated_models():
    with pytest.raises(ValueError, match="no trained weights"):
        create_model("resnet20_gated", pretrained=True)


def test_timm_models_that_have_no_trained_weights_say_so(no_network):
    with pytest.raises(ValueError, match="trained weights of timm:botnet50ts_256"):
        create_backbone("timm:botnet50ts_256", pretrained=True)


def test_a_model_in_double_precision_comes_back_the_same(tmp_path):
    images = IMAGES.double()
    model = gate(create_backbone("resnet20").double().eval(), images).eval()
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_pretrained(tmp_path).parameters()} == {torch.float64}


# --- Neighbours that share a gate


@pytest.mark.parametrize("size", [2, 4, 5])
def test_a_group_shares_a_gate(size, tmp_path):
    """Each gate opens its group's filters: the same as single gates that agree within the groups."""
    backbone = create_backbone("timm:mobilenetv3_small_050", 10).eval()
    single = gate(copy.deepcopy(backbone), PIXELS, gater=features(), sites="all").eval()
    model = gate(backbone, PIXELS, gater=features(), sites="all", group_size=size).eval()
    gates = torch.randint(2, (2, model.num_gates), generator=seeded(2)).float()
    repeated = torch.zeros(2, single.num_gates)
    for site, alone in zip(model.sites, single.sites, strict=True):
        assert site.channels == alone.channels
        assert site.group_size == math.gcd(size, alone.channels)
        repeated[:, alone.columns] = gates[:, site.columns]
    with torch.no_grad():
        expected = single.forward_gated(PIXELS, repeated)
        assert torch.equal(model.forward_gated(PIXELS, gates), expected)
        skipped = skip(model, PIXELS, "slice").forward_gated(PIXELS, gates)
        torch.testing.assert_close(skipped, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    costs = [CostModel(read_graph(backbone, PIXELS[:1]), m.sites)(g) for m, g in ((model, gates), (single, repeated))]
    assert torch.equal(*costs)
    model.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, extractor=features()).sites == model.sites


def test_a_group_has_at_least_one_filter():
    with pytest.raises(ValueError, match="group_size must be at least 1, but is 0"):
        gate(custom(), IMAGES, group_size=0)
