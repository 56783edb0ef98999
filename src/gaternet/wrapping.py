"""What is around a network: what compiles or spreads it; and what a model does beside running its parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gaternet.method import GateHook, GaterNet


def require_network(part: object, name: str) -> None:
    """TypeError if the part of that name is no module."""
    if not isinstance(part, nn.Module):
        raise TypeError(f"the {name} must be a network, not {part!r:.60}: make it first, say by timm.create_model")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the model itself."""
    return getattr(model, "_orig_mod", model)


def require_gated(model: nn.Module) -> GaterNet:
    """The GaterNet that a model is, or that was compiled to it; TypeError if it is none."""
    if not isinstance(found := uncompiled(model), GaterNet):
        raise TypeError(
            f"the model must be a GaterNet, but is a {type(model).__name__}: gate it with gaternet.gate, or pass what "
            "it wraps (model.module)"
        )
    require_sites(found)
    return found


def require_sites(model: GaterNet) -> None:
    """ValueError where another module has taken the place of one that gates act on; no matter after `ungate`."""
    modules = dict(uncompiled(model.backbone).named_modules())
    for site in model.sites if model._gated else ():
        hooks = modules[site.name]._forward_hooks.values() if site.name in modules else ()
        if not any(isinstance(hook, GateHook) and hook.site == site for hook in hooks):
            raise ValueError(
                f"{site.name} was replaced or wrapped after gating, and gates act on what was there: change the "
                "backbone first, then gate it"
            )


def refuse_wrapped(network: nn.Module) -> None:
    """ValueError for what compiles or spreads a network: its weights have other names than the network's."""
    from accelerate.utils import extract_model_from_parallel  # late: it takes a second

    if extract_model_from_parallel(network, keep_torch_compile=False) is not network:
        kind = type(network).__name__
        raise ValueError(f"the network is wrapped in {kind}, where its weights have other names: pass it unwrapped")


@torch.no_grad()
def require_whole(model: GaterNet, images: Tensor) -> None:
    """ValueError for a model, in evaluation mode, that does more than run its backbone under its gates.

    What runs these parts by themselves would drop that.
    """
    if type(model).forward is GaterNet.forward and not (model._forward_hooks or model._forward_pre_hooks):
        return
    whole, parts = model(images), model.forward_gated(images, model.gates(images))
    if whole.shape != parts.shape or not torch.allclose(whole, parts, equal_nan=True):
        raise ValueError(
            f"this {type(model).__name__} does more than run its backbone under its gates, by a forward or hooks of "
            "its own: do that with what comes out, and pass the model without it"
        )


@torch.no_grad()
def require_closed(model: GaterNet, images: Tensor) -> None:
    """ValueError for a model, in evaluation mode, whose hooks behind its gates make something else of their zeros.

    What counts or skips closed filters takes them for zeros.

    Args:
        images: (B, channels, H, W), as the backbone takes them.
    """
    felt: list[str] = []
    backbone, handles = model.backbone, list[Any]()
    for site in model.sites:

        def look(_module: nn.Module, _args: Any, output: Tensor, name: str = site.name) -> None:
            if output.nan_to_num().any():
                felt.append(name)

        handles.append(backbone.get_submodule(site.name).register_forward_hook(look))
    try:
        model.forward_gated(images, images.new_zeros(len(images), model.num_gates))
    finally:
        for handle in handles:
            handle.remove()
    if felt:
        raise ValueError(
            f"a hook on {felt[0]} acts behind its gates, and makes something else of closed filters' zeros: remove it, "
            "or do so in a module of its own"
        )


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """The model without what compiles or spreads its parts, for a while: the names of their weights would show it."""
    from accelerate.utils import extract_model_from_parallel  # late: it takes a second

    wrapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in model.modules():
        for name, part in parent.named_children():
            inner = part
            while (within := extract_model_from_parallel(inner, keep_torch_compile=False)) is not inner:
                inner = within
            if inner is not part:
                wrapped.append((parent, name, part))
                setattr(parent, name, inner)
    try:
        yield
    finally:
        for parent, name, part in wrapped:
            setattr(parent, name, part)
