"""The recipes: one for each row of the paper's tables, and those of our own.

`RECIPES` maps names to recipes. The paper's training recipe is not published: for Table 1 it is that of the code which
the paper's public code is patterned on, else that of the backbone's authors (docs/method.md).
"""

import difflib
from collections.abc import Mapping
from typing import Any

from gaternet.recipe import Augmentation, Gating, Optimizer, PaperRow, Recipe, flat_options, override

# Table 1: model -> gates, then (params, error) on CIFAR-10 and on CIFAR-100
_TABLE_1 = {
    "resnet20": (None, ("0.27M", 8.06), ("0.28M", 32.39)),
    "resnet20_wider": (None, ("0.56M", 6.85), ("0.57M", 30.08)),
    "resnet20_se": (None, ("0.28M", 7.81), ("0.29M", 31.22)),
    "resnet20_gated": (336, ("0.55M", 6.88), ("0.60M", 30.79)),
    "resnet56": (None, ("0.86M", 6.74), ("0.86M", 28.87)),
    "resnet56_wider": (None, ("1.08M", 6.72), ("1.09M", 28.39)),
    "resnet56_se": (None, ("0.88M", 6.27), ("0.89M", 28.00)),
    "resnet56_gated": (1008, ("1.14M", 5.72), ("1.14M", 27.71)),
    "resnet164": (None, ("1.62M", 5.61), ("1.64M", 25.39)),
    "resnet164_wider": (None, ("2.04M", 5.57), ("2.07M", 24.80)),
    "resnet164_se": (None, ("2.00M", 5.51), ("2.02M", 23.83)),
    "resnet164_gated": (7200, ("1.96M", 4.80), ("1.98M", 23.56)),
}


# Table 2, CIFAR-10: model -> gates, then (params, error) plain and gated
_TABLE_2 = {
    "densenet_bc_100_12": (540, ("0.77M", 4.48), ("1.05M", 4.03)),
    "densenet_bc_250_24": (2880, ("15.32M", 3.61), ("15.62M", 3.31)),
    "densenet_bc_190_40": (3600, ("25.62M", 3.52), ("25.93M", 3.39)),
    "shake_shake_26_2x64d": (3584, ("11.71M", 3.05), ("12.01M", 2.89)),
    "shake_shake_26_2x96d": (5376, ("26.33M", 2.82), ("26.65M", 2.64)),
}


def _table_1() -> list[Recipe]:
    recipes = []
    for model, (gates, *rows) in _TABLE_1.items():
        for data, (params, error) in zip(("cifar10", "cifar100"), rows, strict=True):
            # By its parameter count, this row alone has a wider bottleneck than 8.
            gating = Gating(bottleneck=128) if (model, data) == ("resnet20_gated", "cifar100") else Gating()
            paper = PaperRow(1, params, error, gates)
            recipes.append(Recipe(f"{data}_{model}", model, data=data, gating=gating, paper=paper))
    return recipes


def _table_2() -> list[Recipe]:
    """Trained as their authors did, since the paper's own recipe is not published."""
    dense = {"epochs": 300, "batch_size": 64, "optimizer": Optimizer()}  # Huang et al., 2017
    cosine = Optimizer(lr=0.2, schedule="cosine")
    shake = {"epochs": 1800, "batch_size": 128, "optimizer": cosine}  # Gastaldi, 2017
    recipes = []
    for model, (gates, *rows) in _TABLE_2.items():
        options: Any = dense if model.startswith("densenet") else shake
        for suffix, count, (params, error) in zip(("", "_gated"), (None, gates), rows, strict=True):
            paper = PaperRow(2, params, error, count)
            recipes.append(Recipe(f"cifar10_{model}{suffix}", f"{model}{suffix}", paper=paper, **options))
    return recipes


# Table 3, ImageNet: model -> gates, (parameters, top-1 error, top-5 error)
_TABLE_3 = {
    "resnet34": (None, ("21.80M", 26.56, 8.48)),
    "resnet34_wider": (None, ("33.89M", 25.36, 7.91)),
    "resnet34_se": (None, (None, 26.08, 8.30)),
    "resnet34_gated": (3776, ("34.08M", 26.04, 8.34)),
    "resnet101": (None, ("44.55M", 23.36, 6.56)),
    "resnet101_wider": (None, ("59.17M", 21.89, 6.05)),
    "resnet101_se": (None, (None, 22.38, 6.07)),
    "resnet101_gated": (32512, ("64.21M", 21.51, 5.78)),
    "resnet152": (None, ("60.19M", 22.34, 6.22)),
    "resnet152_wider": (None, ("81.37M", 21.50, 5.67)),
    "resnet152_se": (None, (None, 21.57, 5.73)),
    "resnet152_gated": (47872, ("83.80M", 21.19, 5.45)),
    "inception_v4": (None, ("44.50M", 20.33, 4.99)),
    "inception_v4_gated": (16608, ("61.67M", 19.64, 4.80)),
}


def _table_3() -> list[Recipe]:
    """Trained as ResNets commonly are on ImageNet (He et al., 2016), since the paper's own recipe is not published."""
    common: Any = {
        "data": "imagenet",
        "epochs": 90,
        "batch_size": 256,
        "optimizer": Optimizer(lr=0.1, milestones=(1 / 3, 2 / 3, 8 / 9)),
        "gating": Gating(extractor="resnet18", bottleneck=256),
    }
    recipes = []
    for model, (gates, (params, error, top5_error)) in _TABLE_3.items():
        size = 299 if model.startswith("inception") else 224
        paper = PaperRow(3, params, error, gates, top5_error)
        recipes.append(Recipe(f"imagenet_{model}", model, image_size=size, paper=paper, **common))
    return recipes


# What closed the distance to the plain network in short trainings, and kept gates dependent on the image
# (docs/results.md): the extractor learns the classes by itself too, gates start rather open, and their noise falls.
GUIDED: Any = {"auxiliary_weight": 1.0, "initial_bias": 1.0, "anneal_noise": True}

# For an extractor as large as the backbone: it gets to know the training images, and the backbone would come to read
# their classes from the gates; samples with all gates open keep it looking (docs/method.md).
OPEN_SAMPLES: Any = {**GUIDED, "open_probability": 0.5}

_GUIDED = "gated, trained our way"
_HALF = "half of the MACs: gates at all filters"
_NARROW = "half of the MACs: plain and narrower"


def _imagenette() -> list[Recipe]:
    """Ten classes of ImageNet, some 9,500 photographs, 64 pixels: a folder that a CPU trains on in an hour or two."""
    optimizer = Optimizer(lr=0.1, weight_decay=5e-4, schedule="cosine", warmup_epochs=2.0)
    common: Any = {"data": "imagenette64", "image_size": 64, "epochs": 30, "batch_size": 64, "optimizer": optimizer}
    gating = Gating(extractor="resnet20", bottleneck=64, **GUIDED)
    models = {"resnet18": "small photographs: plain", "resnet18_gated": "small photographs: gated, guided"}
    return [
        Recipe(f"imagenette64_{model}", model, gating=gating, about=about, **common) for model, about in models.items()
    ]


def _short() -> list[Recipe]:
    """CIFAR-10 for machines without a GPU: no rows of the paper, but its networks beside each other.

    ResNet-8 sees images of half the size, so that every option which the paper leaves open can be varied in hours.
    "guided" is our own way of training the paper's gated network. "half" and "narrow" are as in `_half`.
    """
    recipes = []
    optimizer = Optimizer(lr=0.2, weight_decay=5e-4, schedule="cosine", warmup_epochs=2.0)
    kinds = {"": "plain", "_wider": "plain, with the parameters of gated", "_gated": "gated as in the paper's rows"}
    for backbone, size in (("resnet20", None), ("resnet8", 16)):
        gating, where = Gating(extractor=backbone), f"for CPUs, {size} pixels: " if size else "for CPUs: "
        common: Any = {"epochs": 8, "image_size": size, "optimizer": optimizer, "gating": gating}
        for kind, about in kinds.items():
            model = f"{backbone}{kind}"
            recipes.append(Recipe(f"short_{model}", model, about=where + about, **common))
        guided = common | {"gating": Gating(extractor=backbone, **OPEN_SAMPLES), "about": where + _GUIDED}
        recipes.append(Recipe(f"short_{backbone}_guided", f"{backbone}_gated", **guided))
    common = {"epochs": 8, "optimizer": optimizer}
    half = common | {"gating": _to_half(0.42, 3.0, 3.0), "about": f"for CPUs: {_HALF}"}
    recipes.append(Recipe("short_resnet20_half", None, "resnet20", **half))
    recipes.append(Recipe("short_resnet20_narrow", "resnet20_narrow", about=f"for CPUs: {_NARROW}", **common))
    return recipes


def _to_half(target: float, start: float, ramp: float) -> Gating:
    """All filters gated by a small gater, down to half of the dense network's MACs.

    The target is the backbone's; the gater takes 7.7 % more beside a ResNet-20, 2.5 % beside a ResNet-56. The backbone
    learns first, with open gates: where they close from the start it learns to read a small gater's opinion, and is no
    better than that (docs/method.md). So the gater is not guided, either.
    """
    return Gating(
        extractor="resnet8",
        shrink=2,
        sites="all",
        open=True,
        bottleneck=32,
        anneal_noise=True,
        target_density=target,
        sparsity_start=start,
        sparsity_ramp=ramp,
        penalty="macs",
    )


def _half() -> list[Recipe]:
    """Past the paper: gated to half of the dense network's MACs; "narrow" is a plain network of as many, beside it.

    `--teacher` adds what a trained dense network knows.
    """
    optimizer = Optimizer(lr=0.1, weight_decay=5e-4, schedule="cosine", warmup_epochs=2.0)
    common: Any = {"epochs": 200, "optimizer": optimizer}
    recipes = []
    for backbone, target in (("resnet20", 0.42), ("resnet56", 0.47)):
        gating = _to_half(target, 75.0, 75.0)
        recipes.append(Recipe(f"cifar10_{backbone}_half", None, backbone, gating=gating, about=_HALF, **common))
        recipes.append(Recipe(f"cifar10_{backbone}_narrow", f"{backbone}_narrow", about=_NARROW, **common))
    return recipes


def _open_samples() -> list[Recipe]:
    """Past the paper: ResNet-20 with as many parameters as its Wider twin, which beats the paper's gated one.

    "guided" is Table 1's network and training, but for a guided gater and open samples, and on CIFAR-100 for the
    bottleneck of CIFAR-10, with which it stays below Wider; "all" has a gate at every filter.
    """
    recipes = []
    for data in ("cifar10", "cifar100"):
        common: Any = {"data": data, "gating": Gating(**OPEN_SAMPLES), "about": _GUIDED}
        recipes.append(Recipe(f"{data}_resnet20_guided", "resnet20_gated", **common))
        common |= {"gating": Gating(sites="all", **OPEN_SAMPLES), "about": f"{_GUIDED}, at all filters"}
        recipes.append(Recipe(f"{data}_resnet20_all", None, "resnet20", **common))
    return recipes


def _digits() -> list[Recipe]:
    """For `make demo` and tests, seconds on a CPU: handwritten digits, 8x8 grey pixels, 1,437 of them to train on."""
    optimizer = Optimizer(lr=0.1, weight_decay=5e-4, schedule="cosine", warmup_epochs=2.0)
    gating = Gating(target_density=0.6, sparsity_start=2.0, sparsity_ramp=4.0, **GUIDED)
    models = {
        "resnet20": "a demonstration: plain",
        "resnet20_gated": "a demonstration: gated, 60 % open",
    }
    return [
        Recipe(
            f"digits_{model}",
            model,
            about=about,
            data="digits",
            augmentation=Augmentation(flip=False),
            epochs=20,
            batch_size=64,
            optimizer=optimizer,
            gating=gating,
        )
        for model, about in models.items()
    ]


def _finetune() -> Recipe:
    """Gate a network that was trained elsewhere: all open first, then to half of its MACs, the gater's on top."""
    optimizer = Optimizer(lr=0.01, schedule="cosine", warmup_epochs=0.5)
    gating = Gating(
        extractor="auto",
        sites="all",
        open=True,
        bottleneck=64,
        gater_lr=0.05,
        target_density=0.5,
        penalty="macs",
        sparsity_ramp=2.0,
    )
    return Recipe(
        "finetune",
        model=None,
        backbone="timm:resnet18",
        about="half of the MACs: trained networks, then gated",
        pretrained=True,
        epochs=10,
        batch_size=64,
        optimizer=optimizer,
        gating=gating,
    )


_OURS = [*_digits(), *_imagenette(), *_short(), *_open_samples(), *_half(), _finetune()]
_ALL = [*_OURS, *_table_1(), *_table_2(), *_table_3()]
RECIPES = {recipe.name: recipe for recipe in _ALL}


def saved_recipe(saved: Mapping[str, Any]) -> Recipe:
    """The recipe that was saved as plain data, say in a run's config.

    Raises:
        ValueError: it has options that there are not, or that cannot be.
    """
    name = str(saved.get("name"))
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in flat_options(saved).items()}
    return override(RECIPES.get(name) or Recipe(name), options)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError, with the nearest name, if there is none."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {close[0]!r}?" if close else "gaternet recipes lists them"
        raise ValueError(f"unknown recipe {name!r}: {hint}")
    return RECIPES[name]
