"""What is saved comes back the same, and a failing save leaves the old model as it was."""

import errno
import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import huggingface_hub.hub_mixin
import pytest
import torch
from gated_models import OPTIONS, assert_same, contents, gated_model, gater_of, truncate
from safetensors import SafetensorError
from small_networks import IMAGES
from torch import Tensor, nn

from gaternet import checkpoint
from gaternet.checkpoint import load_model, load_pretrained, save_model
from gaternet.gating import gate
from gaternet.method import Gater, GaterNet
from gaternet.models import create_model
from gaternet.modes import channels_last_


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    gated_model().save_pretrained(directory)
    return directory


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A saved model that the test may spoil."""
    return Path(shutil.copytree(saved_once, tmp_path / "model"))


# --- Our own layout


@pytest.mark.parametrize("load", [GaterNet.from_pretrained, load_pretrained, lambda path: load_model(path)[0]])
def test_what_is_saved_comes_back_the_same(saved, load: Callable[[Path], GaterNet]):
    model = load(saved)
    assert_same(model, gated_model())
    assert not model.training
    assert {name: getattr(model.gater, name) for name in ("noise_std", "hard_probability", "threshold")} == {
        name: OPTIONS[name] for name in ("noise_std", "hard_probability", "threshold")
    }


@pytest.mark.parametrize("options", [{"batch_norm": False}, {"bottleneck": 7, "extractor": "resnet20_se"}])
def test_other_gaters_come_back_the_same(tmp_path, options):
    model = gated_model(**options)
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(str(tmp_path)), model)


def test_each_tensor_comes_back_in_its_own_precision(tmp_path):
    model = create_model("resnet8_gated").eval().bfloat16()
    assert isinstance(model, GaterNet)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.float()
    model.save_pretrained(tmp_path)
    loaded = GaterNet.from_pretrained(tmp_path)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == kinds
    images = torch.rand(2, 3, 32, 32).bfloat16()
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("part", ["backbone", "extractor"])
@pytest.mark.usefixtures("unchecked_types")
def test_parts_to_load_into_must_be_networks(saved, part):
    with pytest.raises(TypeError, match=f"{part} must be a network, not 'resnet20': make it first"):
        load_pretrained(saved, **{part: cast(Any, "resnet20")})


def test_config_is_plain_data_that_says_how_the_model_is_built(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["gater"] == {"num_features": 64, **OPTIONS}
    assert config["metadata"]["backbone"] == {"name": "resnet20", "num_classes": 5, "in_chans": 3}
    assert config["metadata"]["extractor"] == {"name": "resnet20", "in_chans": 3}
    assert len(config["sites"]) == 9
    assert config["sites"][1] == {
        "name": "layer1.1.bn2",
        "conv": "layer1.1.conv2",
        "start": 16,
        "stop": 32,
        "group_size": 1,
        "role": "residual",
    }
    assert contents(saved).keys() == {"config.json", "model.safetensors", "README.md"}


def test_model_in_channels_last_memory_format_comes_back_the_same(tmp_path):
    model = gated_model()
    channels_last_(model)
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), gated_model())


def test_plain_network_is_saved_with_its_metadata_and_is_no_gaternet(tmp_path):
    net = create_model("resnet20", 5).eval()
    metadata = {"backbone": {"name": "resnet20", "num_classes": 5}, "classes": ["a", "b", "c", "d", "e"]}
    save_model(net, tmp_path, metadata)
    loaded, loaded_metadata = load_model(tmp_path)
    assert loaded_metadata == metadata
    assert torch.equal(loaded(IMAGES), net(IMAGES))
    with pytest.raises(ValueError, match="holds a plain network, not a GaterNet"):
        load_pretrained(tmp_path)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        gated_model().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "model").iterdir()} == {"640"}


def test_saving_again_replaces_the_model_and_keeps_the_users_readme(saved):
    (saved / "README.md").write_text("mine")
    (saved / "notes.txt").write_text("mine, too")
    model = gated_model(bottleneck=4)
    model.save_pretrained(saved)
    assert_same(load_pretrained(saved), model)
    assert contents(saved).keys() == {"config.json", "model.safetensors", "README.md", "notes.txt"}
    assert (saved / "README.md").read_text() == "mine"


def full_disk(monkeypatch: pytest.MonkeyPatch, at_file: int) -> None:
    """The n-th file that is written, counted from 1, does not reach the disk."""
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == at_file:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("at_file", [1, 2])
def test_a_full_disk_leaves_the_old_model_as_it_was(saved, monkeypatch, at_file):
    before = contents(saved)
    full_disk(monkeypatch, at_file)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device.*what was saved is whole"):
        gated_model(bottleneck=4).save_pretrained(saved)
    assert contents(saved) == before
    assert not [path for path in saved.iterdir() if path.is_dir()]


def test_an_error_of_safetensors_leaves_the_old_model_as_it_was(saved, monkeypatch):
    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device")

    before = contents(saved)
    monkeypatch.setattr(checkpoint, "save_file", half)
    for save in (lambda: gated_model().save_pretrained(saved), lambda: save_model(gated_model(), saved)):
        with pytest.raises(OSError, match=r"cannot write .*No space left on device"):
            save()
        assert contents(saved) == before


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_metadata(directory: Path, **changes: Any) -> None:
    before = json.loads((directory / "config.json").read_text())["metadata"]
    edit_config(directory, metadata={**before, **changes})


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda saved: (saved / "config.json").unlink(), "holds no saved model: config.json is missing"),
    (lambda saved: (saved / "model.safetensors").unlink(), "holds no saved model: model.safetensors is missing"),
    (lambda saved: truncate(saved / "config.json"), "config.json is damaged"),
    (lambda saved: (saved / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
    (lambda saved: (saved / "config.json").write_text("[1]"), "config.json does not hold a JSON object"),
    (lambda saved: edit_config(saved, metadata=None), "config.json does not say how its backbone was built"),
    (lambda saved: edit_config(saved, metadata={"backbone": {}}), "config.json does not say how its backbone was"),
    (lambda saved: edit_config(saved, gater={"width": 3}), "config.json does not describe a model"),
    (
        lambda saved: edit_config(saved, metadata={"backbone": {"name": "vgg"}, "extractor": {"a": 1}}),
        "unknown model 'vgg",
    ),
    (lambda saved: edit_config(saved, metadata=[1]), "config.json does not describe a model"),
    (lambda saved: edit_metadata(saved, backbone={"name": 5}), "config.json does not describe a model"),
    (lambda saved: edit_metadata(saved, extractor={"name": 5}), "config.json does not describe a model"),
    (lambda saved: edit_metadata(saved, extractor={"name": "resnet8", "in_chans": -1}), "does not describe a model"),
    (lambda saved: edit_metadata(saved, backbone={"name": "resnet8", "pretrained": True}), "wants trained weights"),
    (lambda saved: edit_config(saved, gater={**OPTIONS, "threshold": "half"}), "config.json does not describe a model"),
    (lambda saved: (saved / "config.json").write_text("[" * 99999), "config.json is damaged"),
    (lambda saved: (saved / "config.json").write_text('{"a": ' + 5000 * "9" + "}"), "config.json is damaged"),
    (lambda saved: edit_config(saved, sites=[]), "config.json does not describe a model"),
    (lambda saved: edit_config(saved, sites=[{"name": "x"}]), "config.json does not describe a model"),
    (lambda saved: truncate(saved / "model.safetensors"), "model.safetensors is damaged or no safetensors file"),
    (lambda saved: (saved / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or no safetensors"),
    (lambda saved: edit_config(saved, gater={"bottleneck": 4}), "model.safetensors holds the weights of another model"),
    (
        lambda saved: edit_config(saved, gater={**OPTIONS, "batch_norm": False}),
        "model.safetensors holds the weights of another model: Unexpected key",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_model_is_refused_with_its_path(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message) as refused:
        load_pretrained(saved)
    assert str(saved) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_class_method_names_the_path_of_a_damaged_config_too(saved):
    truncate(saved / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        GaterNet.from_pretrained(saved)


@pytest.mark.parametrize("load", [load_pretrained, GaterNet.from_pretrained])
def test_a_model_comes_from_the_hub_by_name(saved, monkeypatch, load):
    asked: dict[str, Any] = {}

    @functools.wraps(checkpoint.snapshot_download)
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        asked.update(signature.bind(*args, **kwargs).arguments)  # refuses what the real one would
        return str(saved)

    signature = inspect.signature(checkpoint.snapshot_download)
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.hub_mixin, "hf_hub_download", lambda repo_id, filename, **options: str(saved / filename)
    )
    assert_same(load("someone/model", revision="v1"), gated_model())
    assert asked["repo_id"] == "someone/model"
    assert asked["revision"] == "v1"
    assert set(asked["allow_patterns"]) == {"config.json", "model.safetensors"}


def test_a_gater_of_the_users_own_is_saved_but_theirs_to_rebuild(tmp_path):
    model = gated_model()
    gater = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, model.num_gates), nn.Sigmoid())
    own = GaterNet(model.ungate(), gater, model.sites)
    own.metadata |= model.metadata
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how its gater was built: load the weights by hand"):
        load_pretrained(tmp_path)
    before = own(IMAGES)
    for parameter in own.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_weights_(own, tmp_path / "model.safetensors")
    assert torch.equal(own(IMAGES), before)


def test_so_is_a_subclass_of_gater_for_it_may_decide_otherwise(tmp_path):
    class Contrary(Gater):
        def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return 1 - super().forward(images, generator)

    model = gated_model()
    model.gater.__class__ = Contrary
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how its gater was built: load the weights by hand"):
        load_pretrained(tmp_path)


def test_noise_that_was_set_to_a_tensor_is_saved_as_a_number(tmp_path):
    model = gated_model()
    gater_of(model).noise_std = torch.tensor(0.25)  # as a CUDA graph reads it
    model.save_pretrained(tmp_path)
    assert gater_of(load_pretrained(tmp_path)).noise_std == 0.25


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path):
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), Path("nothing")):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nothing: name one that save_pretrained"):
            load_pretrained(path)


class OwnStem(nn.Module):
    """A gater that looks through the backbone's first layers: they lie in two places of the model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(backbone.get_submodule("conv1"), backbone.get_submodule("bn1"))

    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images).mean((2, 3))


def test_layers_in_two_places_come_back(tmp_path):
    images = torch.rand(2, 3, 32, 32)

    def shared() -> GaterNet:
        backbone = create_model("resnet8", 10).eval()
        return gate(backbone, images, gater=OwnStem(backbone)).eval()

    model, other = shared(), create_model("resnet8", 10)
    model.save_pretrained(tmp_path)
    loaded = GaterNet.from_pretrained(tmp_path, backbone=other, extractor=OwnStem(other))
    assert loaded.gater.get_submodule("extractor.stem.0") is loaded.backbone.get_submodule("conv1")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_options_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(TypeError, match="there is no option 'num_classes': give backbone, extractor, or one of"):
        GaterNet.from_pretrained(tmp_path, num_classes=7)
