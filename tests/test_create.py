"""Networks by name, trained or not, and what makes them again."""

import copy
import re
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from gated_models import assert_same
from small_networks import PIXELS, custom, replaced, seeded
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from gaternet import GaterNet, create_model, load_pretrained
from gaternet.checkpoint import load_model, save_model
from gaternet.cost import count_dense_macs
from gaternet.models.create import create_backbone, create_extractor, describe_backbone, other_classifier


@pytest.mark.parametrize("options", [{"num_classes": 4}, {"num_classes": 0}, {"num_classes": 3, "in_chans": 1}, {}])
def test_timm_models_are_recognised(options):
    network = timm.create_model("test_resnet", **options)
    channels = options.get("in_chans", 3)
    expected = {"name": "timm:test_resnet", "num_classes": options.get("num_classes", 1000), "in_chans": channels}
    assert describe_backbone(network, channels) == expected
    twin = create_backbone(**expected)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(PIXELS[:, :channels]), network.eval()(PIXELS[:, :channels]))


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
        (
            "timm:resnet18.a1_in2k",
            "unknown training of a model of timm 'resnet18.a1_in2k': did you mean 'resnet18.a1_in1k'",
        ),
        ("torchvision:fcn_resnet50", "unknown classification model of torchvision 'fcn_resnet50'"),  # segments
        ("resnet19", "unknown model 'resnet19': did you mean 'resnet1"),
    ],
)
def test_unknown_names_are_refused_with_a_near_one(name, message):
    for create in (create_model, create_backbone):
        with pytest.raises(ValueError, match=message):
            create(name)


def test_torchvisions_networks_say_what_inputs_their_weights_want():
    """Also before these are there: a file may have them."""
    assert cast(Any, create_model("torchvision:resnet18")).pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert cast(Any, create_model("torchvision:googlenet")).pretrained_cfg["std"] == (0.5, 0.5, 0.5)


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


def test_another_classifier_differs_in_its_number_of_classes_alone():
    shapes = {"conv1.weight": (16, 1, 3, 3), "fc.weight": (16, 64), "fc.bias": (16,), "same": (16,)}
    others = shapes | {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 64), "fc.bias": (10,), "more": (3,)}
    wanted, found = ({name: torch.zeros(shape) for name, shape in of.items()} for of in (shapes, others))
    assert other_classifier(wanted, found, 16) == {"fc.weight", "fc.bias"}


def test_torchvisions_trained_weights_of_old_files_are_all_there(monkeypatch):
    """DenseNet's name layers as Python no longer can, and count no batches; torchvision knows how to read them."""
    trained = create_backbone("torchvision:densenet121", 1000).state_dict()
    old = {re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in trained.items()}
    old = {key: value for key, value in old.items() if not key.endswith("num_batches_tracked")}
    assert any(".norm.1." in key for key in old)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(old))
    network = create_backbone("torchvision:densenet121", 4, pretrained=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained[name]) or name.startswith("classifier."), name


def test_torchvisions_trained_weights_for_images_of_another_size_are_refused(monkeypatch):
    """As vit_h_14's are, for 518 pixels."""
    trained = torchvision.models.vit_b_32(image_size=64)
    get = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **kw: trained if kw["weights"] else get(*a, **kw))
    with pytest.raises(ValueError, match=r"vit_b_32 are for images of another size \(encoder.pos_embedding\)"):
        create_backbone("torchvision:vit_b_32", 4, pretrained=True)


def test_torchvisions_trained_weights_come_with_their_own_normalisation(monkeypatch):
    trained = create_backbone("torchvision:efficientnet_v2_l", 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(trained))
    network: Any = create_backbone("torchvision:efficientnet_v2_l", 4, pretrained=True)
    assert network.pretrained_cfg == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


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


@pytest.mark.parametrize("option", [{"bottleneck": 128}, {"extractor": "resnet8"}, {"shrink": 2}, {"noise_std": 0.0}])
def test_a_plain_network_takes_no_options_of_a_gater(option):
    with pytest.raises(ValueError, match=rf"resnet8 has no gater for the option {next(iter(option))}: leave it out"):
        create_model("resnet8", **option)


def test_default_number_of_classes_is_that_of_the_networks_data():
    outputs = {"resnet8": 10, "resnet8_gated": 10, "timm:test_resnet": 1000, "torchvision:squeezenet1_1": 1000}
    for name, classes in outputs.items():
        assert create_model(name).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, classes), name
    with torch.device("meta"):
        assert cast(GaterNet, create_model("resnet34_gated")).backbone.get_submodule("fc").out_features == 1000


@pytest.mark.parametrize("wrong", [{"num_classes": -1}, {"in_chans": 0}])
def test_impossible_numbers_of_classes_and_channels_are_refused(wrong):
    with pytest.raises(ValueError, match="there must be classes and channels, not"):
        create_model("resnet8_gated", **wrong)
