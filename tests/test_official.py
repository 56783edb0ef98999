"""Checkpoints in the layout of the paper's public evaluation code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gated_models import assert_same, gated_model, truncate
from torch import Tensor

from gaternet.checkpoint import load_pretrained
from gaternet.method import Gater, GaterNet
from gaternet.official import load_official_checkpoint


def official_name(name: str) -> str:
    """layer2.0.downsample.1.bias -> stage2.block1.shortcut.bn.bias; conv1, bn1 and fc outside stages lose the 1."""
    parts = name.split(".")
    if not parts[0].startswith("layer"):
        return ".".join([parts[0].removesuffix("1"), *parts[1:]])
    stage, unit, *rest = parts
    if rest[0] == "downsample":
        rest = ["shortcut", ("conv", "bn")[int(rest[1])], *rest[2:]]
    return ".".join([stage.replace("layer", "stage"), f"block{int(unit) + 1}", *rest])


def in_official_layout(model: GaterNet, prefix: str) -> dict[str, dict[str, Tensor]]:
    assert isinstance(model.gater, Gater)
    gater = {f"resnet.{official_name(name)}": t for name, t in model.gater.extractor.state_dict().items()}
    gater |= {f"resnet.newfc.{name}": tensor for name, tensor in model.gater.fc1.state_dict().items()}
    gater |= {f"fnn.fc.0.{name}": tensor for name, tensor in model.gater.fc2.state_dict().items()}
    backbone = {official_name(name): tensor for name, tensor in model.backbone.state_dict().items()}
    return {
        "backbone_state_dict": {prefix + name: tensor for name, tensor in backbone.items()},
        "gater_state_dict": {prefix + name: tensor for name, tensor in gater.items()},
    }


@pytest.mark.parametrize(("depth", "prefix"), [(20, "module."), (56, ""), (56, "module.")])
def test_official_layout_says_depth_classes_and_bottleneck(tmp_path, depth, prefix):
    model = gated_model(f"resnet{depth}_gated", num_classes=7, bottleneck=5, batch_norm=False)
    torch.save(in_official_layout(model, prefix), tmp_path / "model.pth")
    loaded = load_official_checkpoint(tmp_path / "model.pth")
    assert isinstance(model.gater, Gater)
    assert isinstance(loaded.gater, Gater)
    assert 1.2 / (1 + np.exp(-loaded.gater.threshold)) - 0.1 == pytest.approx(0.49999, abs=1e-12)  # that code's rule
    model.gater.threshold = loaded.gater.threshold
    assert_same(loaded, model)
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load_pretrained(tmp_path / "again"), model)


def test_official_checkpoint_gives_what_the_public_code_computes(shared):
    model = load_official_checkpoint(shared / "data" / "official_layout" / "resnet20_gated.pth")
    expected = np.load(shared / "data" / "official_layout" / "resnet20_gated_expected.npz")
    images = torch.from_numpy(expected["images"])
    with torch.no_grad():
        logits, gates = model(images, return_gates=True)
        assert isinstance(model.gater, Gater)
        np.testing.assert_allclose(model.gater.logits(images), expected["gate_preactivations"], rtol=0, atol=1e-5)
    assert np.array_equal(gates, expected["gates"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def without(state: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    return {**state, part: {key: value for key, value in state[part].items() if name not in key}}


NOT_OFFICIAL: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda state: torch.ones(3), "does not hold a dict of named tensors, but a Tensor"),
    (lambda state: state["backbone_state_dict"], "not in the public code's layout: it has no backbone_state_dict"),
    (lambda state: {**state, "gater_state_dict": 1}, "not in the public code's layout: it has no gater_state_dict"),
    (lambda state: without(state, "backbone_state_dict", "stage"), "layout: its tensors do not fit"),
    (lambda state: without(state, "backbone_state_dict", "stage3.block2"), "layout: its tensors do not fit"),
    (lambda state: without(state, "gater_state_dict", "newfc"), "layout: its tensors do not fit"),
    (lambda state: without(state, "backbone_state_dict", "block3"), "unknown model 'resnet14'"),
]


@pytest.mark.parametrize(("change", "message"), NOT_OFFICIAL)
def test_a_file_of_another_layout_is_refused_with_its_path(tmp_path, change, message):
    path = tmp_path / "model.pth"
    torch.save(change(in_official_layout(gated_model(batch_norm=False), "module.")), path)
    with pytest.raises(ValueError, match=message) as refused:
        load_official_checkpoint(path)
    assert str(path) in str(refused.value)


def test_a_truncated_official_checkpoint_is_refused_with_its_path(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(in_official_layout(gated_model(batch_norm=False), ""), path)
    truncate(path)
    with pytest.raises(ValueError, match=r"model\.pth is truncated or no PyTorch file"):
        load_official_checkpoint(path)


@pytest.mark.parametrize(
    "backbone",
    [
        {0: torch.ones(1)},
        {"stage1.block1.conv1.weight": 1},
        {"stage1.block1.conv1.weight": torch.ones(1), "fc.weight": torch.tensor(5)},
    ],
)
def test_an_official_layout_without_named_tensors_is_refused(tmp_path, backbone):
    torch.save({"backbone_state_dict": backbone, "gater_state_dict": {}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not in the public code's layout"):
        load_official_checkpoint(tmp_path / "model.pth")
