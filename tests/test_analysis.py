"""Figures of the gates, against a brute-force recount."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from analyzed_model import IMAGES, LABELS, MODEL, PIXELS, batches, make_model
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from gaternet import Gater, analyze, count_macs, create_model, gate
from gaternet.analysis import THUMBNAIL, thumbnail
from gaternet.forcing import force_gates
from gaternet.measures import mutual_information


def test_counts_are_those_of_a_recount(analysis, truth):
    gates, labels = truth["gates"], LABELS.numpy()
    assert analysis.images == 90
    assert analysis.num_gates == 336
    assert 0.2 < analysis.dependent.mean() < 0.95  # so this says something
    assert np.array_equal(analysis.open_counts, gates.sum(0))
    assert np.array_equal(analysis.dependent, gates.any(0) & ~gates.all(0))
    assert np.array_equal(analysis.histogram, np.bincount(gates.sum(1), minlength=337))
    for label in range(7):
        mine = labels == label
        assert analysis.counts[label] == mine.sum()
        assert np.array_equal(analysis.class_open[label], gates[mine].sum(0))
        assert analysis.class_right[label] == (truth["predictions"][mine] == label).sum()
        if mine.any():
            assert np.allclose(analysis.class_rates[label], gates[mine].mean(0))
            assert np.isclose(analysis.class_macs[label], truth["macs"][mine].mean())
            assert np.isclose(analysis.class_densities[label], gates[mine].mean())
        else:
            assert math.isnan(analysis.class_macs[label])
            assert np.isnan(analysis.class_rates[label]).all()
    assert analysis.accuracy == (truth["predictions"] == labels).mean()
    assert np.isclose(analysis.gated_macs, truth["macs"].mean())
    macs = count_macs(MODEL, PIXELS.normalize(IMAGES[:1]))
    assert (analysis.backbone_macs, analysis.gater_macs) == (macs.backbone, macs.gater)
    assert [site["start"] for site in analysis.sites] == [site.start for site in MODEL.sites]


def test_images_are_those_with_the_extremes(analysis, truth):
    scores = truth["scores"]
    assert analysis.surest is not None
    for side, sign in enumerate((1, -1)):
        named = analysis.surest[side]
        decided = np.where(truth["gates"] == (sign == 1), sign * scores, -np.inf)  # by images on this side alone
        expected = np.sort(decided, 0)[::-1][:3]
        assert np.array_equal(named >= 0, np.isfinite(expected))
        found = np.where(named >= 0, np.take_along_axis(decided, named, 0), -np.inf)
        assert np.allclose(found, expected, atol=1e-5)
    assert (analysis.surest == -1).any(1)[:, analysis.dependent].any()
    order = np.sort(truth["macs"])
    assert np.allclose(np.sort(analysis.cheapest.macs), order[:12])
    assert np.allclose(np.sort(analysis.dearest.macs), order[-12:])
    assert analysis.thumbnails.keys() == analysis.facts.keys()
    named = {*analysis.surest.flatten().tolist(), *analysis.cheapest.index.tolist(), *analysis.samples.index.tolist()}
    assert named - {-1} <= analysis.thumbnails.keys()
    for place, picture in analysis.thumbnails.items():
        assert np.array_equal(picture, IMAGES[place].permute(1, 2, 0).numpy())
        label, prediction, opened, macs = analysis.facts[place]
        assert (label, prediction) == (LABELS[place], truth["predictions"][place])
        assert opened == truth["gates"][place].sum()
        assert macs == round(truth["macs"][place])


def test_samples_are_drawn_at_random_without_repetition(analysis, truth):
    samples = analysis.samples
    assert len(set(samples.index.tolist())) == 40
    assert samples.index.max() > 60  # not the first ones
    assert np.array_equal(samples.gates, truth["gates"][samples.index])
    assert np.array_equal(samples.label, LABELS.numpy()[samples.index])
    again = analyze(MODEL, batches(90), preprocessing=PIXELS, samples=40, extremes=0)
    assert np.array_equal(again.samples.index, samples.index)  # whatever the batches
    assert again.surest is None
    other = analyze(MODEL, batches(), preprocessing=PIXELS, samples=40, extremes=0, seed=1)
    assert not np.array_equal(other.samples.index, samples.index)


def test_batches_make_no_difference(analysis):
    one = analyze(MODEL, batches(90), preprocessing=PIXELS, samples=40, extremes=3)
    for name in ("histogram", "counts", "class_open", "class_right"):
        assert np.array_equal(getattr(one, name), getattr(analysis, name))
    assert np.allclose(one.class_macs, analysis.class_macs, equal_nan=True)


def test_information_is_that_of_scikit_learn(analysis, truth):
    found = analysis.information()
    for column in range(0, 336, 7):
        expected = mutual_info_score(LABELS.numpy(), truth["gates"][:, column]) / math.log(2)
        assert found[column] == pytest.approx(expected, abs=1e-9)


def test_chance_is_what_shuffled_labels_show(analysis, truth):
    """The draws come from the distribution that shuffling has, so their means agree."""
    by_chance = analysis.information_by_chance(draws=400)
    generator, columns = np.random.default_rng(0), np.flatnonzero(analysis.dependent)[:40]
    shuffled = []
    for _ in range(400):
        labels = generator.permutation(LABELS.numpy())
        opened = np.stack([truth["gates"][labels == label][:, columns].sum(0) for label in range(7)])
        shuffled.append(mutual_information(opened, analysis.counts))
    assert np.allclose(by_chance[:, columns].mean(0), np.mean(shuffled, 0), rtol=0.15)
    assert (by_chance[:, ~analysis.dependent] == 0).all()


def test_selective_by_chance_is_what_shuffled_labels_show(analysis, truth):
    by_chance = analysis.selectivity_by_chance(draws=400)
    generator, columns = np.random.default_rng(0), np.flatnonzero(analysis.dependent)[:40]
    shuffled = []
    for _ in range(400):
        labels = generator.permutation(LABELS.numpy())
        rates = np.stack([truth["gates"][labels == label][:, columns].mean(0) for label in range(5)])
        others = (rates.sum(0) - rates.max(0)) / 4
        shuffled.append((rates.max(0) - others) / (rates.max(0) + others))
    assert np.allclose(by_chance[:, columns].mean(0), np.mean(shuffled, 0), rtol=0.15, atol=0.01)


def test_selectivity_by_hand():
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    base = analyze(MODEL, [(images, torch.tensor([0, 0, 1, 1, 2, 2]))], preprocessing=PIXELS, samples=2)
    changed = base.class_open * 0
    changed[0, 0], changed[1, 0] = 2, 1  # rates 1, 1/2, 0
    object.__setattr__(base, "class_open", changed)
    found = base.selectivity()
    assert found[0] == pytest.approx((1 - 0.25) / (1 + 0.25))
    assert (found[1:] == 0).all()


def test_without_labels_predictions_take_their_place(truth):
    found = analyze(MODEL, batches(labels=False), preprocessing=PIXELS, samples=10)
    assert not found.labeled
    assert found.accuracy is None
    assert np.array_equal(found.counts, np.bincount(truth["predictions"], minlength=7))
    assert (found.samples.label == -1).all()
    wrapped = analyze(MODEL, [(images,) for images in batches(labels=False)], preprocessing=PIXELS, samples=10)
    assert np.array_equal(wrapped.class_open, found.class_open)


def test_labels_of_any_integer_type_and_batches_of_any_size_count_the_same(analysis):
    """With a place in the data set behind the labels, as some loaders have it, and empty batches between."""
    for dtype in (torch.uint8, torch.int32):
        loader = [(*batch, torch.arange(len(batch[0]))) for batch in batches(7)]
        loader = [(images, labels.to(dtype), index) for images, labels, index in loader]
        loader.insert(1, (IMAGES[:0], LABELS[:0].to(dtype), torch.arange(0)))
        found = analyze(MODEL, loader, preprocessing=PIXELS, samples=10)
        assert found.labeled
        assert np.array_equal(found.counts, analysis.counts)
        assert np.array_equal(found.class_open, analysis.class_open)


def test_inputs_that_are_no_pixels_make_pictures_too(truth):
    inputs = PIXELS.normalize(IMAGES)
    found = analyze(MODEL, [(inputs, LABELS)], classes=list("abcdefg"), samples=5)
    assert np.array_equal(found.open_counts, truth["gates"].sum(0))
    assert found.classes == tuple("abcdefg")
    assert all(p.dtype == np.uint8 and p.min() == 0 and p.max() in (254, 255) for p in found.thumbnails.values())


def test_each_module_stays_in_its_mode(analysis):
    model = make_model().train()
    model.backbone.get_submodule("bn1").eval()  # frozen
    before = [module.training for module in model.modules()]
    analyze(model, batches(), preprocessing=PIXELS, samples=5)
    assert [module.training for module in model.modules()] == before
    force_gates(model, batches(), analysis, preprocessing=PIXELS, images=10, draws=1, gates=1, classes=1)
    assert [module.training for module in model.modules()] == before


def test_a_gater_without_logits_has_no_extremes():
    model = gate(create_model("resnet20", 7), torch.zeros(2, 3, 16, 16))
    model.gater = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, model.num_gates), nn.Hardsigmoid(), Round())
    found = analyze(model.eval(), batches(), preprocessing=PIXELS, samples=10)
    assert found.surest is None
    assert found.dependent.any()


def test_a_gater_that_decides_by_something_else_is_asked():
    class Few(Gater):
        def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            logits = self.logits(images)
            return torch.zeros_like(logits).scatter(1, logits.topk(4, 1).indices, 1.0)

    model = make_model()
    model.gater.__class__ = Few
    found = analyze(model, batches(), preprocessing=PIXELS, samples=10)
    assert found.histogram[4] == found.images
    assert found.surest is None


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "there are no images to analyze: the loader is empty"),
        ([(IMAGES[:4], torch.tensor([0, 1, 2, 7]))], r"labels must lie in \[0, 7\)"),
        ([(IMAGES[:4], torch.tensor([0, 1, 2]))], r"labels must be integers, one an image: 4, not \(3,\)"),
        ([(IMAGES[:4], torch.rand(4))], r"labels must be integers, .* torch.float32"),
        ([{"image": IMAGES[:4], "label": LABELS[:4]}], "batches must be tensors .*, but hold dict: wrap"),
        ([(IMAGES[:4].numpy(), LABELS[:4])], "batches must be tensors .*, but hold ndarray: wrap"),
        ([(IMAGES[0], 3)], r"images must be \(B, channels, H, W\), but are \(3, 16, 16\): pass a DataLoader"),
        (
            [IMAGES[:4], IMAGES[:4, :, :8]],
            r"images are \(3, 16, 16\) and \(3, 8, 16\), and costs .* one",
        ),
        ([(IMAGES[:4], LABELS[:4]), IMAGES[:4]], "some batches have labels and others have not"),
    ],
)
def test_bad_data_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        analyze(MODEL, loader, preprocessing=PIXELS)


def test_a_backbone_that_gives_other_than_logits_is_refused(unchecked_types):
    class Pair(nn.Sequential):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002 (as in Sequential)
            logits = super().forward(input)
            return logits, logits

    backbone = Pair(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = gate(backbone, torch.rand(1, 3, 16, 16), gater="resnet8")
    with pytest.raises(ValueError, match=r"the backbone must give logits \(B, K\), but gives a tuple: wrap it"):
        analyze(model, [torch.rand(2, 3, 16, 16)])


def test_it_says_in_a_line_what_it_found(analysis):
    assert repr(analysis) == (
        f"GateAnalysis(90 images, 336 gates at 9 sites: {analysis.rates.mean():.1%} open, "
        f"{analysis.dependent.mean():.1%} dependent)"
    )


def test_samples_are_at_least_one():
    with pytest.raises(ValueError, match="samples must be at least 1, but is 0"):
        analyze(MODEL, batches(), preprocessing=PIXELS, samples=0)
    with pytest.raises(ValueError, match="extremes must be at least 0, but is -1"):
        analyze(MODEL, batches(), preprocessing=PIXELS, extremes=-1)


def test_what_chance_shows_is_drawn_once_and_in_pieces(analysis, monkeypatch):
    whole = analysis.information_by_chance()
    assert analysis.information_by_chance() is whole
    monkeypatch.setattr("gaternet.findings._DRAWN", 50)  # at most two gates at once
    pieces = dataclasses.replace(analysis).information_by_chance()
    assert pieces.shape == whole.shape
    assert not np.array_equal(pieces, whole)
    np.testing.assert_allclose(pieces.mean(0), whole.mean(0), atol=0.1)


def test_names_must_be_as_many_as_classes():
    with pytest.raises(ValueError, match="there are 2 names of classes, but the model has 7 outputs"):
        analyze(MODEL, batches(), preprocessing=PIXELS, classes=["a", "b"])


def test_memory_does_not_grow_with_the_data_set():
    endless = itertools.cycle(batches())
    found = analyze(MODEL, itertools.islice(endless, 30), preprocessing=PIXELS, samples=5, extremes=1)
    assert found.images == 900
    assert len(found.thumbnails) <= 5 + 12 + 12 + 2 * 336
    assert len(found.samples.index) == 5


@pytest.mark.parametrize(
    ("shape", "expected"), [((1, 8, 8), (8, 8, 1)), ((3, 96, 48), (48, 24, 3)), ((5, 8, 8), (8, 8, 1))]
)
def test_thumbnails_are_small_and_grey_or_coloured(shape, expected):
    picture = thumbnail(torch.rand(shape))
    assert picture.shape == expected
    assert max(picture.shape[:2]) <= THUMBNAIL


def test_numbers_are_exact_within_an_autocast():
    """Which computes products in bf16, that knows no 257."""
    loader = [(IMAGES[:1].expand(500, -1, -1, -1), torch.zeros(500, dtype=torch.long))]
    found = analyze(MODEL, loader, preprocessing=PIXELS, samples=1)
    with torch.autocast("cpu", torch.bfloat16):
        within = analyze(MODEL, loader, preprocessing=PIXELS, samples=1)
    for analysis in (found, within):
        assert set(analysis.rates.tolist()) <= {0, 1}
        assert set(analysis.class_right.tolist()) <= {0, 500}


def test_small_pictures_are_copies():
    """The loader may fill the batch anew, and many pictures would keep whole batches."""
    batch = IMAGES[:2].clone()
    found = thumbnail(batch[0])
    before = found.copy()
    batch.zero_()
    assert np.array_equal(found, before)
    assert found.base is None or found.base.size == found.size


def test_pixels_and_inputs_are_told_apart():
    with pytest.raises(ValueError, match=r"the images are pixels in uint8: pass preprocessing=\.\.\."):
        analyze(MODEL, [IMAGES[:4]])
    with pytest.raises(ValueError, match=r"the images are no pixels in uint8, .*: leave it out"):
        analyze(MODEL, [IMAGES[:4].float()], preprocessing=PIXELS)


def test_a_model_that_gives_no_numbers_is_not_analyzed():
    model = copy.deepcopy(MODEL)
    torch.nn.init.constant_(next(model.backbone.parameters()), float("nan"))
    with pytest.raises(ValueError, match="logits that are no finite numbers"):
        analyze(model, [IMAGES[:4]], preprocessing=PIXELS)


def test_classes_may_be_numbers_and_labels_that_are_words_are_refused(tmp_path, unchecked_types):
    found = analyze(MODEL, [(IMAGES, LABELS)], preprocessing=PIXELS, classes=range(7))  # pyright: ignore
    assert found.classes == tuple("0123456")
    found.save(tmp_path)
    with pytest.raises(ValueError, match="labels must be integers, one an image, not a list"):
        analyze(MODEL, [(IMAGES, ["cat"] * len(IMAGES))], preprocessing=PIXELS)
