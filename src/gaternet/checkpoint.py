"""Models as folders: what is saved, and how it is loaded.

A saved model is `config.json` (plain data: how to rebuild the model, its gater's options, its sites, and what else
`metadata` holds) and `model.safetensors`. No pickle is ever executed.
"""

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gaternet import __version__
from gaternet.errors import first_line, first_misfit
from gaternet.files import read_json, write_atomically, write_json
from gaternet.method import Gater, GaterNet, GateSite
from gaternet.models.create import build_gated, create_backbone, fitting
from gaternet.recipe import data_name
from gaternet.wrapping import refuse_wrapped, require_network, require_sites, unwrapped

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_model(model: nn.Module, directory: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `directory`/config.json and `directory`/model.safetensors.

    Args:
        model: a GaterNet, or a plain network.
        directory: made if it does not exist.
        metadata: plain data: "backbone" (and, for a GaterNet, "extractor") are the arguments of `create_backbone`,
            without which the model cannot be loaded by itself; the rest is kept as it is. Default: the model's own.
            A description that a part no longer fits, since it was changed after gating, is left out.

    Raises:
        ValueError: the model is wrapped, or was ungated, or a module that gates act on was replaced.
        TypeError: the metadata are no plain data.
        OSError: the files cannot be written.
    """
    refuse_wrapped(model)
    directory = Path(directory)
    config: dict[str, Any] = {"gaternet": __version__}
    with unwrapped(model):
        if isinstance(model, GaterNet):
            if not model._gated:
                raise ValueError("this GaterNet gave its backbone back with ungate(): save a new one around it")
            require_sites(model)
            given = metadata or model.metadata
            metadata = fitting(given, model)
            for name in ("backbone", "extractor"):
                if given.get(name) and not metadata[name]:
                    warnings.warn(f"the {name} was changed after gating: load the model with {name}=...", stacklevel=2)
            config["gater"] = gater_options(model.gater)
            config["sites"] = [asdict(site) for site in model.sites]
        try:
            json.dumps(metadata)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata must be plain data, as JSON has it: {first_line(error)}") from error
        tensors, names = _tensors(model)
        write_atomically(directory / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt", **names}))
    write_json(directory / CONFIG, {**config, "metadata": metadata})


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds: each tensor of the model once, and for what lies there twice the name that it has in the file.

    They are copies: a file takes none that share memory in another way, as parts of a larger tensor do.
    """
    held, names, places = dict[str, Tensor](), dict[str, str](), dict[Any, str]()
    for name, tensor in model.state_dict().items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            kind = "tensor without numbers" if getattr(tensor, "is_meta", False) else type(tensor).__name__
            raise ValueError(
                f"{name} is a {kind}, and files hold plain tensors: save a model that is not on the device meta, nor "
                "spread over devices, nor quantised"
            )
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and (first := places.setdefault(place, name)) != name:
            names[name] = first
        else:
            held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return held, names


def without_paths(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata; of the data that a model was trained on the name alone, not where they lie on this machine."""
    trained = metadata.get("trained")
    if not isinstance(trained, Mapping) or not isinstance(trained.get("data"), str):
        return dict(metadata)
    return {**metadata, "trained": {**trained, "data": data_name(trained["data"])}}


@contextmanager
def shared(model: GaterNet) -> Iterator[None]:
    """The model with its metadata as others may see them, for a while."""
    before, model.metadata = model.metadata, without_paths(model.metadata)
    try:
        yield
    finally:
        model.metadata = before


def fingerprint(model: nn.Module) -> str:
    """Of all that the model's `state_dict` holds: another one where any number of it is another."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def load_model(
    directory: str | Path, backbone: nn.Module | None = None, extractor: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model saved in `directory`, in evaluation mode on the CPU, and its metadata.

    Args:
        directory: written by `save_model` or `GaterNet.save_pretrained`.
        backbone, extractor: networks of the saved architecture, for parts that `create_backbone` does not know; their
            weights are overwritten.

    Raises:
        ValueError: what is there is no saved model, or damaged, or does not fit together.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no saved model: {name} is missing")
    config = read_json(directory / CONFIG)
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{directory / CONFIG} does not describe a model of gaternet's: its metadata are no object")
    for part, given in (("backbone", backbone), ("extractor", extractor)):
        if given is not None:
            require_network(given, part)
        if given is not None and any(parameter.is_meta for parameter in given.parameters()):
            raise ValueError(f"the {part} has no numbers, on the device meta: make it on the CPU")
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
    except (ArithmeticError, AttributeError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG} does not describe a model of gaternet's ({error!r:.300})") from error
    load_weights_(model, directory / WEIGHTS)
    return model.cpu().eval(), metadata


def gater_options(gater: nn.Module) -> dict[str, Any] | None:
    """What makes such a gater anew; None where it, or a layer of it, is somebody's own."""
    if type(gater) is not Gater or not _is_usual(gater.norm):
        return None
    layers = gater.fc1, gater.fc2
    if any(type(layer) is not nn.Linear or [*layer.state_dict()] != ["weight", "bias"] for layer in layers):
        return None
    options = {name: float(getattr(gater, name)) for name in ("noise_std", "hard_probability", "threshold")}
    return {
        "num_features": gater.fc1.in_features,
        "bottleneck": gater.fc1.out_features,
        "batch_norm": not isinstance(gater.norm, nn.Identity),
        **options,
    }


def _is_usual(norm: nn.Module) -> bool:
    """Whether a `Gater` has such a norm by itself."""
    if type(norm) not in (nn.BatchNorm1d, nn.SyncBatchNorm):
        return type(norm) is nn.Identity
    usual = nn.BatchNorm1d(1)
    return all(getattr(norm, name) == getattr(usual, name) for name in ("eps", "affine", "track_running_stats"))


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`, in the file's precision; ValueError if damaged or of another model.

    What lies in two places of the model is in the file once.
    """
    try:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()} & _PRECISIONS.keys()  # noqa: SIM118
            names = file.metadata() or {}  # of tensors that lie in two places, to the name that they have here
        state, own = load_file(path), model.state_dict(keep_vars=True)
        state |= {name: state[names[name]] for name in own.keys() - state if names.get(name) in state}
        if len(kinds) == 1:  # also of what is in no file
            kind = _PRECISIONS[min(kinds)]
            model._apply(lambda tensor: tensor.to(kind) if tensor.dtype in _PRECISIONS.values() else tensor)
        for name, tensor in model.state_dict(keep_vars=True).items():  # others, as complex ones are, each in its own
            if name in state and (state[name].is_floating_point() or state[name].is_complex()):
                tensor.data = tensor.data.to(state[name].dtype)
        model.load_state_dict(state)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): restore it from a copy") from error
    except RuntimeError as error:  # PyTorch's list of keys and shapes that do not fit
        raise ValueError(f"{path} holds the weights of another model: {first_misfit(error)}") from error


def load_pretrained(
    model_id: str | Path, *, backbone: nn.Module | None = None, extractor: nn.Module | None = None, **hub_options: Any
) -> GaterNet:
    """The GaterNet in a local folder or on the Hugging Face Hub, in evaluation mode; also `GaterNet.from_pretrained`.

    Args:
        model_id: the folder, or the Hub's "owner/name".
        backbone, extractor: networks of the saved architecture, for parts that neither timm nor `create_model` made;
            their weights are overwritten.
        hub_options: of huggingface_hub's `snapshot_download`: revision, token, cache_dir, local_files_only, ...

    Raises:
        ValueError: there is no GaterNet there, or it is damaged.
        FileNotFoundError: there is no such folder, and no such model on the Hub.
        TypeError: for an option that there is not, or a part that is no network.
    """
    known = inspect.signature(snapshot_download).parameters.keys() - {"repo_id", "allow_patterns"}
    if unknown := hub_options.keys() - known:
        raise TypeError(f"there is no option {min(unknown)!r}: give backbone, extractor, or one of snapshot_download's")
    directory = Path(model_id)
    if not directory.is_dir() and (isinstance(model_id, Path) or directory.is_absolute()):
        raise FileNotFoundError(f"there is no folder {model_id}: name one that save_pretrained wrote")
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(str(model_id), allow_patterns=[CONFIG, WEIGHTS], **hub_options))
        except Exception as error:  # what the network makes of it, by whatever HTTP library
            raise FileNotFoundError(
                f"{model_id} is no folder here, nor a model that the Hub gives ({first_line(error)}): check the name, "
                "or the connection"
            ) from error
    model, _ = load_model(directory, backbone, extractor)
    if not isinstance(model, GaterNet):
        raise ValueError(f"{model_id} holds a plain network, not a GaterNet: use gaternet.checkpoint.load_model")
    return model
