"""Gated models, what is in them, and how two are compared."""

from pathlib import Path
from typing import Any

import torch
from small_networks import IMAGES
from torch import Tensor, nn

from gaternet import GaterNet, create_model
from gaternet.method import Gater

OPTIONS: dict[str, Any] = {
    "bottleneck": 3,
    "batch_norm": True,
    "noise_std": 0.5,
    "hard_probability": 0.25,
    "threshold": 0.02,
}


def assert_same(model: nn.Module, other: nn.Module, images: Tensor = IMAGES) -> None:
    """In what they compute, in evaluation, and in what they hold."""
    for ours, theirs in zip(model(images, return_gates=True), other(images, return_gates=True), strict=True):
        assert torch.equal(ours, theirs)
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def spoiled(model: GaterNet) -> GaterNet:
    """With BatchNorms that are not as new."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model.eval()


def gated_model(name: str = "resnet20_gated", num_classes: int = 5, **options: Any) -> GaterNet:
    """In evaluation mode, with BatchNorms that have seen images, so that nothing stands at its default."""
    torch.manual_seed(0)
    model = create_model(name, num_classes, **{**OPTIONS, **options})
    assert isinstance(model, GaterNet)
    with torch.no_grad():
        spoiled(model).train()(IMAGES)
        model.backbone(IMAGES)
    return model.eval()


def contents(directory: Path) -> dict[str, bytes]:
    """All that is in a folder, hidden files too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def gater_of(model: GaterNet) -> Gater:
    assert isinstance(model.gater, Gater)
    return model.gater


def shrink_of(model: GaterNet) -> int:
    extractor = gater_of(model).extractor
    return int(extractor[0].kernel_size) if isinstance(extractor, nn.Sequential) else 1  # pyright: ignore[reportArgumentType]
