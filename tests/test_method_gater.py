"""Gates and the gater that makes them, against slow, plainly written references."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import seeded
from torch import Tensor, nn
from toy_network import extractor, gater

from gaternet.method import Gater, gate_sparsity, improved_semhash


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=seeded(1))


# --- improved_semhash


def semhash_by_hand(
    logits: Tensor, noise_std: float, hard_probability: float, threshold: float, slope: float, seed: int
) -> Tensor:
    """Equations 4 to 7, gate by gate: noise is drawn first, then one number per sample."""
    generator = seeded(seed)
    noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype).tolist()
    coins = torch.rand(len(logits), 1, generator=generator).tolist()
    gates = []
    for row, noise_row, (coin,) in zip(logits.tolist(), noise, coins, strict=True):
        noisy = [g + noise_std * e for g, e in zip(row, noise_row, strict=True)]
        if coin < hard_probability:
            gates.append([1.0 if g > threshold else 0.0 for g in noisy])
        else:
            gates.append([max(0.0, min(1.0, 1.2 / (1 + math.exp(-slope * g)) - 0.1)) for g in noisy])
    return torch.tensor(gates, dtype=logits.dtype)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    noise_std=st.floats(0, 3),
    hard_probability=st.floats(0, 1),
    threshold=st.floats(-1, 1),
    slope=st.none() | st.floats(0.5, 8),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50, deadline=None)
def test_training_gates_are_those_of_the_plain_reference(shape, noise_std, hard_probability, threshold, slope, seed):
    logits = 3 * torch.randn(shape, generator=seeded(seed + 1), dtype=torch.float64)
    options = {"noise_std": noise_std, "hard_probability": hard_probability, "threshold": threshold}
    gates = improved_semhash(logits, training=True, **options, slope=slope, generator=seeded(seed))
    expected = semhash_by_hand(logits, **options, slope=1.0 if slope is None else slope, seed=seed)
    torch.testing.assert_close(gates, expected, rtol=0, atol=1e-12)


def test_steep_gates_have_the_gradient_of_the_papers():
    gradients = []
    for slope in (None, 5.0, torch.tensor(5.0)):
        logits = torch.linspace(-4, 4, 60).view(6, 10).requires_grad_()
        improved_semhash(logits, training=True, slope=slope, generator=seeded(4)).sum().backward()
        gradients.append(logits.grad)
    assert gradients[0] is not None
    assert gradients[0].count_nonzero() > 20
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@given(rows=st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_evaluation_gates_are_hard_noiseless_and_draw_nothing(rows):
    logits, generator = torch.tensor(rows), seeded(0)
    before = generator.get_state()
    for threshold in (0.0, 0.7):
        gates = improved_semhash(logits, training=False, threshold=threshold, generator=generator)
        assert gates.tolist() == [[float(g > threshold) for g in row] for row in logits.tolist()]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_have_the_dtype_of_their_logits(dtype, training):
    assert improved_semhash(torch.zeros(2, 3, dtype=dtype), training=training).dtype == dtype


def hard_soft_and_mixed(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under the same noise: all samples hard, all soft, and the paper's mixture."""
    hard, soft, mixed = (
        improved_semhash(logits, training=True, hard_probability=p, generator=seeded(3)) for p in (1.0, 0.0, 0.5)
    )
    return hard, soft, mixed


def test_each_sample_is_all_hard_or_all_soft():
    hard, soft, mixed = hard_soft_and_mixed(3 * torch.randn(200, 20, generator=seeded(4)))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert soft.min() == 0  # clamped
    assert soft.max() == 1
    assert ((soft > 0) & (soft < 1)).float().mean() > 0.3
    is_hard, is_soft = (mixed == hard).all(1), (mixed == soft).all(1)
    assert torch.all(is_hard ^ is_soft)
    assert is_hard.any()
    assert is_soft.any()


def test_gradient_of_hard_gates_is_that_of_soft_ones():
    generator = seeded(5)
    logits = 3 * torch.randn(200, 20, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    upstream = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    noisy = logits.detach() + torch.randn(200, 20, generator=seeded(3), dtype=torch.float64)
    slope = noisy.sigmoid() * (1 - noisy.sigmoid())
    inside = (1.2 * noisy.sigmoid() - 0.1 > 0) & (1.2 * noisy.sigmoid() - 0.1 < 1)
    assert 0.2 < inside.double().mean() < 0.8  # both cases occur
    for gates in hard_soft_and_mixed(logits):
        (gradient,) = torch.autograd.grad(gates, logits, upstream)
        torch.testing.assert_close(gradient, torch.where(inside, 1.2 * slope * upstream, 0.0))


@pytest.mark.parametrize("logit", [-1.0, 0.0, 0.5, 2.0])
def test_noise_is_standard_normal_by_default(logit):
    gates = improved_semhash(torch.full((400, 100), logit), training=True, hard_probability=1.0, generator=seeded(6))
    expected = 0.5 * (1 + math.erf(logit / math.sqrt(2)))
    spread = math.sqrt(expected * (1 - expected) / gates.numel())
    assert abs(gates.mean().item() - expected) < 4.5 * spread


@pytest.mark.parametrize(("options", "probability"), [({}, 0.5), ({"hard_probability": 0.2}, 0.2)])
def test_share_of_hard_samples(options, probability):
    gates = improved_semhash(torch.zeros(10_000, 4), training=True, **options, generator=seeded(7))
    hard = ((gates == 0) | (gates == 1)).all(1).double().mean().item()
    assert abs(hard - probability) < 4.5 * math.sqrt(probability * (1 - probability) / 10_000)


def test_training_without_noise_and_all_hard_is_evaluation():
    logits = torch.randn(50, 10, generator=seeded(8))
    options: dict[str, Any] = {"noise_std": 0.0, "hard_probability": 1.0, "threshold": 0.3}
    assert torch.equal(
        improved_semhash(logits, training=True, **options), improved_semhash(logits, training=False, **options)
    )


@given(rows=st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_gate_sparsity_is_the_mean_over_samples_of_the_l1_norm_per_gate(rows):
    by_hand = sum(sum(abs(g) for g in row) / 4 for row in rows) / len(rows)
    assert gate_sparsity(torch.tensor(rows)).item() == pytest.approx(by_hand, abs=1e-6)


# --- Gater


@pytest.mark.parametrize("training", [True, False])
def test_gater_is_fc1_batchnorm_relu_fc2(images, training):
    g = gater().train(training)
    assert isinstance(g.norm, nn.BatchNorm1d)
    nn.init.normal_(g.norm.bias)
    middle = g.fc1(g.extractor(images))
    mean, var = (middle.mean(0), middle.var(0, correction=0)) if training else (0, 1)  # it has seen none
    normal = (middle - mean) / (var + g.norm.eps) ** 0.5 * g.norm.weight + g.norm.bias
    torch.testing.assert_close(g.logits(images), g.fc2(normal.clamp(min=0)))


def test_gater_without_batchnorm_is_fc1_relu_fc2(images):
    g = gater(batch_norm=False)
    torch.testing.assert_close(g.logits(images), g.fc2(g.fc1(g.extractor(images)).clamp(min=0)))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gater_holds_h_plus_c_times_b_weights(batch_norm):
    h, c, b = 64, 336, 8
    parameters = sum(p.numel() for p in Gater(nn.Flatten(), h, c, bottleneck=b, batch_norm=batch_norm).parameters())
    assert parameters == (h + c) * b + (b + c) + (2 * b if batch_norm else 0)


def test_gater_passes_its_options_on(images):
    g = gater(noise_std=0.0, hard_probability=1.0)
    for training in (True, False):
        logits = g.train(training).logits(images)
        for share in (0.2, 0.8):  # thresholds in midst of the logits, so that they decide
            g.threshold = logits.quantile(share).item()
            assert torch.equal(g(images), (logits > g.threshold).float())
    g.train().hard_probability = 0.0
    torch.testing.assert_close(g(images), (1.2 * g.logits(images).sigmoid() - 0.1).clamp(0, 1))
    g.slope = 5.0
    torch.testing.assert_close(g(images), (1.2 * (5 * g.logits(images)).sigmoid() - 0.1).clamp(0, 1))
    g.noise_std = 2.0
    assert torch.equal(g(images, seeded(0)), g(images, seeded(0)))
    assert not torch.equal(g(images, seeded(0)), g(images, seeded(1)))


def test_initial_bias_decides_how_many_gates_start_open(images):
    def share(bias: float) -> float:
        torch.manual_seed(0)
        return gater(initial_bias=bias).eval()(images).mean().item()

    assert share(9.0) == 1
    assert share(-9.0) == 0
    assert not gater().fc2.bias.any()  # the paper's start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be at least 1, not 0"),
        ({"noise_std": -0.1}, "noise_std must be finite and not negative"),
        ({"noise_std": math.nan}, "noise_std must be finite and not negative"),
        ({"threshold": math.inf}, "threshold and initial_bias must be finite"),
        ({"initial_bias": math.nan}, "threshold and initial_bias must be finite"),
        ({"hard_probability": 1.1}, r"hard_probability must lie in \[0, 1\], not 1.1"),
        ({"hard_probability": -0.1}, "hard_probability"),
    ],
)
def test_gater_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Gater(extractor(), 6, 12, **options)


@pytest.mark.parametrize("wrong", [nn.Conv2d(3, 6, 3), nn.Sequential(extractor(), nn.Linear(6, 10))])
def test_gater_says_when_its_extractor_gives_no_features(images, wrong):
    with pytest.raises(ValueError, match=r"must return features \(B, 6\), but returned \(6, .*remove its output layer"):
        Gater(wrong, 6, 12).logits(images)
