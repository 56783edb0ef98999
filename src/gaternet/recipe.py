"""What a recipe is: everything that decides a training run's result, as plain values; `gaternet.recipes` lists them.

`override` changes single fields of one. `Runtime` is what depends on the machine; of a result it changes
rounding, and which random numbers are drawn, alone.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A field with a default and the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


def _check(options: object, name: str, condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, but is {getattr(options, name)!r}")


def _check_all(options: Any) -> None:
    """What holds for any options: numbers are finite, and where there are choices it is one of them."""
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        _check(options, name, not isinstance(value, float) or math.isfinite(value), "finite")
        if get_origin(kind) is Literal:
            *others, last = get_args(kind)
            _check(options, name, value in (*others, last), f"{', '.join(others)} or {last}")


@dataclass(frozen=True)
class Optimizer:
    """SGD and its schedule; rates are for the batch size that the recipe names."""

    lr: float = option(0.1, "peak learning rate")
    momentum: float = option(0.9, "momentum of SGD")
    nesterov: bool = option(True, "Nesterov momentum")
    weight_decay: float = option(1e-4, "weight decay, on all parameters")
    label_smoothing: float = option(0.0, "label smoothing, in [0, 1)")
    schedule: Literal["step", "cosine", "constant"] = option(
        "step", "how the learning rate falls: step, cosine, constant"
    )
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "step: share of the training at which the rate is cut, given once for each cut"
    )
    gamma: float = option(0.1, "step: factor of each cut")
    warmup_epochs: float = option(0.0, "epochs over which the rate rises linearly from 0")
    ema_decay: float = option(0.0, "decay per step of the exponential moving average of the weights; 0 for none")

    def __post_init__(self) -> None:
        _check_all(self)
        _check(self, "lr", self.lr > 0, "above 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _check(self, "nesterov", self.momentum > 0 or not self.nesterov, "off where momentum is 0")
        _check(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        _check(self, "milestones", all(0 < share < 1 for share in self.milestones), "shares in (0, 1)")
        _check(self, "gamma", self.gamma > 0, "above 0")
        _check(self, "warmup_epochs", self.warmup_epochs >= 0, "at least 0")
        _check(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")


@dataclass(frozen=True)
class Gating:
    """The gater and its losses; plain models take `ACTS_ON_PLAIN` of it alone."""

    extractor: str = option("resnet20", "the gater's E: a network of ours or timm's by name; with --backbone also auto")
    shrink: int | None = option(None, "factor by which E's images are average-pooled; default: 1, or auto's choice")
    sites: Literal["residual", "all"] = option("residual", "filters of --backbone to gate: residual, all")
    group_size: int = option(1, "with --backbone: number of neighbouring filters that share a gate")
    open: bool = option(False, "with --backbone: start with every gate open, as the plain network")
    bottleneck: int = option(8, "width b of the middle of the gater's D")
    batch_norm: bool = option(True, "BatchNorm in D: the paper's text has it, its public code has not")
    initial_bias: float = option(
        0.0, "bias of D's last layer at the start; 0 opens about half of the gates, 2 nearly all"
    )
    noise_std: float = option(1.0, "standard deviation of the noise on the gates' logits in training")
    anneal_noise: bool = option(False, "let the noise fall linearly, to 0 at the end of training")
    final_slope: float = option(
        1.0, "slope of the soft gates at the end of training, from 1 at its start; their gradient stays that of 1"
    )
    hard_probability: float = option(0.5, "chance that a training sample's gates are hard")
    open_probability: float = option(0.0, "chance that a training sample has all gates open, whatever the gater says")
    sparsity: float = option(0.0, "lambda: weight of the share of open gates in the loss")
    target_density: float | None = option(None, "density to steer to, in place of lambda: of what --penalty counts")
    density_weight: float = option(10.0, "weight of (density - target_density)^2 in the loss")
    sparsity_start: float = option(0.0, "epoch at which the penalty begins to act")
    sparsity_ramp: float = option(0.0, "epochs over which it then rises linearly to its full weight")
    penalty: Literal["gates", "sites", "each", "macs"] = option(
        "gates",
        "what density is counted: of gates (all together), sites (each site separately), each (each gate separately, "
        "with --target-density), macs (the backbone's MACs)",
    )
    auxiliary_weight: float = option(0.0, "weight of the loss of a classifier on E's features, which only training has")
    freeze: Literal["none", "backbone", "gater"] = option("none", "part that does not learn: none, backbone, gater")
    gater_lr: float | None = option(None, "peak learning rate of the gater; default: the backbone's")
    backbone_from: str | None = option(None, "run, saved model or state_dict file that the backbone starts from")
    extractor_from: str | None = option(None, "run, saved model or state_dict file that the gater's E starts from")

    def __post_init__(self) -> None:
        _check_all(self)
        _check(self, "shrink", self.shrink is None or self.shrink >= 1, "at least 1")
        _check(self, "bottleneck", self.bottleneck >= 1, "at least 1")
        _check(self, "noise_std", self.noise_std >= 0, "at least 0")
        _check(self, "hard_probability", 0 <= self.hard_probability <= 1, "in [0, 1]")
        _check(self, "open_probability", 0 <= self.open_probability < 1, "in [0, 1)")
        _check(self, "final_slope", self.final_slope > 0, "above 0")
        _check(self, "initial_bias", not (self.open and self.initial_bias), "left out where open is set")
        _check(self, "sparsity", self.sparsity >= 0, "at least 0")
        target = self.target_density
        _check(self, "target_density", target is None or 0 <= target <= 1, "in [0, 1]")
        _check(self, "target_density", target is None or self.sparsity == 0, "left out where sparsity is set")
        _check(self, "density_weight", self.density_weight >= 0, "at least 0")
        _check(self, "sparsity_start", self.sparsity_start >= 0, "at least 0")
        _check(self, "sparsity_ramp", self.sparsity_ramp >= 0, "at least 0")
        _check(self, "auxiliary_weight", self.auxiliary_weight >= 0, "at least 0")
        _check(self, "group_size", self.group_size >= 1, "at least 1")
        _check(self, "gater_lr", self.gater_lr is None or self.gater_lr > 0, "above 0")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, see `gaternet.augment`."""

    crop: bool = option(True, "crop at random: of images in memory with margins of zeros, of files parts of any size")
    flip: bool = option(True, "mirror half of the images, left to right")
    cutout: int = option(0, "side in pixels of a grey square at a random place; 0 for none")
    policy: Literal["none", "autoaugment", "randaugment", "trivialaugment"] = option(
        "none",
        "change colours and geometry: none, autoaugment, randaugment, trivialaugment; of sets in memory eight "
        "neighbours of a batch alike",
    )

    def __post_init__(self) -> None:
        _check_all(self)
        _check(self, "cutout", self.cutout >= 0, "at least 0")


@dataclass(frozen=True)
class Distillation:
    """Learning from a trained network's outputs as well as from labels (Hinton et al., 2015)."""

    teacher: str | None = option(None, "run or saved model of the same classes to learn from as well")
    teacher_weight: float = option(0.5, "its share of the loss, in [0, 1]")
    temperature: float = option(4.0, "both outputs are divided by this before they are compared")

    def __post_init__(self) -> None:
        _check_all(self)
        _check(self, "teacher_weight", 0 <= self.teacher_weight <= 1, "in [0, 1]")
        _check(self, "temperature", self.temperature > 0, "above 0")


@dataclass(frozen=True)
class PaperRow:
    """What the paper reports for a row of its tables.

    Attributes:
        table: its number.
        params: parameters in millions, as printed; None where they are not.
        error: test error in percent, on ImageNet of a single crop.
        gates: number of gates; None for a plain network.
        top5_error: share in percent of the test images whose class is not among the five likeliest; ImageNet alone.
    """

    table: int
    params: str | None
    error: float
    gates: int | None = None
    top5_error: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A training run, but for its seed and the machine it runs on."""

    name: str
    model: str | None = option("resnet20_gated", "model name, see gaternet.model_names()")
    backbone: str | None = option(None, "in place of a model, a network to gate: timm:NAME, torchvision:NAME or ours")
    pretrained: bool = option(False, "start --backbone from the trained weights that its library offers")
    data: str = option("cifar10", "digits, cifar10, cifar100, fashion_mnist, a .npz file or a folder of images")
    image_size: int | None = option(None, "side in pixels that images are brought to; default: as stored, folders 224")
    epochs: int = option(160, "passes over the training images")
    batch_size: int = option(128, "images per step, over all processes together")
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    gating: Gating = Gating()
    distillation: Distillation = Distillation()
    paper: PaperRow | None = None
    about: str = field(default="", compare=False)  # what it is, in a few words

    def __post_init__(self) -> None:
        if (self.model is None) == (self.backbone is None):
            given = "neither" if self.model is None else "both"
            raise ValueError(f"name either a model or a backbone to gate, not {given}")
        _check(self, "pretrained", not self.pretrained or self.backbone is not None, "off without backbone")
        _check(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        _check(self, "epochs", self.epochs >= 1, "at least 1")
        _check(self, "batch_size", self.batch_size >= 1, "at least 1")
        for name in ("sites", "group_size", "open"):
            if self.model is not None and self.gated and getattr(self.gating, name) != getattr(Gating(), name):
                plain = self.model.removesuffix("_gated")
                raise ValueError(
                    f"{name} acts on a backbone, and the model {self.model} is gated as published: "
                    f"name backbone {plain} in its place"
                )

    @property
    def duration(self) -> str:
        """Its epochs in words."""
        return "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"

    @property
    def gated(self) -> bool:
        """Whether the model is a GaterNet."""
        return self.model is None or self.model.endswith("_gated")

    def gater_options(self) -> dict[str, Any]:
        """The arguments of `create_model` that a gated model has and a plain one has not."""
        names = ("extractor", "bottleneck", "batch_norm", "initial_bias", "noise_std", "hard_probability")
        options = {name: getattr(self.gating, name) for name in names} | {"shrink": self.gating.shrink or 1}
        return options if self.gated else {}


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out on a machine: its speed, rounding, and the random numbers that are drawn."""

    cpu: bool = option(False, "run on the CPU even if there is a GPU")
    precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "no (float32), bf16, fp16, or auto: bf16 where fast"
    )
    channels_last: bool = option(True, "keep images as NHWC in memory")
    compile: bool = option(False, "compile the model with torch.compile")
    cuda_graph: bool = option(
        True,
        "with one process on one GPU: capture the training step as a CUDA graph, and replay that; needs some memory; "
        "must be off for networks that wait for the GPU, or whose Python code does something else from step to step",
    )
    workers: int | None = option(
        None, "processes that read image files, for each process that trains; default: one per core, at most 8"
    )
    log_every: int = option(20, "steps between lines in metrics.jsonl")
    save_minutes: float = option(5.0, "minutes between checkpoints within an epoch; each epoch ends with one anyway")
    tensorboard: bool = option(False, "also write TensorBoard files into the run directory")
    data_root: str | None = option(None, "folder of torchvision's sets; default: $GATERNET_DATA or ~/.cache/gaternet")

    def __post_init__(self) -> None:
        _check_all(self)
        _check(self, "workers", self.workers is None or self.workers >= 0, "at least 0")
        _check(self, "log_every", self.log_every >= 1, "at least 1")
        _check(self, "save_minutes", self.save_minutes >= 0, "at least 0")


_OF_GATES = (
    *("sparsity", "target_density", "density_weight", "penalty", "sparsity_start", "sparsity_ramp"),
    *("noise_std", "hard_probability", "anneal_noise", "final_slope", "gater_lr", "auxiliary_weight"),
)  # options that act on a gater that learns
ACTS_ON_PLAIN = frozenset({"backbone_from"})  # of the options in `Gating`
GROUPS = ("augmentation", "optimizer", "gating", "distillation")  # fields of a recipe that hold options themselves
TOLD = ("paper", "about")  # fields of a recipe that are words about it, and none of its options


def idle_options(options: Mapping[str, Any]) -> dict[str, str | None]:
    """Of a recipe's options, named without their groups, those that have no effect beside the others.

    Returns:
        option -> what it has an effect with only; None where that is a gater, and there is none.
    """
    found: dict[str, str | None] = {}
    penalty = options.get("sparsity") or options.get("target_density") is not None
    for needed, there, names in (
        ("--teacher", options.get("teacher"), ("teacher_weight", "temperature")),
        ("--target-density", options.get("target_density") is not None, ("density_weight",)),
        ("--target-density or --sparsity", penalty, ("penalty", "sparsity_start", "sparsity_ramp")),
        ("--noise-std above 0", options.get("noise_std") != 0, ("anneal_noise",)),
        ("--hard-probability below 1", options.get("hard_probability") != 1, ("final_slope",)),
        ("--schedule step", options.get("schedule") == "step", ("milestones", "gamma")),
        ("--freeze none or backbone", options.get("freeze") != "gater", _OF_GATES),
    ):
        found |= dict.fromkeys(() if there else names, needed)
    if options.get("penalty") == "each" and options.get("sparsity"):  # the mean over all gates is that of all alike
        found["penalty"] = "--target-density"
    model = options.get("model")
    if model is not None and not model.endswith("_gated"):
        of_gater = {field.name for field in dataclasses.fields(Gating)} - ACTS_ON_PLAIN
        found |= dict.fromkeys(of_gater)
    return found


def flat_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe, as plain data, and of its groups, under their names on the command line."""
    plain = json.loads(json.dumps(recipe))  # tuples are lists in what was saved
    groups = [plain.pop(group, {}) for group in GROUPS]  # older runs have fewer
    options = {name: value for name, value in plain.items() if name not in ("name", *TOLD)}
    return options | {name: value for group in groups for name, value in group.items()}


def data_name(source: str) -> str:
    """The name of a data set, wherever it lies: without folders, and without .npz."""
    return Path(source).name.removesuffix(".npz")


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields changed; those of a group, say `optimizer`, are named without it.

    A changed recipe no longer stands for the paper's row, so it loses `paper`, and `about`; one whose values are the
    same keeps them, also where it finds the same data elsewhere, in a file or folder with the set's name.

    Raises:
        ValueError: for a field that does not exist, or a value out of range.
    """
    changes = dict(changes)
    if not changes:
        return recipe
    for given, other in (("model", "backbone"), ("backbone", "model")):  # either takes the other's place
        if changes.get(given):
            changes.setdefault(other, None)
    for given, other, none in (("sparsity", "target_density", None), ("target_density", "sparsity", 0.0)):
        if changes.get(given) is not None:
            changes.setdefault(other, none)
    groups = {}
    for group in GROUPS:
        options = getattr(recipe, group)
        names = {f.name for f in dataclasses.fields(options)}
        groups[group] = dataclasses.replace(options, **{name: changes.pop(name) for name in names & changes.keys()})
    known = {f.name for f in dataclasses.fields(recipe)} - {"name", *GROUPS, *TOLD}
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"a recipe has no option {unknown[0]!r}: see gaternet train --help")
    changed = dataclasses.replace(recipe, **groups, **changes)
    same_data = data_name(changed.data) == data_name(recipe.data)
    same = same_data and dataclasses.replace(changed, data=recipe.data) == recipe
    return changed if same else dataclasses.replace(changed, paper=None, about="")
