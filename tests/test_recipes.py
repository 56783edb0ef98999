"""Recipes are plain values that check themselves."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gaternet
from gaternet.data import load_data
from gaternet.models import create_model, model_names
from gaternet.network import build_network
from gaternet.recipe import (
    Augmentation,
    Distillation,
    Gating,
    Optimizer,
    PaperRow,
    Recipe,
    Runtime,
    flat_options,
    idle_options,
    override,
)
from gaternet.recipes import RECIPES, find_recipe

RECIPE = RECIPES["cifar10_resnet56_gated"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_found_by_its_name_and_names_known_models(recipe):
    assert find_recipe(recipe.name) is recipe
    if recipe.model is None:
        assert recipe.backbone
        assert recipe.gated
    else:
        assert recipe.model in model_names()
        assert recipe.gating.extractor in model_names()
        assert recipe.gated == recipe.name.endswith(("_gated", "_guided"))
    assert set(recipe.gater_options()) == (
        {"extractor", "shrink", "bottleneck", "batch_norm", "initial_bias", "noise_std", "hard_probability"}
        if recipe.gated
        else set()
    )


def test_recipes_of_table_1_hold_the_papers_figures(shared):
    """Read from the facts sheet's table, whose rows read | ResNet-20-SE | - | 0.28M | 7.81 | 0.29M | 31.22 |."""
    table = (shared / "PAPER.md").read_text().split("**Table 1**")[1].split("**Table 2**")[0]
    expected = {}
    for line in table.splitlines():
        if line.startswith("| ResNet"):
            title, gates, *figures = (cell.strip() for cell in line.strip("|").split("|"))
            name = title.lower().replace("resnet-", "resnet").replace("-", "_")
            for data, params, error in (("cifar10", *figures[:2]), ("cifar100", *figures[2:])):
                count = None if gates == "-" else int(gates.replace(",", ""))
                expected[f"{data}_{name}"] = PaperRow(1, params, float(error), count)
    assert len(expected) == 24
    assert {name: r.paper for name, r in RECIPES.items() if r.paper and r.paper.table == 1} == expected


def test_recipes_of_table_2_hold_the_papers_figures(shared):
    """Rows read | DenseNet-BC L=100 k=12 | 0.77M / 4.48 | 1.05M / 4.03 | 540 |."""
    table = (shared / "PAPER.md").read_text().split("**Table 2**")[1].split("**Table 3**")[0]
    expected = {}
    for line in table.splitlines():
        if line.startswith(("| DenseNet", "| Shake")):
            title, *figures, gates = (cell.strip() for cell in line.strip("|").split("|"))
            name = re.sub(r"[ -]", "_", title.lower().replace("l=", "").replace("k=", ""))
            for suffix, count, figure in zip(("", "_gated"), (None, int(gates.replace(",", ""))), figures, strict=True):
                params, error = figure.split(" / ")
                expected[f"cifar10_{name}{suffix}"] = PaperRow(2, params, float(error), count)
    assert len(expected) == 10
    assert {name: r.paper for name, r in RECIPES.items() if r.paper and r.paper.table == 2} == expected


def test_recipes_of_table_3_hold_the_papers_figures(shared):
    """Rows read | ResNet-34 | 3,776 | 21.80M -> 34.08M | 26.56 / 8.48 | 26.04 / 8.34 |; Wider and SE follow as text."""
    text = (shared / "PAPER.md").read_text().split("**Table 3**")[1].split("Recipe, not")[0]
    expected = {}
    for line in text.splitlines():
        if line.startswith(("| ResNet", "| Inception")):
            title, gates, params, *figures = (cell.strip() for cell in line.strip("|").split("|"))
            name = "imagenet_" + title.lower().replace("resnet-", "resnet").replace("-", "_")
            counts = (None, int(gates.replace(",", "")))
            for suffix, count, size, pair in zip(("", "_gated"), counts, params.split(" -> "), figures, strict=True):
                top1, top5 = map(float, pair.split(" / "))
                expected[name + suffix] = PaperRow(3, size, top1, count, top5)
    wider, se = " ".join(text.split("Wider: ")[1].split("\n")).split("SE: ")
    for kind, figures in (("wider", wider), ("se", se.split(". ")[0])):
        for depth, top1, top5, size in re.findall(r"R(\d+) (\d+\.\d+)/(\d+\.\d+)(?: \((\S+M)\))?", figures):
            expected[f"imagenet_resnet{depth}_{kind}"] = PaperRow(3, size or None, float(top1), None, float(top5))
    assert len(expected) == 14
    assert {name: r.paper for name, r in RECIPES.items() if r.paper and r.paper.table == 3} == expected


def test_the_papers_rows_share_its_recipe_but_for_one_bottleneck():
    """What the code does that the public one is patterned on; 128 is what one row's parameter count wants."""
    for recipe in RECIPES.values():
        if recipe.paper and recipe.paper.table == 1:
            assert recipe.name == f"{recipe.data}_{recipe.model}"
            assert (recipe.epochs, recipe.batch_size) == (160, 128)
            assert recipe.augmentation == Augmentation(crop=True, flip=True)
            assert recipe.optimizer == Optimizer(
                0.1, 0.9, True, 1e-4, schedule="step", milestones=(0.5, 0.75), gamma=0.1
            )
            assert recipe.gating == Gating(bottleneck=128 if recipe.name == "cifar100_resnet20_gated" else 8)


@pytest.mark.parametrize("kind", ["guided", "all"])
def test_what_is_to_beat_wider_takes_no_more_parameters(kind):
    for name, classes in ((f"cifar10_resnet20_{kind}", 10), (f"cifar100_resnet20_{kind}", 100)):
        data = load_data("digits")
        data = dataclasses.replace(data, classes=tuple(map(str, range(classes))))
        network = build_network(find_recipe(name), data, seed=0)
        wider = create_model("resnet20_wider", classes, in_chans=1)
        assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in wider.parameters())


def test_override_changes_fields_of_every_group_by_their_flat_names():
    changed = override(RECIPE, {"epochs": 3, "lr": 0.5, "schedule": "cosine", "bottleneck": 4, "target_density": 0.3})
    assert changed == dataclasses.replace(
        RECIPE,
        epochs=3,
        optimizer=dataclasses.replace(RECIPE.optimizer, lr=0.5, schedule="cosine"),
        gating=dataclasses.replace(RECIPE.gating, bottleneck=4, target_density=0.3),
        paper=None,
    )
    assert RECIPE.epochs == 160


def test_a_changed_recipe_no_longer_stands_for_the_papers_row():
    assert override(RECIPE, {}) is RECIPE
    assert RECIPE.paper is not None
    for changes in ({"epochs": 161}, {"weight_decay": 0.0}, {"data": "cifar100"}, {"data": "cifar10.npz", "epochs": 1}):
        assert override(RECIPE, changes).paper is None
    moved = override(RECIPE, {"data": "/data/cifar10.npz"})  # the same images elsewhere
    assert moved == dataclasses.replace(RECIPE, data="/data/cifar10.npz")


def test_each_recipe_says_what_it_is_until_it_is_changed():
    assert all(bool(recipe.about) == (recipe.paper is None) for recipe in RECIPES.values())
    recipe = find_recipe("short_resnet20_half")
    assert override(recipe, {"data": "/data/cifar10.npz"}).about == recipe.about
    assert not override(recipe, {"epochs": 9}).about
    assert recipe == dataclasses.replace(recipe, about="")  # words are none of its options


@pytest.mark.parametrize("name", ["epoch", "name", "paper", "about", "gating", "optimizer"])
def test_override_refuses_options_that_are_none(name):
    with pytest.raises(ValueError, match=f"a recipe has no option '{name}'"):
        override(RECIPE, {"lr": 0.2, name: 1})


def test_override_checks_values():
    with pytest.raises(ValueError, match="noise_std must be at least 0, but is -1"):
        override(RECIPE, {"noise_std": -1.0})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar10_resnet56_gatd", "did you mean 'cifar10_resnet56_gated'"), ("?", "gaternet recipes lists them")],
)
def test_unknown_recipe_names_the_nearest(name, hint):
    with pytest.raises(ValueError, match=hint):
        find_recipe(name)


# The first option is the one that the message names.
OUT_OF_RANGE: list[tuple[type, dict[str, Any]]] = [
    (Optimizer, {"lr": 0.0}),
    (Optimizer, {"lr": float("nan")}),
    (Optimizer, {"momentum": 1.0}),
    (Optimizer, {"nesterov": True, "momentum": 0.0}),
    (Optimizer, {"weight_decay": -1e-4}),
    (Optimizer, {"label_smoothing": 1.0}),
    (Optimizer, {"schedule": "linear"}),
    (Optimizer, {"milestones": (0.5, 1.0)}),
    (Optimizer, {"gamma": 0.0}),
    (Optimizer, {"warmup_epochs": -1.0}),
    (Optimizer, {"ema_decay": 1.0}),
    (Gating, {"bottleneck": 0}),
    (Gating, {"noise_std": -0.1}),
    (Gating, {"hard_probability": 1.5}),
    (Gating, {"open_probability": 1.0}),
    (Gating, {"open_probability": -0.1}),
    (Gating, {"final_slope": 0.0}),
    (Gating, {"sparsity": -1.0}),
    (Gating, {"target_density": 1.1}),
    (Gating, {"target_density": 0.5, "sparsity": 0.1}),
    (Gating, {"density_weight": -1.0}),
    (Gating, {"sparsity_start": -1.0}),
    (Gating, {"sparsity_ramp": -1.0}),
    (Gating, {"shrink": 0}),
    (Gating, {"group_size": 0}),
    (Gating, {"auxiliary_weight": -1.0}),
    (Gating, {"gater_lr": 0.0}),
    (Gating, {"sites": "most"}),
    (Gating, {"penalty": "flops"}),
    (Gating, {"freeze": "all"}),
    (Gating, {"initial_bias": 1.0, "open": True}),
    (Optimizer, {"warmup_epochs": math.inf}),
    (Gating, {"initial_bias": math.nan}),
    (Gating, {"final_slope": math.inf}),
    (Distillation, {"temperature": math.inf}),
    (Augmentation, {"cutout": -1}),
    (Augmentation, {"policy": "flip"}),
    (Recipe, {"image_size": 0}),
    (Recipe, {"epochs": 0}),
    (Recipe, {"batch_size": 0}),
    (Runtime, {"precision": "fp8"}),
    (Runtime, {"workers": -1}),
    (Runtime, {"log_every": 0}),
    (Runtime, {"save_minutes": -1.0}),
]


@pytest.mark.parametrize(("kind", "options"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(kind, options, unchecked_types):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{name} must be .*, but is {re.escape(repr(value))}$"):
        kind(**{"name": "a recipe"} | options if kind is Recipe else options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Optimizer, {"momentum": 0.0, "nesterov": False, "milestones": (), "label_smoothing": 0.0}),
        (Gating, {"noise_std": 0.0, "hard_probability": 1.0, "target_density": 0.0, "density_weight": 0.0}),
        (Gating, {"hard_probability": 0.0, "target_density": 1.0, "bottleneck": 1}),
        (Recipe, {"name": "r", "image_size": 1, "epochs": 1, "batch_size": 1}),
        (Runtime, {"workers": 0, "log_every": 1, "save_minutes": 0.0}),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(kind, options):
    made = kind(**options)
    assert {name: getattr(made, name) for name in options} == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.epochs = 2


def test_cheap_gaters_cost_what_method_md_says():
    shares = []
    stem_share = 0.0
    for name in ("cifar10_resnet20_half", "cifar10_resnet56_half"):
        recipe, images = RECIPES[name], torch.zeros(2, 3, 32, 32)
        gating = recipe.gating
        options: Any = {"sites": gating.sites, "bottleneck": gating.bottleneck, "shrink": gating.shrink}
        network = gaternet.gate(create_model(str(recipe.backbone), 10), images, gater=gating.extractor, **options)
        macs = gaternet.count_macs(network.eval(), images)
        shares.append(macs.gater / macs.backbone)
        stem = next(module for module in network.gater.modules() if isinstance(module, nn.Conv2d))
        stem_share = stem.weight.numel() * 16 * 16 / macs.gater
    text = "7.7 % of ResNet-20's MACs, 2.5 % of ResNet-56's. Its own stem is 3.5 % of that"
    assert re.findall(r"([\d.]+) %", text) == [f"{100 * share:.1f}" for share in (*shares, stem_share)]
    assert text in (Path(__file__).parents[1] / "docs" / "method.md").read_text().replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (
            {"freeze": "gater", "target_density": 0.5},
            {"noise_std", "hard_probability", "anneal_noise", "final_slope", "penalty"},
        ),
        ({"noise_std": 0.0, "target_density": 0.5}, {"anneal_noise"}),
        ({"hard_probability": 1.0, "target_density": 0.5}, {"final_slope"}),
        ({"sparsity": 0.5, "penalty": "each"}, {"penalty"}),
        ({"target_density": 0.5, "penalty": "each"}, set()),
    ],
)
def test_options_that_have_no_effect_beside_others_are_known(options, idle):
    recipe = override(find_recipe("cifar10_resnet20_gated"), options)
    found = idle_options(flat_options(dataclasses.asdict(recipe)))
    assert found.keys() & {"noise_std", "hard_probability", "anneal_noise", "final_slope", "penalty"} == idle
