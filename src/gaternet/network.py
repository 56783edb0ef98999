"""What a recipe trains: its network and starting weights, its optimizer, and what is saved beside the weights."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gaternet import checkpoint, files
from gaternet.cost import CostModel
from gaternet.data import ImageData, ToInput
from gaternet.gating import gate
from gaternet.method import Gater, GaterNet
from gaternet.models import create_model
from gaternet.models.create import describe_backbone, other_classifier
from gaternet.modes import channels_last_
from gaternet.recipe import Gating, Recipe
from gaternet.trained import Trained, find_model, match_classes


def build_network(recipe: Recipe, data: ImageData, seed: int, trained: bool = True) -> nn.Module:
    """The recipe's model with weights drawn from `seed`, or taken from where the recipe says.

    Without `trained` they are drawn anyway: others are to take their place.
    """
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"num_classes": len(data.classes), "in_chans": data.preprocessing.channels}
    gating = recipe.gating
    if recipe.model is not None:
        network = create_model(recipe.model, **shape, **recipe.gater_options())
    else:
        backbone = create_model(str(recipe.backbone), **shape, pretrained=recipe.pretrained and trained)
        if isinstance(backbone, GaterNet):
            raise ValueError(f"backbone must be a plain network to gate, but {recipe.backbone} is gated already")
        sizes = data.preprocessing.channels, data.preprocessing.height, data.preprocessing.width
        network = gate_as(gating, backbone.train(), torch.zeros(2, *sizes))
    gated = isinstance(network, GaterNet)
    if gating.backbone_from and trained:
        backbone = network.backbone if gated else network
        _start_from(backbone, gating.backbone_from, "backbone", len(data.classes))
    if gating.extractor_from and trained:
        if not gated:
            raise ValueError(f"{recipe.model} has no gater that could start from {gating.extractor_from}")
        _start_from(network.gater.get_submodule("extractor"), gating.extractor_from, "extractor", 0)
    return network


def gate_as(gating: Gating, backbone: nn.Module, example_input: Tensor) -> GaterNet:
    """Gate a network as a recipe says; see `gaternet.gate`."""
    return gate(
        backbone,
        example_input,
        gater=None if gating.extractor == "auto" else gating.extractor,
        shrink=gating.shrink,
        sites=gating.sites,
        group_size=gating.group_size,
        bottleneck=gating.bottleneck,
        open=gating.open,
        batch_norm=gating.batch_norm,
        initial_bias=gating.initial_bias,
        noise_std=gating.noise_std,
        hard_probability=gating.hard_probability,
    )


class GuidedNet(nn.Module):
    """A GaterNet while it trains, with what our own recipes add to the paper's training and evaluation lacks.

    With `auxiliary_weight`, a classifier on the extractor's features (Szegedy et al., 2015, section 5). At first the
    gates teach the extractor little, and gates that know nothing of the image teach the backbone to do without them.
    With a loss of its own the extractor learns as fast as a plain network.

    With `open_probability`, samples for which all gates are open, at random. A gater that knows the training images
    tells the backbone their classes by its gates; the backbone then learns to read those rather than to look.

    Raises:
        ValueError: there is to be a classifier, and the network's gater has no extractor.
    """

    def __init__(self, network: GaterNet, gating: Gating, num_classes: int) -> None:
        super().__init__()
        self.network, self.open_probability = network, gating.open_probability
        self.classifier: nn.Linear | None = None
        if gating.auxiliary_weight:
            if (usual := network.plain_gater) is None:
                raise ValueError("auxiliary_weight needs a usual Gater: this network makes its gates in another way")
            self.classifier = nn.Linear(usual.fc1.in_features, num_classes)

    def forward(self, images: Tensor, return_gates: Literal[True]) -> tuple[Tensor, ...]:
        """The network's logits (B, K), its gater's gates (B, C), and the classifier's logits (B, K) if there is one."""
        gater = self.network.gater
        if self.classifier is None:
            gates, guess = self.network.gates(images), ()
        else:
            assert isinstance(gater, Gater)
            features = gater.features(images)
            gates, guess = gater.sample(gater.decide(features)), (self.classifier(features),)
        used = gates
        if self.training and self.open_probability:
            used = gates.masked_fill(torch.rand_like(gates[:, :1]) < self.open_probability, 1)
        return self.network.forward_gated(images, used), gates, *guess


def load_teacher(recipe: Recipe, data: ImageData, accelerator: Accelerator) -> Callable[[Tensor], Tensor] | None:
    """The network to distil from, as a function from pixels (uint8) to logits (B, K) without gradients; or None.

    Raises:
        ValueError: there is no such network, or it knows other classes or other images.
    """
    source = recipe.distillation.teacher
    if source is None:
        return None
    teacher = Trained.open(source)
    network, preprocessing, ours = teacher.network, teacher.preprocessing, data.preprocessing
    channels_last_(network.to(accelerator.device))
    to_input = ToInput(preprocessing)
    sizes = [(p.channels, p.height, p.width) for p in (preprocessing, ours)]
    if not match_classes(recipe.data, data.classes, teacher.metadata) or sizes[0] != sizes[1]:
        raise ValueError(f"the teacher {source} was trained on other classes or images of another size: name another")

    def ask(images: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            return network(to_input(images))

    return ask


def prepared_for(
    data: ImageData, network: nn.Module, recipe: Recipe | None = None, known: Mapping[str, Any] | None = None
) -> ImageData:
    """The data, with mean and deviation as the network's trained weights expect them.

    The first of these that is there decides: `known`, the preprocessing of a run that is resumed; that of the model
    `backbone_from`, if it was saved; a GaterNet's own metadata; the network's `pretrained_cfg`, timm's. For a recipe
    that starts from no trained weights the data is given back as it is.
    """
    source = recipe.gating.backbone_from if recipe else None
    if recipe and not (source or recipe.pretrained):
        return data
    backbone = network.backbone if isinstance(network, GaterNet) else network
    own = network.metadata.get("preprocessing") if isinstance(network, GaterNet) else None
    config: Any = known or (source and _saved_preprocessing(Path(source))) or own
    config = config or getattr(backbone, "pretrained_cfg", None)
    if not config or len(config["mean"]) != data.preprocessing.channels:
        return data
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return dataclasses.replace(data, preprocessing=dataclasses.replace(data.preprocessing, mean=mean, std=std))


def set_training_mode(network: nn.Module, recipe: Recipe) -> None:
    """Training mode, but for the part that the recipe freezes: it stays in evaluation mode and has no gradients."""
    network.train()
    if isinstance(network, GaterNet) and recipe.gating.freeze != "none":
        part = network.backbone if recipe.gating.freeze == "backbone" else network.gater
        part.requires_grad_(False).eval()


def make_optimizer(
    network: nn.Module, recipe: Recipe, accelerator: Accelerator, auxiliary: nn.Module | None = None
) -> torch.optim.Optimizer:
    """SGD on all parameters; each group's "scale" is its learning rate's factor. `auxiliary` learns like the gater."""
    options, gater_lr = recipe.optimizer, recipe.gating.gater_lr
    groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "scale": 1.0}]
    if isinstance(network, GaterNet) and gater_lr is not None:
        own = {id(parameter) for parameter in network.gater.parameters()}
        parts: list[list[nn.Parameter]] = [[], []]  # what a subclass adds learns like the backbone
        for parameter in network.parameters():
            parts[id(parameter) in own].append(parameter)
        groups = [{"params": parts[0], "scale": 1.0}, {"params": parts[1], "scale": gater_lr / options.lr}]
    if auxiliary is not None:
        groups[-1]["params"] += auxiliary.parameters()
    return torch.optim.SGD(
        groups,
        options.lr,
        options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        fused=accelerator.scaler is None and accelerator.device.type in ("cpu", "cuda"),
    )


def make_density(network: GaterNet, gating: Gating, images: Tensor) -> Callable[[Tensor], Tensor]:
    """What the penalty sees of the gates: a function from gates (B, C) to densities (S,) in [0, 1].

    The share of open gates; or (penalty "sites") one such share for each site; or ("each") for each gate the share of
    images that open it; or ("macs") the share of the backbone's MACs that the images need. `images` are an example,
    (B, channels, H, W).
    """
    if gating.penalty == "macs":
        cost = CostModel.of(network, images)
        return lambda gates: (cost(gates).mean()[None] / cost.dense).to(gates.dtype)
    if gating.penalty == "sites":
        slices = list(dict.fromkeys((site.start, site.stop) for site in network.sites))
        return lambda gates: torch.stack([gates[:, start:stop].mean() for start, stop in slices])
    if gating.penalty == "each":
        return lambda gates: gates.mean(0)
    return lambda gates: gates.mean()[None]


def model_metadata(
    recipe: Recipe, network: nn.Module, data: ImageData, seed: int, epochs: int, tested: Mapping[str, Any]
) -> dict[str, Any]:
    """What is saved beside the weights: how to rebuild and use the model, and how it was trained."""
    source: Mapping[str, Any] = network.metadata if isinstance(network, GaterNet) else {}
    if not source:
        source = {"backbone": describe_backbone(network, data.preprocessing.channels)}
    trained = {"recipe": recipe.name, "data": recipe.data, "seed": seed, "epochs": epochs}
    trained |= {"test_accuracy": tested["accuracy"]} | {name: tested[name] for name in ("density",) if name in tested}
    trained["weights"] = checkpoint.fingerprint(network)  # what this is true of
    return {**source, **data.metadata(), "trained": trained}


def _start_from(part: nn.Module, source: str, name: str, num_classes: int) -> None:
    """Copy trained weights into the backbone, or into the extractor, which has no classifier.

    `source` is a run, a saved model, or a file with a state_dict. A classifier for other classes is left as it is.
    """
    found = {key.removeprefix("module."): value for key, value in _trained_weights(source, name).items()}
    foreign: set[str] = set()
    if name == "extractor":
        part = part[1] if isinstance(part, nn.Sequential) else part  # behind what shrinks the images
        found = {key.removeprefix("1."): value for key, value in found.items()}
        config: Any = getattr(part, "pretrained_cfg", {})  # timm's
        classifier = f"{config.get('classifier', 'fc')}."
        foreign = {key for key in found.keys() - part.state_dict().keys() if key.startswith(classifier)}
    wanted = part.state_dict()
    if num_classes:
        foreign |= other_classifier(wanted, found, num_classes)
    try:
        part.load_state_dict({**wanted, **{key: value for key, value in found.items() if key not in foreign}})
        if missing := wanted.keys() - found.keys():
            raise RuntimeError(f"no {min(missing)}")
    except RuntimeError as error:
        raise ValueError(
            f"{source} holds another model than the {name} of this recipe: name one of its kind"
        ) from error


def _saved_preprocessing(source: Path) -> Mapping[str, Any] | None:
    """What a run or a saved model, or its file of weights, says of its inputs; None for weights alone."""
    if source.is_file() and source.name != checkpoint.WEIGHTS:
        return None
    config = (source.parent if source.is_file() else find_model(source)) / checkpoint.CONFIG
    metadata = files.read_json(config).get("metadata") if config.is_file() else None
    return (metadata or {}).get("preprocessing")


def _trained_weights(source: str, name: str) -> Mapping[str, Tensor]:
    path = Path(source)
    if path.is_file():
        state = files.load_tensors(path)
        nested: list[Any] = [state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)]
        return nested[0] if nested else state
    trained = Trained.open(path).network
    if isinstance(trained, GaterNet):
        trained = trained.backbone if name == "backbone" else trained.gater.get_submodule("extractor")
    return trained.state_dict()
