"""GaterNet, the whole method: "You Look Twice: GaterNet for Dynamic Filter Selection in CNNs" (CVPR 2019).

A *gater* looks at an image first and emits one gate per filter of a *backbone* CNN; the backbone then
predicts with the chosen filters only:

    images (B, 3, H, W) -> Gater -> gates (B, C) -> backbone, each site scaled by its gates -> logits (B, K)

Shapes: B images in a batch, C gates, h features of the extractor, K classes. Equation numbers are those of
docs/method.md. This file is the ground floor: it knows no configuration and no other module of ours, but
those that write and read files, which the last methods call.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def improved_semhash(
    logits: Float[Tensor, "batch gates"],
    *,
    training: bool,
    noise_std: float | Float[Tensor, ""] = 1.0,
    hard_probability: float = 0.5,
    threshold: float = 0.0,
    slope: float | Float[Tensor, ""] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch gates"]:
    """Turn gate pre-activations g' into gates, with a gradient (equations 4 to 7).

    In training, noise is added, and each sample gets either all-hard gates (exactly 0 or 1, with the gradient of
    the soft ones) or all-soft gates in [0, 1]. In evaluation the gates are hard, noiseless and deterministic.

    Args:
        logits: g', any real numbers; the gates have their dtype, device and shape.
        training: whether to add noise and mix soft gates in.
        noise_std: standard deviation of the Gaussian noise, the paper's is 1; a number, or a tensor of one.
        hard_probability: chance, in [0, 1], that a sample's gates are hard, the paper's is 1/2.
        threshold: a hard gate is open where its (noisy) logit is above this, the paper's is 0.
        slope: of the soft gates' sigmoid, above 0; their gradient stays that of slope 1. Default: the paper's, 1.
        generator: source of the noise and of the mixing, on the device of `logits`; default: PyTorch's own.
    """
    if not training:
        return (logits > threshold).to(logits.dtype)
    chosen: dict[str, Any] = {} if generator is None else {"generator": generator}  # torch.compile traces no None
    noise = torch.randn(logits.shape, device=logits.device, dtype=logits.dtype, **chosen)
    noisy = logits + noise_std * noise  # (4)
    soft = (1.2 * noisy.sigmoid() - 0.1).clamp(0, 1)  # (5)
    hard = (noisy > threshold).to(soft.dtype)  # (6)
    straight_through = soft - soft.detach()  # the gradient of `soft` for gates of other values
    hard = hard + straight_through
    if slope is not None:
        soft = (1.2 * (slope * noisy).sigmoid() - 0.1).clamp(0, 1).detach() + straight_through
    is_hard = torch.rand(logits.shape[0], 1, device=logits.device, **chosen) < hard_probability  # (B, 1)
    return torch.where(is_hard, hard, soft)  # (7)


def gate_sparsity(gates: Float[Tensor, "batch gates"]) -> Float[Tensor, ""]:
    """The paper's penalty (equation 8): mean over samples of ||g||_1 / C, in [0, 1]. It is 1 where all are open."""
    return gates.abs().mean()


class Gater(nn.Module):
    """G(x) = D(E(x)): an image's gates, all layers at once (equations 2 and 3).

    E, the extractor, is a CNN without its output layer. D is FC1 -> BatchNorm -> ReLU -> FC2 with a narrow middle, so
    that it holds (h + C) * bottleneck weights instead of h * C. The paper's D has the BatchNorm, the public code's not.

    Args:
        extractor: E; maps images (B, channels, H, W) to features (B, h).
        num_features: h.
        num_gates: C.
        bottleneck: width of D's middle; the paper's is 8 on CIFAR-10, and its parameter counts give 256 on ImageNet.
        batch_norm: whether D has the BatchNorm.
        initial_bias: FC2's bias at the start. 0 is the paper's: about half of the gates start open. 2 starts "open".
        noise_std, hard_probability, threshold: see `improved_semhash`.

    Attributes:
        slope: see `improved_semhash`; training may change it from step to step.
    """

    def __init__(
        self,
        extractor: nn.Module,
        num_features: int,
        num_gates: int,
        *,
        bottleneck: int = 8,
        batch_norm: bool = True,
        initial_bias: float = 0.0,
        noise_std: float = 1.0,
        hard_probability: float = 0.5,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, not {bottleneck}")
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std must be finite and not negative, but is {noise_std}")
        if not math.isfinite(threshold) or not math.isfinite(initial_bias):
            raise ValueError(f"threshold and initial_bias must be finite, not {threshold} and {initial_bias}")
        if not 0 <= hard_probability <= 1:
            raise ValueError(f"hard_probability must lie in [0, 1], not {hard_probability}")
        self.extractor = extractor
        self.fc1 = nn.Linear(num_features, bottleneck)
        self.norm = nn.BatchNorm1d(bottleneck) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(bottleneck, num_gates)
        nn.init.zeros_(self.fc1.bias)
        nn.init.constant_(self.fc2.bias, initial_bias)
        self.noise_std: float | Tensor = noise_std
        self.hard_probability = hard_probability
        self.threshold = threshold
        self.slope: float | Tensor | None = None

    def logits(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch gates"]:
        """The gate pre-activations g' (equations 2 and 3)."""
        return self.decide(self.features(images))

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """E(x) (equation 2)."""
        features = self.extractor(images)
        if features.ndim != 2 or features.shape[1] != self.fc1.in_features:
            raise ValueError(
                f"the gater's extractor must return features (B, {self.fc1.in_features}), "
                f"but returned {tuple(features.shape)}: remove its output layer and pool over the image"
            )
        return features

    def decide(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch gates"]:
        """D (equation 3): pre-activations g' in the weights' precision, which for noise matters under autocast."""
        logits = self.fc2(F.relu(self.norm(self.fc1(features))))
        floats = [weight.dtype for weight in self.fc2.parameters() if weight.is_floating_point()]  # quantised: none
        return logits.to(floats[0]) if floats and floats[0] != logits.dtype else logits

    def forward(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch gates"]:
        """Gates in [0, 1] when training; exactly 0 or 1, and deterministic, in evaluation."""
        return self.sample(self.logits(images), generator)

    def sample(
        self, logits: Float[Tensor, "batch gates"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch gates"]:
        """Gates of pre-activations: `improved_semhash` with this gater's settings."""
        return improved_semhash(
            logits,
            training=self.training,
            noise_std=self.noise_std,
            hard_probability=self.hard_probability,
            threshold=self.threshold,
            slope=self.slope,
            generator=generator,
        )


@dataclass(frozen=True)
class GateSite:
    """Where a slice of the gates acts on the backbone.

    Attributes:
        name: the module whose output (B, channels, H, W) is scaled: the BatchNorm after the gated filters, or
            their convolution where none follows.
        conv: the convolution that holds the gated filters.
        start, stop: the site's columns of the gates (B, C).
        group_size: number of neighbouring filters that share a gate, the paper's is 1.
        role: "residual" for the last convolution of a residual unit, the paper's choice; "dense" for the last of a
            densely connected unit; "shortcut" for one beside a residual unit; "depthwise" for a depthwise one that
            shares the gates of the filters that it reads; "inner" for any other.
    """

    name: str
    conv: str
    start: int
    stop: int
    role: str = "residual"
    group_size: int = 1

    @property
    def channels(self) -> int:
        """Number of gated filters."""
        return (self.stop - self.start) * self.group_size

    @property
    def columns(self) -> Int[Tensor, " channels"]:
        """The gates' column of each filter."""
        return torch.arange(self.start, self.stop).repeat_interleave(self.group_size)


class _SideChannel(threading.local):
    """Carries the gates from `GaterNet.forward_gated` to the sites. Each thread has its own, and so has each copy."""

    def __init__(self) -> None:
        self.gates: Tensor | None = None
        self.sites_run: list[str] = []  # their names, in the order in which they ran

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _SideChannel, ()


class GateHook:
    """Forward hook of one site (equation 1): a product, so a closed gate makes zeros of whatever is finite."""

    def __init__(self, channel: _SideChannel, site: GateSite) -> None:
        self.channel, self.site = channel, site

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        gates = self.channel.gates
        if gates is None:  # the backbone was called by itself: it is the plain network
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # within backward()
                raise RuntimeError(
                    f"site {self.site.name} is computed again in the backward pass, when the gates are gone: switch "
                    "activation checkpointing off inside the backbone"
                )
            return None
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != self.site.channels:
            given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"site {self.site.name} gates {self.site.channels} filters, but its output is {given}, "
                f"not (B, {self.site.channels}, H, W): gate another module"
            )
        self.channel.sites_run.append(self.site.name)
        own = gates[:, self.site.start : self.site.stop, None, None].to(output.dtype)  # (B, C_site, 1, 1)
        return output * (own if self.site.group_size == 1 else own.repeat_interleave(self.site.group_size, 1))


def refuse_gated(network: nn.Module) -> None:
    """Raise ValueError if any module of the network has gates, or if it is but a wrapper of a network."""
    if hasattr(network, "_orig_mod") or isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"gate what the {type(network).__name__} wraps, and wrap or compile the GaterNet instead")
    if any(isinstance(hook, GateHook) for module in network.modules() for hook in module._forward_hooks.values()):
        raise ValueError("the backbone is gated already: call ungate() on its GaterNet, or on a deep copy of that")


class GaterNet(
    nn.Module,
    ModelHubMixin,
    library_name="gaternet",
    tags=["gaternet", "conditional-computation", "image-classification"],
    paper_url="https://arxiv.org/abs/1811.11205",
):
    """A backbone whose filters are chosen by a gater, image by image.

    The backbone is any network that maps images to logits. It is not rewritten: a forward hook at each site scales the
    filters' outputs, so its `state_dict` keys stay as they were, and called by itself it is the plain network.

    Args:
        backbone: the network that makes the prediction; must not be gated already.
        gater: maps images (B, channels, H, W) to gates (B, C).
        sites: where the gates act, in the gates' order. Each starts where those before it stop, or shares columns.
        metadata: plain data that is saved beside the weights: how to rebuild the parts, see `gaternet.checkpoint`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        gater: nn.Module,
        sites: Sequence[GateSite],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        end = 0
        for site in sites:
            follows = site.start == end or 0 <= site.start < site.stop <= end
            if site.channels < 1 or site.group_size < 1 or not follows:
                raise ValueError(
                    f"site {site.name} has columns {site.start} to {site.stop}, but those before it stop at {end}: "
                    "start there, or share columns with them"
                )
            end = max(end, site.stop)
        if not sites or len({site.name for site in sites}) < len(sites):
            raise ValueError("there must be sites, and no two at one module")
        modules = dict(backbone.named_modules())
        if missing := [name for site in sites for name in (site.name, site.conv) if name not in modules]:
            raise ValueError(f"the backbone has no module {missing[0]!r}: sites must name modules of this backbone")
        for site in sites:
            filters = getattr(modules[site.conv], "out_channels", site.channels)
            if filters != site.channels:
                raise ValueError(f"site {site.name} gates {site.channels} filters, but {site.conv} has {filters}")
        refuse_gated(backbone)
        self.backbone, self.gater = backbone, gater
        self.sites = tuple(sites)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._channel = _SideChannel()
        self._gated = True
        self._hooks = [modules[site.name].register_forward_hook(GateHook(self._channel, site)) for site in sites]

    @property
    def num_gates(self) -> int:
        """C: one for each gated filter, or for each group of filters that share theirs."""
        return max(site.stop for site in self.sites)

    @property
    def plain_gater(self) -> Gater | None:
        """The gater, if its gates are just its thresholded logits; None for a gater of your own, or with hooks."""
        own = type(self).gates is not GaterNet.gates or self.gater._forward_hooks or self.gater._forward_pre_hooks
        return self.gater if type(self.gater) is Gater and not own else None

    def forward(
        self, images: Float[Tensor, "batch channels height width"], *, return_gates: bool = False
    ) -> Float[Tensor, "batch classes"] | tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch gates"]]:
        """Logits (B, K), and with `return_gates` also the gates (B, C) that made them (equation 1).

        When training, gates are noisy and lie in [0, 1]; in evaluation they are 0 or 1 and deterministic.
        """
        gates = self.gates(images)
        logits = self.forward_gated(images, gates)
        return (logits, gates) if return_gates else logits

    def gates(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch gates"]:
        """The gater alone: gates (B, C) in [0, 1], a column for each gate, in execution order."""
        return self.gater(images)

    def forward_gated(
        self, images: Float[Tensor, "batch channels height width"], gates: Float[Tensor, "batch gates"]
    ) -> Float[Tensor, "batch classes"]:
        """The backbone alone, under given gates (B, C), say for ablations. All ones is the plain net, bit for bit."""
        if not self._gated:
            raise RuntimeError("this GaterNet gave its backbone back with ungate(): build a new one around it")
        if gates.shape != (images.shape[0], self.num_gates):
            raise ValueError(
                f"gates must be ({images.shape[0]}, {self.num_gates}), a row per image and a column per gate, "
                f"but are {tuple(gates.shape)}"
            )
        channel, found = self._channel, []  # names of sites, in the order in which they run
        outer = channel.gates, channel.sites_run  # those of a call that this one is made within
        channel.gates, channel.sites_run = gates, found
        try:
            logits = self.backbone(images)
        finally:
            channel.gates, channel.sites_run = outer
        if sorted(found) != sorted(site.name for site in self.sites):
            runs = {site.name: found.count(site.name) for site in self.sites}
            name = next(name for name, count in runs.items() if count != 1)
            raise RuntimeError(
                f"site {name} ran {runs[name]} times in one call of the backbone instead of once: it was skipped, "
                "repeated or replaced, or the backbone was compiled before; change the backbone first, gate what runs "
                "once, and compile the GaterNet"
            )
        return logits

    def ungate(self) -> nn.Module:
        """Take the gates off and give the plain backbone back, the very object; this GaterNet then runs no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._gated = [], False
        return self.backbone

    # Saving is huggingface_hub's and gaternet.checkpoint's, imported late so that the method stands on nothing of ours.

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and README.md, a model card; old ones are replaced when all are written.

        A README.md that you wrote stays. Arguments are those of huggingface_hub's `ModelHubMixin.save_pretrained`.
        Raises OSError, with the folder as it was, where the files cannot be written, and ValueError for a run's folder.
        """
        from gaternet import card

        kwargs.setdefault("repo_id", Path(save_directory).name)
        with card.staged_model(Path(save_directory)) as staging:
            super().save_pretrained(staging, **kwargs)
        return self.push_to_hub(**kwargs) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Share on the Hugging Face Hub, without this machine's paths to data; see `ModelHubMixin.push_to_hub`."""
        from gaternet import checkpoint

        with checkpoint.shared(self):
            return super().push_to_hub(repo_id, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        from gaternet import checkpoint

        checkpoint.save_model(self, save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """What `save_pretrained` and `push_to_hub` write as README.md."""
        from gaternet import card

        return card.make_card(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_options: Any) -> "GaterNet":
        """The GaterNet saved in a folder or on the Hugging Face Hub, in evaluation mode: `gaternet.load_pretrained`.

        Pass in a backbone that neither timm nor `create_model` made as `backbone`, and a module that was the gater's
        extractor as `extractor`; other arguments are those of huggingface_hub's `snapshot_download`.
        """
        from gaternet import checkpoint

        found = checkpoint.load_pretrained(pretrained_model_name_or_path, **hub_options)
        return found if cls is GaterNet else cls(found.ungate(), found.gater, found.sites, found.metadata).eval()
