"""Odd models, and odd folders: what is saved comes back the same, or it is said that it will not; nothing is lost."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import torch
from gated_models import assert_same, contents, gater_of, spoiled
from torch import Tensor, nn

from gaternet.checkpoint import load_model, load_pretrained, save_model
from gaternet.gating import gate
from gaternet.method import GaterNet
from gaternet.models.create import create_backbone

PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> GaterNet:
    torch.manual_seed(0)
    return spoiled(gate(create_backbone("resnet8", 4), PIXELS, gater="resnet8"))


def test_a_run_is_not_lost_to_a_model_that_is_saved_into_its_folder(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(run)
    with pytest.raises(ValueError, match=r"run is a run, whose config\.json this would replace: name another folder"):
        small().save_pretrained(run)
    assert contents(run) == before
    small().save_pretrained(run / "tuned")
    (run / "tuned" / "config.json").write_text("{")  # what is damaged may be replaced
    small().save_pretrained(run / "tuned")
    assert_same(load_pretrained(run / "tuned"), small(), PIXELS)


def test_a_file_is_no_folder_to_save_into(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(OSError, match="model is a file, not a folder: name another"):
        small().save_pretrained(tmp_path / "model")


class Hub:
    """Takes what is uploaded, or does not."""

    def __init__(self, works: bool) -> None:
        self.works, self.configs = works, list[dict[str, Any]]()

    def __call__(self, token: str | None = None) -> "Hub":
        return self

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        if not self.works:
            raise ConnectionError("the line is down")
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, folder_path: Path, **_: Any) -> str:
        self.configs.append(json.loads((Path(folder_path) / "config.json").read_text()))
        return "uploaded"


@pytest.mark.parametrize("works", [True, False])
def test_what_is_shared_is_saved_here_first_and_shared_without_paths(tmp_path, monkeypatch, works):
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", hub := Hub(works))
    model = small()
    model.metadata["trained"] = {"data": "/home/somebody/photos", "seed": 1}
    if works:
        assert model.save_pretrained(tmp_path / "tuned", push_to_hub=True, private=True) == "uploaded"
        assert [config["metadata"]["trained"] for config in hub.configs] == [{"data": "photos", "seed": 1}]
    else:
        with pytest.raises(ConnectionError):
            model.save_pretrained(tmp_path / "tuned", push_to_hub=True)
    loaded = load_pretrained(tmp_path / "tuned")
    assert_same(loaded, model, PIXELS)
    assert loaded.metadata["trained"]["data"] == model.metadata["trained"]["data"] == "/home/somebody/photos"


def test_an_extractor_that_was_changed_after_gating_does_not_come_back_as_it_was(tmp_path):
    model = small()
    extractor: Any = gater_of(model).extractor
    extractor.bn1.eps = 0.5
    with pytest.warns(UserWarning, match=r"the extractor was changed after gating: load the model with extractor="):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not say how its extractor was built: load it with extractor=\.\.\."):
        load_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path, extractor=copy.deepcopy(extractor)), model, PIXELS)


class Calm(GaterNet):
    """Half as sure of itself."""

    def forward(self, images: Tensor, *, return_gates: bool = False) -> Any:
        logits, gates = super().forward(images, return_gates=True)
        return (logits / 2, gates) if return_gates else logits / 2


def test_a_subclass_comes_back_as_one(tmp_path):
    plain = small()
    plain.save_pretrained(tmp_path)
    model = Calm.from_pretrained(tmp_path)
    assert type(model) is Calm
    assert not model.training
    assert torch.equal(model(PIXELS), plain(PIXELS) / 2)
    assert model.metadata == plain.metadata


@pytest.mark.parametrize("second", [2304, 1000, 0], ids=["apart", "overlapping", "the same"])
def test_weights_that_are_parts_of_a_larger_tensor_are_saved_whole(tmp_path, second):
    """As pruning leaves them, or a training that holds all of them in one."""
    model = small()
    convs: list[Any] = [model.backbone.get_submodule(f"layer1.0.conv{number}") for number in (1, 2)]
    many = torch.cat([conv.weight.data.flatten() for conv in convs])
    for conv, start in zip(convs, (0, second), strict=True):
        conv.weight.data = many[start : start + 2304].view(16, 16, 3, 3)
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model, PIXELS)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.2 * sum(4 * parameter.numel() for parameter in model.parameters()) + 20_000


def test_parts_that_share_memory_come_back(tmp_path):
    """By parameters of their own, as where both were filled from one file."""
    state = create_backbone("resnet8", 4).state_dict()
    backbone, extractor = create_backbone("resnet8", 4), create_backbone("resnet8", 0)
    backbone.load_state_dict(state, assign=True)
    extractor.load_state_dict({name: state[name] for name in extractor.state_dict()}, assign=True)
    model = gate(backbone, PIXELS, gater=extractor).eval()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, extractor=create_backbone("resnet8", 0))
    assert_same(loaded, model, PIXELS)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8, eps=1.0), nn.LayerNorm(8), nn.BatchNorm1d(8, affine=False)])
def test_a_norm_of_the_users_own_in_d_is_theirs_to_rebuild(tmp_path, norm):
    model = small()
    gater_of(model).norm = norm
    save_model(model, tmp_path)
    assert "it was built; then load model.safetensors" in str(model.generate_model_card())
    with pytest.raises(ValueError, match="does not say how its gater was built: load the weights by hand"):
        load_model(tmp_path)


def test_a_network_without_numbers_takes_none(tmp_path):
    small().save_pretrained(tmp_path)
    with torch.device("meta"):
        backbone = create_backbone("resnet8", 4)
    with pytest.raises(ValueError, match="the backbone has no numbers, on the device meta: make it on the CPU"):
        load_pretrained(tmp_path, backbone=backbone)


@pytest.mark.parametrize(("option", "value"), [("allow_patterns", "*"), ("repo_id", "a/b")])
def test_options_of_the_hub_that_are_ours_are_refused(option, value):
    with pytest.raises(TypeError, match=f"there is no option '{option}'"):
        load_pretrained("owner/name", **{option: value})


def test_a_number_beyond_all_bounds_in_a_config_is_no_model(tmp_path, unchecked_types):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["gater"]["threshold"] = 10**400
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json does not describe a model of gaternet's"):
        load_pretrained(tmp_path)


def test_the_card_of_a_compiled_part_is_that_of_the_part(tmp_path):
    model = small()
    expected = str(model.generate_model_card())
    model.backbone = torch.compile(model.backbone)  # pyright: ignore[reportAttributeAccessIssue]
    assert str(model.generate_model_card()) == expected
    assert "resnet8-gated" in expected
