"""Checkpoints in the layout of the paper's public evaluation code."""

import math
import re
from pathlib import Path

import torch

from gaternet.errors import first_misfit
from gaternet.files import load_tensors
from gaternet.method import GaterNet
from gaternet.models.create import build_gated


def load_official_checkpoint(path: str | Path) -> GaterNet:
    """A GaterNet from a file in the layout of the paper's public evaluation code, in evaluation mode.

    That layout is a dict with `backbone_state_dict` and `gater_state_dict`, keys possibly prefixed `module.`. Depth,
    classes and bottleneck are read from the tensors. Gates equal that code's: it opens a gate where the soft gate is
    above 0.49999, that is where the logit is above -3.3e-5.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, unsafe, or of another layout.
    """
    saved = load_tensors(Path(path))
    parts = {}
    for part in ("backbone", "gater"):
        tensors = saved.get(f"{part}_state_dict")
        if not isinstance(tensors, dict):
            raise ValueError(f"{path} is not in the public code's layout: it has no {part}_state_dict")
        if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()):
            raise ValueError(f"{path} is not in the public code's layout: its {part}_state_dict is no state_dict")
        parts[part] = {key.removeprefix("module."): value for key, value in tensors.items()}
    state = {f"backbone.{_our_key(key)}": value for key, value in parts["backbone"].items()}
    for key, value in parts["gater"].items():
        state[_our_gater_key(key)] = value
    try:
        units = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("backbone.layer1."))
        num_classes, bottleneck = len(state["backbone.fc.weight"]), len(state["gater.fc1.weight"])
        model = build_gated(
            {
                "backbone": {"name": f"resnet{6 * units + 2}", "num_classes": num_classes},
                "extractor": {"name": "resnet20"},
            },
            {"bottleneck": bottleneck, "batch_norm": False, "threshold": _official_threshold()},
        )
        model.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        why = first_misfit(error)
        raise ValueError(f"{path} is not in the public code's layout: its tensors do not fit ({why})") from error
    return model.eval()


def _official_threshold() -> float:
    probability = (0.49999 + 0.1) / 1.2  # inverts the soft gate, 1.2 * sigmoid - 0.1
    return math.log(probability / (1 - probability))


def _our_key(key: str) -> str:
    """stage1.block2.shortcut.conv.weight -> layer1.1.downsample.0.weight"""
    key = re.sub(r"^stage(\d+)\.block(\d+)\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.", key)
    key = key.replace("shortcut.conv.", "downsample.0.").replace("shortcut.bn.", "downsample.1.")
    return re.sub(r"^(conv|bn)\.", r"\g<1>1.", key)


def _our_gater_key(key: str) -> str:
    if key.startswith("resnet.newfc."):
        return key.replace("resnet.newfc.", "gater.fc1.")
    if key.startswith("fnn.fc.0."):
        return key.replace("fnn.fc.0.", "gater.fc2.")
    return f"gater.extractor.{_our_key(key.removeprefix('resnet.'))}"
