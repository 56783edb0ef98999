"""Pure functions of the training objective: losses and what changes with time. No state, so nothing to resume."""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gaternet.recipe import Gating, Optimizer, Recipe


class Schedule(NamedTuple):
    """What changes from step to step, beside the images.

    Attributes:
        rate: the learning rate, of groups of parameters whose scale is 1.
        noise: factor, in [0, 1], of the noise on the gates' logits.
        ramp: factor, in [0, 1], of the penalty on gates.
        slope: of the soft gates, above 0.
    """

    rate: float | Tensor
    noise: float | Tensor
    ramp: float | Tensor
    slope: float | Tensor


def schedule(recipe: Recipe, step: int, steps_per_epoch: int) -> Schedule:
    """Of a step, counted from 0."""
    epoch = step / steps_per_epoch
    return Schedule(
        learning_rate(recipe.optimizer, step, steps_per_epoch, recipe.epochs),
        noise_scale(recipe.gating, epoch / recipe.epochs),
        penalty_ramp(recipe.gating, epoch),
        1 + (recipe.gating.final_slope - 1) * epoch / recipe.epochs,
    )


def unreached(recipe: Recipe) -> list[str]:
    """What a recipe's schedules would come to, had it more epochs; a sentence each."""
    gating, found = recipe.gating, list[str]()
    if recipe.gated and gating.freeze != "gater" and (gating.sparsity or gating.target_density is not None):
        ramp = penalty_ramp(gating, recipe.epochs - 1e-9)
        if ramp < 1 - 1e-6:
            found.append(
                f"in {recipe.duration} the penalty on open gates comes to {100 * ramp:.0f} % of its weight: "
                "see --sparsity-start and --sparsity-ramp"
            )
    if recipe.optimizer.warmup_epochs >= recipe.epochs:
        found.append(f"in {recipe.duration} the learning rate still rises: see --warmup-epochs")
    return found


def penalty_ramp(gating: Gating, epoch: float) -> float:
    """Factor, in [0, 1], of the penalty on gates when `epoch` epochs are done, fractions included."""
    if gating.sparsity_ramp > 0:
        return min(1.0, max(0.0, (epoch - gating.sparsity_start) / gating.sparsity_ramp))
    return 1.0 if epoch >= gating.sparsity_start else 0.0


def gate_penalty(
    density: Float[Tensor, "*densities"], gating: Gating, ramp: float | Float[Tensor, ""] = 1.0
) -> Float[Tensor, ""]:
    """What gates add to the loss: lambda * density (paper, equation 8), or density_weight * (density - target)^2.

    Args:
        density: of the batch, in [0, 1]: one, or several whose penalties are averaged (see `network.make_density`).
        gating: the weights.
        ramp: factor of either weight, see `penalty_ramp`.
    """
    if gating.target_density is not None:
        return ramp * gating.density_weight * ((density - gating.target_density) ** 2).mean()
    return ramp * gating.sparsity * density.mean()


def noise_scale(gating: Gating, done: float) -> float:
    """Factor, in [0, 1], of the noise on the gates' logits when a share `done`, in [0, 1], of training is done."""
    return 1 - done if gating.anneal_noise else 1.0


def distillation_loss(
    logits: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, ""]:
    """Mean Kullback-Leibler divergence from the teacher's softened classes to ours, in nats, times temperature^2.

    The factor keeps the gradients' size where the temperature changes (Hinton, Vinyals, Dean, 2015, section 2).
    """
    ours, theirs = (F.log_softmax(values.float() / temperature, 1) for values in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def learning_rate(optimizer: Optimizer, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of a step, counted from 0, in a training of `epochs` epochs."""
    warmup, total = optimizer.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return optimizer.lr * (step + 1) / (warmup + 1)
    if optimizer.schedule == "step":
        return optimizer.lr * optimizer.gamma ** sum(step >= share * total for share in optimizer.milestones)
    if optimizer.schedule == "cosine":
        return optimizer.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))
    return optimizer.lr
