"""Models by name: those of the paper's tables, and the plain networks of timm and torchvision."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gaternet.method import GateHook, Gater, GaterNet, GateSite
from gaternet.models.cifar_resnet import BasicBlock, Bottleneck, CifarResNet, residual_sites
from gaternet.models.densenet import DenseNet, dense_sites
from gaternet.models.imagenet import IMAGENET, imagenet_network, imagenet_sites
from gaternet.models.shake_shake import ShakeShake, branch_sites

# name: block, units per stage, stem filters, inner widths, unit widths
_CIFAR_RESNETS = {
    "resnet8": (BasicBlock, 1, 16, (16, 32, 64), (16, 32, 64)),
    "resnet20": (BasicBlock, 3, 16, (16, 32, 64), (16, 32, 64)),
    "resnet56": (BasicBlock, 9, 16, (16, 32, 64), (16, 32, 64)),
    "resnet110": (BasicBlock, 18, 16, (16, 32, 64), (16, 32, 64)),
    "resnet164": (Bottleneck, 18, 16, (4, 32, 64), (16, 128, 256)),
}
# Not published: the factor on all widths, and the SE reduction, that give Table 1's parameter counts on both data sets.
_WIDER = {"resnet8": 1.44, "resnet20": 1.44, "resnet56": 1.12, "resnet110": 1.12, "resnet164": 1.12}
_NARROW = 0.5**0.5  # about half of the MACs: what a network that is gated to half of them is to beat
_SE_REDUCTION = {"resnet8": 4, "resnet20": 4, "resnet56": 4, "resnet110": 4, "resnet164": 8}
_DENSENETS = {"densenet_bc_100_12": (100, 12), "densenet_bc_250_24": (250, 24), "densenet_bc_190_40": (190, 40)}
_SHAKE_SHAKES = {"shake_shake_26_2x64d": 64, "shake_shake_26_2x96d": 96}
_VARIANTS = ("_wider", "_narrow", "_se")
_CIFAR = [*_CIFAR_RESNETS, *_DENSENETS, *_SHAKE_SHAKES]
_GATEABLE = [*_CIFAR, *(name for name in IMAGENET if not name.endswith(_VARIANTS))]
_BACKBONES = [*_CIFAR, *(f"{name}{suffix}" for name in _CIFAR_RESNETS for suffix in _VARIANTS), *IMAGENET]
_GATED = "_gated"
_TIMM, _TORCHVISION = "timm:", "torchvision:"
_WITHOUT_EFFECT = re.compile(r"_.*|p|training|momentum|inplace|.*drop.*|.*checkpoint.*")  # on predictions


def model_names() -> list[str]:
    """All names that `create_model` knows, but for those of timm and torchvision."""
    return sorted([*_BACKBONES, *(f"{name}{_GATED}" for name in _GATEABLE)], key=lambda name: (len(name), name))


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    *,
    extractor: str | None = None,
    shrink: int = 1,
    bottleneck: int | None = None,
    batch_norm: bool = True,
    initial_bias: float = 0.0,
    noise_std: float = 1.0,
    hard_probability: float = 0.5,
    threshold: float = 0.0,
    pretrained: bool = False,
) -> nn.Module:
    """A model by name: a GaterNet if the name ends in `_gated`, else a plain network.

    Args:
        name: one of `model_names()`, for example "resnet56_gated", or "timm:resnet50", or "torchvision:vgg11".
        num_classes: classes K. Default: 10 for CIFAR's models, 1000 for ImageNet's, timm's and torchvision's; trained
            weights come with their classifier only where it has as many.
        in_chans: channels of the images.
        extractor: for gated models, the name of the plain network that serves as the gater's E, without its classifier;
            default: the paper's, "resnet20" for CIFAR's models and "resnet18" for ImageNet's.
        shrink: for gated models, the extractor sees the image average-pooled by this factor; the paper's is 1.
        bottleneck: for gated models, width of D's middle; default: 8 for CIFAR's models and 256 for ImageNet's, see
            `Gater`. The paper's CIFAR-100 row of ResNet-20 needs 128.
        batch_norm, initial_bias, noise_std, hard_probability, threshold: for gated models, see `Gater`.
        pretrained: for timm's and torchvision's models, take their trained weights, which are downloaded; images are
            then to be normalised by the mean and std in the network's `pretrained_cfg`.

    Raises:
        ValueError: for a name that is not known, weights that cannot be had, or a gater's options for a plain network.
    """
    if num_classes is None:
        others = name.startswith((_TIMM, _TORCHVISION)) or name.removesuffix(_GATED) in IMAGENET
        num_classes = 1000 if others else 10
    seen: dict[str, Any] = {"extractor": extractor, "shrink": shrink}
    options: dict[str, Any] = {
        "bottleneck": bottleneck,
        "batch_norm": batch_norm,
        "initial_bias": initial_bias,
        "noise_std": noise_std,
        "hard_probability": hard_probability,
        "threshold": threshold,
    }
    if name.startswith((_TIMM, _TORCHVISION)) or name in _BACKBONES:
        defaults = inspect.signature(create_model).parameters
        if given := [option for option, value in {**seen, **options}.items() if value != defaults[option].default]:
            raise ValueError(f"{name} has no gater for the option {given[0]}: leave it out, or name a gated model")
        return create_backbone(name, num_classes, in_chans, pretrained)
    if name not in model_names():
        raise ValueError(_unknown(name, model_names()))
    if pretrained:
        raise ValueError(f"there are no trained weights for {name}: train it")
    backbone = name.removesuffix(_GATED)
    papers_extractor, papers_bottleneck = ("resnet18", 256) if backbone in IMAGENET else ("resnet20", 8)
    described: dict[str, Any] = {"name": papers_extractor if extractor is None else extractor, "in_chans": in_chans}
    return build_gated(
        {
            "backbone": {"name": backbone, "num_classes": num_classes, "in_chans": in_chans},
            "extractor": described | ({"shrink": shrink} if shrink != 1 else {}),
        },
        {**options, "bottleneck": papers_bottleneck if bottleneck is None else bottleneck},
    )


def create_backbone(name: str, num_classes: int = 10, in_chans: int = 3, pretrained: bool = False) -> nn.Module:
    """A plain network by name: "resnet20_wider", "timm:resnet50", "torchvision:vgg11".

    With 0 classes it gives features (B, h); torchvision's have no such form.
    """
    if num_classes < 0 or in_chans < 1:
        raise ValueError(f"there must be classes and channels, not {num_classes} classes and {in_chans} channels")
    if name.startswith(_TIMM):
        network = _timm(name.removeprefix(_TIMM), num_classes, in_chans, pretrained)
    elif name.startswith(_TORCHVISION):
        network = _torchvision(name.removeprefix(_TORCHVISION), num_classes, in_chans, pretrained)
    elif pretrained:
        raise ValueError(
            f"there are no trained weights for {name}: train it, or name a trained run with --backbone-from"
        )
    else:
        network = _papers_network(name, num_classes, in_chans)
    source: Any = {"name": name, "num_classes": num_classes, "in_chans": in_chans}
    network.gaternet_source = source
    return network


def create_extractor(name: str, in_chans: int = 3, shrink: int = 1) -> nn.Module:
    """A network that maps images to features (B, h): one of the paper's backbones, or else of timm's, by name.

    With `shrink` above 1 it sees the image as averages of so many pixels by so many.
    """
    ours = name in _BACKBONES or name.removesuffix(_GATED) in _BACKBONES or name.startswith(_TORCHVISION)
    if shrink < 1:
        raise ValueError(f"shrink must be at least 1, not {shrink}")
    network: Any = create_backbone(name, 0, in_chans) if ours else _timm(name.removeprefix(_TIMM), 0, in_chans, False)
    if shrink == 1:
        return network
    shrunk: Any = nn.Sequential(nn.AvgPool2d(shrink), network)
    shrunk.num_features = _num_features(network)
    return shrunk


def describe_backbone(backbone: nn.Module, in_chans: int) -> dict[str, Any] | None:
    """The arguments of `create_backbone` that make such a network anew; None for one that it does not make."""
    sources: list[Any] = [getattr(backbone, "gaternet_source", None)]
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    if "architecture" in config and isinstance(num_classes := getattr(backbone, "num_classes", None), int):
        sources.append({"name": _TIMM + config["architecture"], "num_classes": num_classes, "in_chans": in_chans})
    return next((source for source in sources if source and _makes(source, backbone, _shown)), None)


def fitting(metadata: Mapping[str, Any], model: GaterNet) -> Mapping[str, Any]:
    """The metadata, without the description of another backbone or extractor than the model has.

    A backbone that they do not describe, say for timm's classifier was replaced, is described anew if that is possible.
    What changes no prediction may be another: momentum of statistics, what is dropped, what is done in place.
    """
    found = dict(metadata)

    def predicts(network: nn.Module) -> str:
        return re.sub(r"(, )?\b(momentum|p|drop_prob|inplace)=[^,)]*", "", _shown(network))

    parts: list[tuple[str, nn.Module, Callable[..., nn.Module]]] = [("backbone", model.backbone, create_backbone)]
    if isinstance(model.gater, Gater):
        parts.append(("extractor", model.gater.extractor, create_extractor))
    for name, part, make in parts:
        if found.get(name) and not _makes(found[name], part, predicts, make):
            found[name] = None
    if not found.get("backbone"):
        described = metadata.get("backbone") or found.get("extractor") or {}
        found["backbone"] = describe_backbone(model.backbone, described.get("in_chans", 3))
    return found


def _shown(network: nn.Module) -> str:
    """All modules with their options; those of BatchNorm are the same over however many processes."""
    return re.sub(r"\b(Sync)?BatchNorm(2d)?\(", "BatchNorm(", repr(network))


def _makes(
    source: Mapping[str, Any],
    network: nn.Module,
    shown: Callable[[nn.Module], str],
    make: Callable[..., nn.Module] = create_backbone,
) -> bool:
    """Whether `make(**source)` makes such a network: it may have been made otherwise, or changed since."""
    try:
        with torch.device("meta"):
            twin = make(**source)
    except NotImplementedError:  # its initialisation wants real numbers
        with torch.random.fork_rng(devices=[]):
            twin = make(**source)
    except (AttributeError, ValueError, RuntimeError, TypeError):
        return False
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (network, twin)]
    return shapes[0] == shapes[1] and shown(network) == shown(twin) and _hidden(network) == _hidden(twin)


def _hidden(network: nn.Module) -> list[tuple[Any, ...]]:
    """What may change a network's results and is not shown: of each module plain values, functions, and hooks."""
    found = []
    for module in network.modules():
        own = {name: value for name, value in vars(module).items() if not _WITHOUT_EFFECT.fullmatch(name)}
        values = {name: value for name, value in own.items() if isinstance(value, int | float | str)}
        functions = {name for name, value in own.items() if callable(value) and not isinstance(value, nn.Module)}
        if "_original_forward" in vars(module):  # where Accelerate put one for mixed precision
            functions.discard("forward")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        found.append((values, functions, sum(not isinstance(hook, GateHook) for hook in hooks)))
    return found


def other_classifier(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], num_classes: int) -> set[str]:
    """Of two state_dicts, the tensors of the classifier, where that is for another number of classes."""
    both = {key for key in wanted.keys() & found.keys() if wanted[key].shape != found[key].shape}
    return {key for key in both if wanted[key].shape == (num_classes, *found[key].shape[1:])}


def build_gated(
    metadata: Mapping[str, Any],
    gater_options: Mapping[str, Any],
    sites: Sequence[GateSite] | None = None,
    backbone: nn.Module | None = None,
    extractor: nn.Module | None = None,
) -> GaterNet:
    """A GaterNet from plain data.

    Args:
        metadata: "backbone" and "extractor" are the arguments of `create_backbone` and of `create_extractor`.
        gater_options: those of `Gater`; without "num_features", the extractor's own is taken.
        sites: where the gates act; default: the paper's.
        backbone, extractor: used instead of making them from `metadata`.
    """
    backbone = create_backbone(**metadata["backbone"]) if backbone is None else backbone
    extractor = create_extractor(**metadata["extractor"]) if extractor is None else extractor
    sites = _published_sites(backbone) if sites is None else sites
    options = dict(gater_options)
    num_features = options.pop("num_features", None) or _num_features(extractor)
    gater = Gater(extractor, num_features, max(site.stop for site in sites), **options)
    return GaterNet(backbone, gater, sites, metadata)


def _num_features(extractor: Any) -> int:
    """h; some of timm's have a layer between pooling and classifier, and `num_features` is the width before it."""
    return getattr(extractor, "head_hidden_size", None) or extractor.num_features


def _published_sites(backbone: nn.Module) -> list[GateSite]:
    if isinstance(backbone, DenseNet):
        return dense_sites(backbone)
    if isinstance(backbone, ShakeShake):
        return branch_sites(backbone)
    return residual_sites(backbone) if isinstance(backbone, CifarResNet) else imagenet_sites(backbone)


def _papers_network(name: str, num_classes: int, in_chans: int) -> nn.Module:
    if name not in _BACKBONES:
        raise ValueError(_unknown(name, _BACKBONES))
    if name in IMAGENET:
        return imagenet_network(name, num_classes, in_chans)
    if name in _DENSENETS:
        return DenseNet(*_DENSENETS[name], num_classes, in_chans)
    if name in _SHAKE_SHAKES:
        return ShakeShake(_SHAKE_SHAKES[name], num_classes, in_chans)
    base, _, variant = name.partition("_")
    block, depth, stem, inner, widths = _CIFAR_RESNETS[base]
    factor = {"wider": _WIDER[base], "narrow": _NARROW}.get(variant, 1)
    return CifarResNet(
        block,
        depth,
        round(stem * factor),
        [round(width * factor) for width in inner],
        [round(width * factor) for width in widths],
        num_classes,
        in_chans,
        _SE_REDUCTION[base] if variant == "se" else None,
    )


def _timm(name: str, num_classes: int, in_chans: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(_unknown(name, timm.list_models(), "model of timm"))
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # what follows the dot is none of its trainings
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ValueError(_unknown(name, known, "training of a model of timm")) from error
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans)
    except (OSError, RuntimeError) as error:  # no network, or nobody has trained it
        if not pretrained:
            raise
        raise _no_weights(_TIMM + name, error) from error


def _torchvision(name: str, num_classes: int, in_chans: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(models):
        raise ValueError(_unknown(name, models.list_models(models), "classification model of torchvision"))
    if in_chans != 3:
        raise ValueError(f"{_TORCHVISION}{name} takes images of 3 channels, not {in_chans}: choose one of timm's")
    if num_classes < 1:
        raise ValueError(f"{_TORCHVISION}{name} gives no features without its classifier: choose one of timm's")
    auxiliary = name in ("googlenet", "inception_v3")  # with heads for training that nothing here wants
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    if auxiliary and pretrained:
        options["init_weights"] = False
    network = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        try:
            trained = models.get_model(name, weights="DEFAULT").state_dict()  # which knows the names in old files
        except (OSError, RuntimeError) as error:  # no network, or a file that is damaged
            raise _no_weights(_TORCHVISION + name, error) from error
        wanted = network.state_dict()
        classifier = other_classifier(wanted, trained, num_classes)
        if unfit := [key for key in wanted if key not in classifier and wanted[key].shape != trained[key].shape]:
            raise ValueError(
                f"the trained weights of {_TORCHVISION}{name} are for images of another size ({unfit[0]}): choose one "
                "of timm's"
            )
        network.load_state_dict({key: wanted[key] if key in classifier else trained[key] for key in wanted})
    made = models.get_model_weights(name)["DEFAULT"].transforms()
    config: Any = {"mean": tuple(made.mean), "std": tuple(made.std)}
    if auxiliary:  # their transform_input makes these inputs of the usual ones
        config = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    network.pretrained_cfg = config  # as timm's models have it, with and without trained weights
    return network


def _no_weights(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"the trained weights of {name} are not here and cannot be downloaded ({type(error).__name__}): "
        "start without them (--no-pretrained), or from a checkpoint (--backbone-from)"
    )


def _unknown(name: str, names: list[str], what: str = "model") -> str:
    close = difflib.get_close_matches(name, names, 1)
    some = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    return f"unknown {what} {name!r}: " + (f"did you mean {close[0]!r}?" if close else f"choose from {some}")
