"""Whether closed filters are felt somewhere, found by running the network with other values in them.

The graph does not tell what a module returns from the same tensor kept in an attribute, which no gate acts on.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gaternet.method import GaterNet, GateSite
from gaternet.modes import evaluation_mode, trial_copy, without_autocast

_COMPUTES = {nn.Conv2d: ("conv2d", "convolution"), nn.modules.batchnorm._BatchNorm: ("batch_norm",)}


@torch.no_grad()
def leaks(model: GaterNet, images: Tensor) -> list[str]:
    """The gated convolutions of which the network feels closed filters; none if it has no copy to try that on.

    Args:
        images: (B, channels, H, W), of the size to try; their values do not matter.
    """
    twin: Any = trial_copy(model)
    if twin is model or images.is_meta:
        return []
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(images.shape, generator=drawn).to(images)
    gates = torch.randint(2, (1, model.num_gates), generator=drawn).to(images).expand(len(images), -1)
    same_each_time = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True)
    found: dict[str, None] = {}
    with evaluation_mode(twin), without_autocast(images.device.type), same_each_time, _Disturbance(twin) as disturbance:
        for used in (gates, 1 - gates):
            given = _tensors(disturbance.run(images, used, []))

            def felt(sites: Iterable[GateSite], used: Tensor = used, given: list[Tensor] = given) -> bool:
                return not all(map(torch.equal, _tensors(disturbance.run(images, used, sites)), given))

            if felt(twin.sites) and not felt([]):  # which a network that draws numbers would
                found |= dict.fromkeys(site.conv for site in twin.sites if felt([site]))
    return list(found)


def _tensors(given: Any) -> list[Tensor]:
    """What a network gives: one tensor, or several in a tuple or dict."""
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


class _Disturbance(TorchFunctionMode):
    """Puts other values into closed filters where their convolution, and the BatchNorm behind it, compute them.

    Other weights would do for most networks, but some scale all filters by what the weights of all are.
    """

    def __init__(self, model: GaterNet) -> None:
        super().__init__()
        self._model = model
        self._modules = dict(model.backbone.named_modules())
        self._closed: Mapping[str, Tensor] = {}  # of the modules to disturb, (channels,)
        self._running: list[str] = []
        self._counts = Counter[str]()
        for site in model.sites:
            for name in {site.conv, site.name}:
                self._modules[name].register_forward_pre_hook(self._enter(name))
                self._modules[name].register_forward_hook(self._leave, prepend=True)

    def run(self, images: Tensor, gates: Tensor, sites: Iterable[GateSite]) -> Any:
        """What the backbone gives under gates (B, C), all rows alike, with other values in closed filters of the sites.

        A run without sites has to come first: it finds which modules compute once, as the others are left alone.
        """
        once = [(name, site) for site in sites for name in {site.conv, site.name} if self._counts[name] == 1]
        self._closed = {name: gates[0, site.columns.to(gates.device)] == 0 for name, site in once}
        self._counts.clear()
        return self._model.forward_gated(images, gates)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = self._running[-1] if self._running else ""
        if not any(
            isinstance(self._modules.get(name), kind) and getattr(func, "__name__", "") in operations
            for kind, operations in _COMPUTES.items()
        ):
            return found
        self._counts[name] += 1
        closed = self._closed.get(name)
        return found if closed is None else torch.where(closed[:, None, None], 1 - 2 * found, found)

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
