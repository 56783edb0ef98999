"""Gated networks come back from the disk: by themselves, or with parts of the user's own."""

import copy
import json
from pathlib import Path
from typing import cast

import pytest
import timm
import torch
from gated_models import assert_same, gater_of, shrink_of, spoiled
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from small_networks import IMAGES, PIXELS, Net, conv, custom, features, replaced
from torch import nn

from gaternet import GaterNet, checkpoint, gate, load_pretrained
from gaternet.checkpoint import load_model
from gaternet.models.create import create_backbone


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


@pytest.mark.parametrize("change", ["classifier", "activation", "method", "hook"])
def test_a_backbone_that_was_changed_after_gating_does_not_come_back_as_it_was(tmp_path, change):
    model = spoiled(gate(create_backbone("timm:test_resnet", 4), PIXELS))
    if change == "classifier":
        model.backbone.set_submodule("fc", nn.Linear(model.backbone.get_submodule("fc").in_features, 3))  # pyright: ignore[reportArgumentType]
    elif change == "activation":
        model.backbone.set_submodule("act1", nn.SiLU())
    elif change == "method":
        model.backbone.global_pool.forward = lambda x: x.amax((2, 3))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        model.backbone.get_submodule("layer1").register_forward_hook(lambda _module, _args, output: output.mul(2))
    with pytest.warns(UserWarning, match=r"the backbone was changed after gating: load the model with backbone=\.\.\."):
        model.save_pretrained(tmp_path)
    assert 'this folder", backbone=backbone)' in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"does not say how its backbone was built: load it with backbone=\.\.\."):
        load_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path, backbone=copy.deepcopy(model).ungate()), model, PIXELS)


@pytest.mark.parametrize("first", ["change", "gate"])
def test_what_matters_in_training_alone_may_be_another(tmp_path, first):
    network = create_backbone("timm:test_resnet", 4)
    if first == "change":  # as it must be for modules that are new
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network.eval())
    model = spoiled(gate(network, PIXELS))
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.momentum = 0.01
        if isinstance(module, nn.ReLU):
            module.inplace = not module.inplace
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model, PIXELS)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda part: nn.DataParallel(cast(nn.Module, torch.compile(part)))]
)
@pytest.mark.parametrize("name", ["backbone", "backbone.layer1", "gater.extractor"])
def test_what_compiles_or_spreads_a_part_is_not_saved(tmp_path, wrap, name):
    model = spoiled(gate(create_backbone("timm:test_resnet", 4), PIXELS))
    own = copy.deepcopy(model)
    part = wrap(model.get_submodule(name))
    model.set_submodule(name, part)
    model.save_pretrained(tmp_path)
    assert model.get_submodule(name) is part
    assert_same(load_pretrained(tmp_path), own, PIXELS)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_backbone_is_refused(wrap):
    network = wrap(create_backbone("timm:test_resnet", 4))
    kind = type(network).__name__
    with pytest.raises(ValueError, match=f"gate what the {kind} wraps, and wrap or compile the GaterNet instead"):
        gate(network, PIXELS)


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


def test_an_option_that_no_list_of_modules_shows_is_not_forgotten(tmp_path):
    network = timm.create_model("test_nfnet", alpha=1.5)
    gate(network, torch.randn(1, 3, 32, 32), gater="resnet8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not say how its backbone was built: load it with backbone=\.\.\."):
        load_pretrained(tmp_path)


def test_complex_weights_come_back_the_same(tmp_path):
    def spectral() -> Net:
        waves = nn.Parameter(torch.randn(8, 8, 5, dtype=torch.cfloat))
        return Net(lambda net, x: torch.fft.irfft2(torch.fft.rfft2(net.a(x)) * net.waves), a=conv(3, 8), waves=waves)

    model = gate(spectral().eval(), IMAGES, sites=lambda name, _: name == "a").eval()
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path, backbone=spectral()), model, IMAGES)


def test_a_model_in_double_precision_comes_back_the_same(tmp_path):
    images = IMAGES.double()
    model = gate(create_backbone("resnet20").double().eval(), images).eval()
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_pretrained(tmp_path).parameters()} == {torch.float64}


@pytest.mark.parametrize("error", [HFValidationError("Repo id"), LocalEntryNotFoundError("no connection")])
def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch, error):
    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="someone/model is no folder here, nor a model that the Hub gives"):
        load_pretrained("someone/model")


def test_a_timm_model_whose_classifier_was_replaced_after_gating_comes_back_by_itself(tmp_path):
    for network in (timm.create_model("test_resnet", num_classes=7), create_backbone("timm:test_resnet", 7)):
        model = gate(network, PIXELS)
        cast(timm.models.ResNet, model.backbone).reset_classifier(3)
        spoiled(model).save_pretrained(tmp_path)  # without a warning
        assert_same(load_pretrained(tmp_path), model, PIXELS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["metadata"]["backbone"] == {"name": "timm:test_resnet", "num_classes": 3, "in_chans": 3}


def test_a_timm_model_that_was_passed_in_is_described_when_it_is_saved_again(tmp_path):
    model = spoiled(gate(timm.create_model("test_resnet", num_classes=4), PIXELS))
    model.metadata["backbone"] = None
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model, PIXELS)


def test_a_gaternet_that_gave_its_backbone_back_is_not_saved(tmp_path):
    model = gate(custom(), IMAGES)
    model.ungate()
    with pytest.raises(ValueError, match=r"gave its backbone back with ungate\(\): save a new one around it"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.glob("model/*"))


def test_a_gater_whose_layers_were_replaced_is_not_taken_for_an_usual_one(tmp_path):
    model = gate(create_backbone("timm:test_resnet", 4), PIXELS)
    model.gater.fc2 = nn.Linear(8, model.num_gates, bias=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how its gater was built"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["meta", "subclass"])
def test_tensors_that_a_file_cannot_hold_are_named(tmp_path, kind):
    model = gate(create_backbone("timm:test_resnet", 4), PIXELS)
    if kind == "meta":
        model.to("meta")
    else:  # as a network that is spread over devices has them
        model.gater.register_buffer("spread", torch.zeros(2).as_subclass(_Spread))
    with pytest.raises(ValueError, match="files hold plain tensors: save a model that is not on the device meta, nor"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class _Spread(torch.Tensor):
    pass
