"""What becomes of predictions when gates are forced, or exchanged, against the same by hand."""

import dataclasses
import itertools
import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from analyzed_model import IMAGES, LABELS, MODEL, PIXELS, batches, make_model
from torch import Tensor, nn
from torch.nn import functional

import gaternet.forcing
from gaternet import GaterNet, GateSite, analyze
from gaternet.forcing import Effect, class_gates, exchange_gates, force_gates


def test_forced_gates_by_hand(analysis, truth):
    inputs, labels = PIXELS.normalize(IMAGES), LABELS.numpy()
    found = force_gates(MODEL, batches(), analysis, preprocessing=PIXELS, images=90)
    gates = torch.from_numpy(truth["gates"]).float()

    def right(changed: Tensor) -> np.ndarray:
        with torch.no_grad():
            return MODEL.forward_gated(inputs, changed).argmax(1).numpy() == labels

    assert found.images == 90
    assert found.accuracy == analysis.accuracy
    own = [class_gates(analysis, label, found.taken) for label in range(5)]  # 5 and 6 have no images
    assert found.classes.tolist() == list(range(5))
    assert np.array_equal(found.gates, analysis.telling_gates(60))
    effects = {
        "sites": (found.sites, [np.arange(site.start, site.stop) for site in MODEL.sites]),
        "single": (found.single, list(found.gates[:, None])),
        "own": (found.own, own),
    }
    for effect, sets in effects.values():
        assert effect.forced.shape == effect.by_chance.shape == (2, len(sets), 7)
        for value, (row, columns) in itertools.product((0, 1), enumerate(sets)):
            changed = gates.clone()
            changed[:, torch.from_numpy(columns)] = value
            hits = right(changed)
            expected = [hits[labels == label].mean() for label in range(5)]
            assert effect.forced[value, row, :5] == pytest.approx(expected)
            assert found.overall(effect.forced[value, row]) == pytest.approx(hits.mean())
            assert np.isnan(effect.forced[value, row, 5:]).all()
    assert found.before[:5] == pytest.approx([right(gates)[labels == label].mean() for label in range(5)])
    assert np.isnan(found.before[5:]).all()


class Told(GaterNet):
    """Predicts the class of the image, or that of its gates, and notes whose gates each image gets."""

    def __init__(self, reads_gates: bool) -> None:
        super().__init__(nn.Conv2d(4, 4, 1), nn.Identity(), [GateSite("", "", 0, 4)])
        self.reads_gates = reads_gates
        self.pairs: list[np.ndarray] = []

    def gates(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0]

    def forward_gated(self, images: Tensor, gates: Tensor) -> Tensor:
        self.pairs.append(torch.stack([images[:, 3, 0, 0], gates[:, 3]], 1).long().numpy())
        return (gates if self.reads_gates else images[:, :, 0, 0])[:, :3]


def told_images(number: int) -> tuple[Tensor, Tensor]:
    """Three channels that say the class, and one that numbers the images."""
    labels = torch.arange(number) % 3
    channels = torch.cat([functional.one_hot(labels, 3), torch.arange(number)[:, None]], 1)
    return channels.float()[:, :, None, None], labels


def test_gates_of_other_images_by_hand():
    images, labels = told_images(60)
    loader = list(zip(images.split(40), labels.split(40), strict=True))
    looks, reads = Told(False), Told(True)
    assert astuple(exchange_gates(looks, loader, images=60)) == (1, 1, 1, 1, 0)
    assert astuple(exchange_gates(reads, loader, images=60)) == (1, 1 / 3, 1, 0, 1)  # no gate is open for most of them
    own, same, other, _ = looks.pairs
    assert (own[:, 0] == own[:, 1]).all()
    assert sorted(same[:, 0]) == sorted(same[:, 1]) == list(range(60))
    assert (same[:, 0] != same[:, 1]).all()
    assert (same[:, 0] % 3 == same[:, 1] % 3).all()
    assert 30 < len(other) < 50  # of pairs drawn at random a third are of one class
    assert (other[:, 0] % 3 != other[:, 1] % 3).all()

    lonely = exchange_gates(reads, [(images[:3], labels[:3])])
    assert math.isnan(lonely.same)
    assert (lonely.image, lonely.gates) == (0, 1)
    chosen = torch.cat([torch.arange(2, 60, 3), torch.tensor([0, 3])])
    assert exchange_gates(reads, [(images[chosen], labels[chosen])]).usual == 20 / 22  # the gates of class 2
    alike = exchange_gates(reads, [(images[::3], labels[::3])])
    assert (alike.usual, alike.same) == (1, 1)
    assert math.isnan(alike.image)
    assert math.isnan(alike.gates)


def test_gates_are_exchanged_a_few_images_at_a_time(monkeypatch):
    images, labels = told_images(60)
    at_once, by_parts = Told(True), Told(True)
    expected = exchange_gates(at_once, [(images, labels)], images=60)
    monkeypatch.setattr(gaternet.forcing, "CHUNK", 7)
    assert exchange_gates(by_parts, [(images, labels)], images=60) == expected
    assert max(map(len, by_parts.pairs)) == 7
    assert np.array_equal(np.concatenate(by_parts.pairs), np.concatenate(at_once.pairs))


def test_exchanged_gates_are_part_of_forced_ones(analysis):
    found = force_gates(MODEL, batches(), analysis, preprocessing=PIXELS, images=90).exchanged
    inputs, labels = PIXELS.normalize(IMAGES), LABELS.numpy()
    with torch.no_grad():
        usual = (MODEL.gates(inputs).mean(0, keepdim=True) > 0.5).float().expand(90, -1)
        right = MODEL.forward_gated(inputs, usual).argmax(1).numpy() == labels
    assert found.own == pytest.approx(analysis.accuracy)
    assert found.usual == pytest.approx(right.mean())
    assert 0 <= found.image + found.gates <= 1


def test_random_gates_are_drawn_from_like_ones_and_as_many(analysis):
    gate = int(analysis.telling_gates(1)[0])
    opened = np.zeros_like(analysis.class_open)
    opened[:, gate] = analysis.class_open[:, gate]
    lonely = dataclasses.replace(analysis, class_open=opened)  # one gate depends on the image: chance must draw it
    options: dict[str, Any] = {"preprocessing": PIXELS, "images": 90}
    found = force_gates(MODEL, batches(), lonely, **options)
    assert found.gates.tolist() == [gate]
    assert np.array_equal(found.single.by_chance, found.single.forced, equal_nan=True)
    assert np.array_equal(found.own.by_chance, found.own.forced, equal_nan=True)
    by_chance = found.sites.by_chance  # three sites each of 16, 32 and 64 gates
    assert not np.allclose(by_chance, found.sites.forced, equal_nan=True)
    for first in (0, 3, 6):
        assert np.array_equal(by_chance[:, first], by_chance[:, first + 1], equal_nan=True)
    assert not np.array_equal(by_chance[:, 0], by_chance[:, 6], equal_nan=True)


def test_gates_of_a_class_are_those_that_it_opens_more_often(analysis, truth):
    gates, mine = truth["gates"], LABELS.numpy() == 1
    more = gates[mine].mean(0) - gates[~mine].mean(0)
    chosen = class_gates(analysis, 1, 10)
    assert len(chosen) == 10
    assert (more[chosen] > 0).all()
    others = np.setdiff1d(np.flatnonzero(analysis.dependent), chosen)
    assert more[chosen].min() >= more[others].max() - 1e-12


def test_forcing_needs_labels_and_images(analysis):
    with pytest.raises(ValueError, match="forcing gates needs labels"):
        force_gates(MODEL, batches(labels=False), analysis, preprocessing=PIXELS)
    with pytest.raises(ValueError, match="the loader is empty"):
        force_gates(MODEL, [], analysis)
    with pytest.raises(ValueError, match=r"labels must be integers, one an image: 90, not \(5,\)"):
        force_gates(MODEL, [(IMAGES, LABELS[:5])], analysis, preprocessing=PIXELS)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\), but reach from 0 to 7"):
        force_gates(MODEL, [(IMAGES, torch.where(LABELS == 1, 7, LABELS))], analysis, preprocessing=PIXELS)


def test_images_are_what_an_analysis_takes(analysis):
    """Neither normalised twice, nor pixels that nobody normalises, nor such of which the model says nothing."""
    floats = [(PIXELS.normalize(IMAGES), LABELS)]
    assert exchange_gates(MODEL, floats).own == pytest.approx(analysis.accuracy)
    with pytest.raises(ValueError, match="the images are no pixels in uint8, which preprocessing makes inputs of"):
        exchange_gates(MODEL, floats, preprocessing=PIXELS)
    with pytest.raises(ValueError, match="the images are pixels in uint8: pass preprocessing="):
        exchange_gates(MODEL, batches())
    with pytest.raises(ValueError, match="the model gives logits that are no finite numbers"):
        exchange_gates(MODEL, [(torch.full_like(floats[0][0], torch.nan), LABELS)])


def test_batches_may_hold_more_than_images_and_labels(analysis):
    few: dict[str, Any] = {"preprocessing": PIXELS, "images": 20}
    numbered = [(images, labels, torch.arange(len(images))) for images, labels in batches()]
    assert exchange_gates(MODEL, numbered, **few) == exchange_gates(MODEL, batches(), **few)


def test_a_model_in_training_mode_is_asked_as_in_evaluation_mode(analysis):
    options: dict[str, Any] = {"preprocessing": PIXELS, "images": 20}
    few: dict[str, Any] = {"draws": 1, "gates": 1, "classes": 1}
    found = analyze(make_model().train(), batches(), preprocessing=PIXELS, samples=40, extremes=0)
    assert np.array_equal(found.class_open, analysis.class_open)
    assert exchange_gates(make_model().train(), batches(), **options) == exchange_gates(MODEL, batches(), **options)
    found, expected = (
        force_gates(model, batches(), analysis, **options, **few) for model in (make_model().train(), MODEL)
    )
    assert np.array_equal(found.before, expected.before, equal_nan=True)
    assert np.array_equal(found.sites.forced, expected.sites.forced, equal_nan=True)
    assert found.exchanged == expected.exchanged


def test_as_many_gates_images_and_draws_are_taken_as_was_asked_for(analysis):
    options: dict[str, Any] = {"preprocessing": PIXELS, "gates": 3, "classes": 2, "draws": 1}
    few = force_gates(MODEL, batches(), analysis, **options, images=20)
    assert (few.images, len(few.gates), len(few.classes)) == (20, 3, 2)
    assert few.taken == round(0.05 * analysis.dependent.sum())
    found = force_gates(MODEL, batches(), analysis, **options)
    others: list[dict[str, Any]] = [{"seed": 1}, {"draws": 4}]
    for changes in others:
        changed = force_gates(MODEL, batches(), analysis, **options | changes)
        assert np.array_equal(changed.sites.forced, found.sites.forced, equal_nan=True)
        assert not np.array_equal(changed.sites.by_chance, found.sites.by_chance, equal_nan=True)


def test_chance_is_drawn_from_its_seed(analysis):
    first, other = (dataclasses.replace(analysis).information_by_chance(draws=2, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("name", "number", "least"), [("images", 0, 1), ("draws", 0, 1), ("gates", -1, 0)])
def test_numbers_that_are_too_small_are_refused(analysis, name, number, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, but is {number}"):
        force_gates(MODEL, batches(), analysis, preprocessing=PIXELS, **{name: number})


def test_an_analysis_of_another_model_is_refused(analysis):
    fewer = {name: getattr(analysis, name)[..., :-64] for name in ("histogram", "class_open", "surest")}
    other = dataclasses.replace(analysis, sites=analysis.sites[:-1], **fewer)
    with pytest.raises(ValueError, match="of another model, with 272 gates at 8 sites, and this one has 336 at 9"):
        force_gates(MODEL, batches(), other, preprocessing=PIXELS)


def test_images_of_two_sizes_are_refused():
    mixed = [(IMAGES[:5], LABELS[:5]), (IMAGES[:5, :, :8], LABELS[:5])]
    with pytest.raises(ValueError, match=r"images are \(3, 16, 16\) and \(3, 8, 16\), and gates are exchanged among"):
        exchange_gates(MODEL, mixed, preprocessing=PIXELS)


def test_findings_are_equal_to_themselves_alone_and_can_be_keys(analysis):
    effect = Effect(np.zeros((2, 1, 1)), np.zeros((2, 1, 1)))
    for found in (analysis, analysis.samples, effect):
        other = dataclasses.replace(found)
        assert found != other
        assert len({found, other}) == 2


def test_both_measures_of_chance_see_the_same_shuffles(analysis, monkeypatch):
    fresh, alone = dataclasses.replace(analysis), dataclasses.replace(analysis)
    expected = alone.selectivity_by_chance(draws=2)
    fresh.information_by_chance(draws=2)
    monkeypatch.setattr(np.random, "default_rng", lambda _: pytest.fail("drawn again"))
    assert np.array_equal(fresh.selectivity_by_chance(draws=2), expected)


def test_a_plain_network_is_refused(analysis, unchecked_types):
    plain: Any = nn.Conv2d(3, 8, 3)
    for forced in (lambda: force_gates(plain, [], analysis), lambda: exchange_gates(plain, [])):
        with pytest.raises(TypeError, match="the model must be a GaterNet, but is a Conv2d"):
            forced()
