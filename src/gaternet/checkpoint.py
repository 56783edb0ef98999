"""What is saved, how it is loaded.

A saved model is a folder: `config.json` (plain data: how to rebuild the model, its gater's options, its sites, and what
else `metadata` holds) and `model.safetensors`. Training state is one file beside it. Writes are atomic: a reader, or a
machine that dies, sees the old file or the new one. No pickle is ever executed.
"""

import argparse
import inspect
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save_model as save_safetensors
from torch import nn

from gaternet.graph import first_line
from gaternet.method import Gater, GaterNet, GateSite
from gaternet.models.create import build_gated, create_backbone, fitting

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and put it in `path`'s place.

    Raises OSError, with `path` as it was, where the file cannot be written (a full disk, say).
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, name a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # of this thread, on any machine, alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # as the umask has it: safetensors makes files that their owner alone can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # where there can be no such file, the error is that of writing
            temporary.unlink()


def make_folder(path: Path) -> None:
    """Make a folder that is to be written into, if it is not there; OSError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise OSError(f"{path} is a file, not a folder: name another") from error
    except OSError as error:
        raise OSError(f"cannot write into {path} ({error.strerror}): mend its permissions, or name another") from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """The error to raise where `path` could not be written."""
    return OSError(f"cannot write {path} ({error}): free some space or mend its permissions; what was saved is whole")


def write_json(path: Path, data: Any) -> None:
    """Write plain data to `path`, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(data, indent=2) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """The plain data in `path`; ValueError if it is damaged."""
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): restore it from a copy") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a JSON object: is it a file of gaternet's?")
    return data


@contextmanager
def staged(directory: Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """A folder to fill, whose files then replace those of `directory`, but for the names in `keep` that it has."""
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=directory))
    try:
        yield staging
        for path in staging.iterdir():
            if not (path.name in keep and (directory / path.name).exists()):
                path.replace(directory / path.name)
    finally:
        shutil.rmtree(staging)


def save_model(model: nn.Module, directory: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `directory`/config.json and `directory`/model.safetensors.

    Args:
        model: a GaterNet, or a plain network.
        directory: made if it does not exist.
        metadata: plain data: "backbone" (and, for a GaterNet, "extractor") are the arguments of `create_backbone`,
            without which the model cannot be loaded by itself; the rest is kept as it is. Default: the model's own.
            A description that the backbone no longer fits, since it was changed after gating, is left out.
    """
    config: dict[str, Any] = {"gaternet": version("gaternet")}
    if isinstance(model, GaterNet):
        given = metadata or model.metadata or {}
        metadata = fitting(given, model)
        if given.get("backbone") and not metadata["backbone"]:
            warnings.warn("the backbone was changed after it was gated: load it with backbone=...", stacklevel=2)
        config["gater"] = _gater_options(model.gater)
        config["sites"] = [asdict(site) for site in model.sites]
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain data, as JSON has it: {first_line(error)}") from error
    write_atomically(directory / WEIGHTS, lambda path: save_safetensors(model, str(path)))
    write_json(directory / CONFIG, {**config, "metadata": metadata})


def load_model(
    directory: Path, backbone: nn.Module | None = None, extractor: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model saved in `directory`, in evaluation mode on the CPU, and its metadata.

    Args:
        directory: written by `save_model` or `GaterNet.save_pretrained`.
        backbone, extractor: networks of the saved architecture, for parts that `create_backbone` does not know; their
            weights are overwritten.

    Raises:
        ValueError: what is there is no saved model, or damaged, or does not fit together.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no saved model: {name} is missing")
    config = read_json(directory / CONFIG)
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{directory / CONFIG} does not describe a model of gaternet's: its metadata are no object")
    for part, given in (("backbone", backbone), ("extractor", extractor)):
        if given is not None and not isinstance(given, nn.Module):
            raise TypeError(f"{part} must be a network, not {given!r:.60}: make it first, say by timm.create_model")
        if isinstance(metadata.get(part), dict) and "pretrained" in metadata[part]:  # a file starts no download
            raise ValueError(f"{directory / CONFIG} wants trained weights for its {part}, but has its own: remove that")
    for part, given in (("backbone", backbone), ("extractor", extractor)):
        if given is None and not metadata.get(part) and (part == "backbone" or "gater" in config):
            raise ValueError(f"{directory / CONFIG} does not say how its {part} was built: load it with {part}=...")
    if "gater" in config and config["gater"] is None:
        raise ValueError(f"{directory / CONFIG} does not say how its gater was built: load the weights by hand")
    try:
        if "gater" in config:
            sites = [GateSite(**site) for site in config["sites"]]
            model = build_gated(metadata, config["gater"], sites, backbone, extractor)
        else:
            model = backbone or create_backbone(**metadata["backbone"])
    except (AttributeError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG} does not describe a model of gaternet's ({error!r:.300})") from error
    load_weights_(model, directory / WEIGHTS)
    return model.eval(), metadata


def _gater_options(gater: nn.Module) -> dict[str, Any] | None:
    if type(gater) is not Gater:  # somebody's own, such as a subclass: it is theirs to rebuild
        return None
    options = {name: float(getattr(gater, name)) for name in ("noise_std", "hard_probability", "threshold")}
    return {
        "num_features": gater.fc1.in_features,
        "bottleneck": gater.fc1.out_features,
        "batch_norm": not isinstance(gater.norm, nn.Identity),
        **options,
    }


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`, in the file's precision; ValueError if damaged or of another model.

    What lies in two places of the model is in the file once.
    """
    try:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()} & _PRECISIONS.keys()  # noqa: SIM118
        if len(kinds) == 1:
            model.to(dtype=_PRECISIONS[min(kinds)])
        state, own = load_file(path), model.state_dict(keep_vars=True)
        held = {id(own[name]): tensor for name, tensor in state.items() if name in own}
        state |= {name: held[id(own[name])] for name in own.keys() - state if id(own[name]) in held}
        for name in own.keys() & state if len(kinds) > 1 else ():  # each in its own
            if state[name].is_floating_point():
                own[name].data = own[name].data.to(state[name].dtype)
        model.load_state_dict(state)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): restore it from a copy") from error
    except RuntimeError as error:  # PyTorch's list of keys and shapes that do not fit
        first = [line.strip() for line in str(error).splitlines() if line.strip()][1:2] or [str(error)]
        raise ValueError(f"{path} holds the weights of another model: {first[0]}") from error


def load_pretrained(
    model_id: str | Path, *, backbone: nn.Module | None = None, extractor: nn.Module | None = None, **hub_options: Any
) -> GaterNet:
    """The GaterNet in a local folder or on the Hugging Face Hub, in evaluation mode; also `GaterNet.from_pretrained`.

    Args:
        model_id: the folder, or the Hub's "owner/name".
        backbone, extractor: see `load_model`.
        hub_options: of huggingface_hub's `snapshot_download`: revision, token, cache_dir, local_files_only, ...

    Raises:
        ValueError: there is no GaterNet there, or it is damaged.
        FileNotFoundError: there is no such folder, and no such model on the Hub.
        TypeError: for an option that there is not.
    """
    if unknown := hub_options.keys() - inspect.signature(snapshot_download).parameters:
        raise TypeError(f"there is no option {min(unknown)!r}: give backbone, extractor, or one of snapshot_download's")
    directory = Path(model_id)
    if not directory.is_dir() and (isinstance(model_id, Path) or directory.is_absolute()):
        raise FileNotFoundError(f"there is no folder {model_id}: name one that save_pretrained wrote")
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(str(model_id), allow_patterns=[CONFIG, WEIGHTS], **hub_options))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"{model_id} is no folder here, nor a model that the Hub gives ({first_line(error)}): check the name, "
                "or the connection"
            ) from error
    model, _ = load_model(directory, backbone, extractor)
    if not isinstance(model, GaterNet):
        raise ValueError(f"{model_id} holds a plain network, not a GaterNet: use gaternet.checkpoint.load_model")
    return model


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write training state (tensors, numbers, strings, and lists and dicts of them), atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_tensors(path: Path) -> dict[str, Any]:
    """What a .safetensors file holds, or `torch.save` wrote: tensors and plain data; nothing else is ever unpickled.

    Plain data are also the arguments of a script (argparse.Namespace), which timm's checkpoints hold.

    Raises:
        ValueError: the file is damaged, or holds other Python objects (which could be malicious).
        OSError: it cannot be opened.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's guesses at the origin of a strange pickle
            known = argparse.Namespace in torch.serialization.get_safe_globals()
            with nullcontext() if known else torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects, which are refused because they could run code: "
            "get it from its source again, saved as a state_dict"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): get it from its source again") from error
    except Exception as error:  # on bytes that are no such file, PyTorch's reader raises whatever they lead it to
        raise ValueError(f"{path} is truncated or no PyTorch file: get it from its source again") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} does not hold a dict of named tensors, but a {type(data).__name__}")
    return data


def load_official_checkpoint(path: str | Path) -> GaterNet:
    """A GaterNet from a file in the layout of the paper's public evaluation code, in evaluation mode.

    That layout is a dict with `backbone_state_dict` and `gater_state_dict`, keys possibly prefixed `module.`. Depth,
    classes and bottleneck are read from the tensors. Gates equal that code's: it opens a gate where the soft gate is
    above 0.49999, that is where the logit is above -3.3e-5.

    Raises:
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
        parts[part] = {key.replace("module.", ""): value for key, value in tensors.items()}
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
        raise ValueError(f"{path} is not in the public code's layout: its tensors do not fit ({error})") from error
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
