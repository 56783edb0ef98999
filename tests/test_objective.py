"""The schedule and the penalty at their corners."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaternet.objective import (
    distillation_loss,
    gate_penalty,
    learning_rate,
    noise_scale,
    penalty_ramp,
    schedule,
    unreached,
)
from gaternet.recipe import Gating, Optimizer, Recipe, override
from gaternet.recipes import find_recipe


def rates(optimizer: Optimizer, steps_per_epoch: int = 10, epochs: int = 8) -> list[float]:
    return [learning_rate(optimizer, step, steps_per_epoch, epochs) for step in range(steps_per_epoch * epochs)]


def test_step_schedule_cuts_at_its_milestones():
    values = rates(Optimizer(lr=1.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1))
    assert values == pytest.approx([1.0] * 40 + [0.1] * 20 + [0.01] * 20)


def test_the_papers_rate_falls_after_80_and_120_of_160_epochs():
    recipe = find_recipe("cifar10_resnet20_gated")
    steps = 391  # 50,000 images in batches of 128
    for epoch, rate in ((0, 0.1), (79, 0.1), (80, 0.01), (119, 0.01), (120, 0.001), (159, 0.001)):
        for step in (0, steps - 1):
            assert learning_rate(recipe.optimizer, epoch * steps + step, steps, recipe.epochs) == pytest.approx(rate)


def test_constant_schedule_is_constant():
    assert rates(Optimizer(lr=0.3, schedule="constant")) == [0.3] * 80


def test_cosine_schedule_falls_from_the_peak_through_half_of_it_to_nearly_0():
    values = rates(Optimizer(lr=2.0, schedule="cosine"))
    assert values[0] == 2.0
    assert values[20] == pytest.approx(1 + math.cos(math.pi / 4))
    assert values[40] == pytest.approx(1.0)
    assert 0 < values[79] < 0.01
    assert values == sorted(values, reverse=True)


def test_warmup_rises_linearly_to_the_peak_and_cosine_then_has_the_rest():
    values = rates(Optimizer(lr=2.0, schedule="cosine", warmup_epochs=2.0))
    assert values[:21] == pytest.approx([2.0 * (step + 1) / 21 for step in range(21)])
    assert values[50] == pytest.approx(1.0)  # half of what warm-up leaves
    assert 0 < values[79] < 0.01


def test_warmup_leaves_the_milestones_where_they_are():
    warm = Optimizer(lr=1.0, schedule="step", warmup_epochs=1.5)
    assert rates(warm)[15:] == pytest.approx(rates(Optimizer(lr=1.0))[15:])
    assert rates(warm)[:15] == pytest.approx([(step + 1) / 16 for step in range(15)])


@given(
    schedule=st.sampled_from(["step", "cosine", "constant"]),
    warmup=st.floats(0, 12),
    steps_per_epoch=st.integers(1, 5),
    epochs=st.integers(1, 10),
)
@settings(deadline=None)
def test_every_step_learns_at_no_more_than_the_peak(schedule, warmup, steps_per_epoch, epochs):
    values = rates(Optimizer(lr=0.1, schedule=schedule, warmup_epochs=warmup), steps_per_epoch, epochs)
    assert all(0 < value <= 0.1 for value in values)


def penalty(density: float, epoch: float, **options: float | None) -> float:
    gating = Gating(**options)  # pyright: ignore[reportArgumentType]
    return gate_penalty(torch.tensor(density), gating, penalty_ramp(gating, epoch)).item()


def test_by_default_gates_cost_nothing():
    assert penalty(0.7, 5.0) == 0


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_penalty_is_lambda_times_density(density):
    assert penalty(density, 0.0, sparsity=0.2) == pytest.approx(0.2 * density)


def test_penalty_of_a_target_is_the_weighted_square_of_the_distance():
    assert penalty(0.7, 0.0, target_density=0.4, density_weight=5.0) == pytest.approx(5 * 0.3**2)
    assert penalty(0.1, 0.0, target_density=0.4, density_weight=5.0) == pytest.approx(5 * 0.3**2)
    assert penalty(0.4, 0.0, target_density=0.4) == 0
    assert penalty(0.5, 0.0, target_density=0.0) == pytest.approx(10 * 0.5**2)  # 0 is a target, not none


@pytest.mark.parametrize("weight", [{"sparsity": 2.0}, {"target_density": 0.0, "density_weight": 2.0}])
def test_penalty_starts_at_its_epoch_and_rises_over_the_ramp(weight):
    def at(epoch: float, **options: float) -> float:
        return penalty(1.0, epoch, sparsity_start=3.0, **weight, **options)

    assert [at(epoch) for epoch in (0.0, 2.99, 3.0, 9.0)] == pytest.approx([0.0, 0.0, 2.0, 2.0])
    ramp = [at(epoch, sparsity_ramp=4.0) for epoch in (0.0, 3.0, 4.0, 5.0, 7.0, 20.0)]
    assert ramp == pytest.approx([0.0, 0.0, 0.5, 1.0, 2.0, 2.0])


def test_penalty_has_the_gradient_of_its_formula():
    density = torch.tensor(0.7, requires_grad=True)
    gate_penalty(density, Gating(sparsity=0.2)).backward()
    assert density.grad is not None
    assert density.grad.item() == pytest.approx(0.2)
    density.grad = None
    gate_penalty(density, Gating(target_density=0.4)).backward()
    assert density.grad is not None
    assert density.grad.item() == pytest.approx(2 * 10 * 0.3)


def test_noise_stays_or_falls_linearly_to_0():
    assert [noise_scale(Gating(), done) for done in (0.0, 0.5, 1.0)] == [1.0] * 3
    assert [noise_scale(Gating(anneal_noise=True), done) for done in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_distillation_loss_in_other_words():
    ours, theirs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    for temperature in (1.0, 4.0):
        p, q = (theirs / temperature).softmax(1), (ours / temperature).softmax(1)
        expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(distillation_loss(ours, theirs, temperature), expected)
    assert distillation_loss(ours, ours, 4.0).abs() < 1e-6


def test_what_epochs_are_too_few_for_is_said():
    gated = find_recipe("digits_resnet20_gated")
    assert unreached(gated) == unreached(find_recipe("cifar10_resnet20_gated")) == []
    assert unreached(override(gated, {"epochs": 6})) == []
    for epochs, share in ((3, 25), (2, 0)):
        (said, *_) = unreached(override(gated, {"epochs": epochs}))
        assert said.startswith(f"in {epochs} epochs the penalty on open gates comes to {share} % of its weight: see")
    assert unreached(override(find_recipe("digits_resnet20"), {"epochs": 2})) == [
        "in 2 epochs the learning rate still rises: see --warmup-epochs"
    ]


def test_penalty_of_several_densities_is_the_mean_of_theirs():
    densities = torch.tensor([0.1, 0.7])
    assert gate_penalty(densities, Gating(target_density=0.4, density_weight=5.0)).item() == pytest.approx(5 * 0.3**2)
    assert gate_penalty(densities, Gating(sparsity=0.2)).item() == pytest.approx(0.2 * 0.4)


def test_schedule_of_a_step_counts_shares_of_epochs():
    gating = Gating(sparsity_start=1.0, sparsity_ramp=2.0, anneal_noise=True, final_slope=5.0)
    recipe = Recipe("own", epochs=4, optimizer=Optimizer(lr=0.2, schedule="cosine"), gating=gating)
    steps = (0, 15, 26, 39)
    found = [schedule(recipe, step, 10) for step in steps]
    assert [now.ramp for now in found] == pytest.approx([0.0, 0.25, 0.8, 1.0])
    assert [now.noise for now in found] == pytest.approx([1.0, 0.625, 0.35, 0.025])
    assert [now.slope for now in found] == pytest.approx([1.0, 2.5, 3.6, 4.9])
    rates = [0.1 * (1 + math.cos(math.pi * step / 40)) for step in steps]
    assert [now.rate for now in found] == pytest.approx(rates)
