"""What wraps a network, such as what compiles it or spreads it over devices: seen through, or taken off for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gaternet.method import GaterNet


def require_gated(model: nn.Module) -> GaterNet:
    """The GaterNet that a model is, or that was compiled to it; TypeError if it is none."""
    if not isinstance(found := getattr(model, "_orig_mod", model), GaterNet):
        raise TypeError(
            f"the model must be a GaterNet, but is a {type(model).__name__}: gate it with gaternet.gate, or pass what "
            "it wraps (model.module)"
        )
    return found


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
