"""What a training works with, made before anything is written: here it is found out what cannot be trained."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gaternet.data import ImageData, ToInput
from gaternet.errors import TrainingError, fills_memory, first_line
from gaternet.evaluate import batch_size_for
from gaternet.loader import Batches, make_batches
from gaternet.method import Gater, GaterNet
from gaternet.modes import channels_last_, run_once
from gaternet.network import (
    GuidedNet,
    build_network,
    load_teacher,
    make_density,
    make_optimizer,
    prepared_for,
    set_training_mode,
)
from gaternet.recipe import Recipe, Runtime
from gaternet.state import TrainingState
from gaternet.step import CapturedStep, TrainingStep, captured
from gaternet.wrapping import refuse_wrapped


@dataclass
class Prepared:
    """A training that can begin.

    Attributes:
        data: normalised as the network wants it.
        to_input: its pixels -> inputs of the network.
        network: what learns, and is saved.
        model: the network as steps call it: with what our recipes add to it while it trains, and Accelerate's wrapping.
        optimizer: of the model's parameters.
        ema: the network with averages of its weights, where the recipe asks for such.
        step: all that is done with one batch.
        state: what is saved to go on from.
        train_batches, test_batches: of the data, for this process.
    """

    accelerator: Accelerator
    data: ImageData
    to_input: ToInput
    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    step: TrainingStep | CapturedStep
    state: TrainingState
    train_batches: Batches
    test_batches: Batches

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and given out: that with averages of the weights, if there is one."""
        return self.network if self.ema is None else self.ema.module


def prepare(
    recipe: Recipe,
    data: ImageData,
    runtime: Runtime,
    seed: int,
    accelerator: Accelerator,
    network: nn.Module | None = None,
    known: Mapping[str, Any] | None = None,
) -> Prepared:
    """Make what a training works with.

    Args:
        recipe, data, runtime, seed: see `gaternet.train.train`.
        accelerator: of `runtime`.
        network: to train in place of the recipe's own.
        known: of a run that goes on from a saved state, how its images became inputs.

    Raises:
        ValueError: the recipe does not go with the data, with the network or with the machine.
        TrainingError: the network does not fit into memory.
    """
    if len(data.train) < recipe.batch_size:
        raise ValueError(f"batch_size {recipe.batch_size} is more than the {len(data.train)} training images: lower it")
    sides, cutout = (data.preprocessing.height, data.preprocessing.width), recipe.augmentation.cutout
    if cutout >= 2 * max(sides) - 1:
        raise ValueError(f"cutout {cutout} covers images of {sides[0]} x {sides[1]} pixels whole: lower it")
    if network is not None:
        refuse_wrapped(network)
    if network is not None and recipe.gated and not isinstance(network, GaterNet):
        raise ValueError(
            f"the recipe {recipe.name} trains gates, and the network has none: gate it with gaternet.gate first, or "
            "take a plain recipe"
        )
    built_from = recipe if network is None else None
    with _fitting():
        if network is None:
            network = build_network(recipe, data, seed, trained=known is None)  # else the saved state has its weights
        else:
            torch.manual_seed(seed)  # as `build_network` does
        network.to(accelerator.device)
    data = prepared_for(data, network, built_from, known)
    to_input = ToInput(data.preprocessing, runtime.channels_last)
    example = to_input(data.test[0][0][None].to(accelerator.device))
    _check_outputs(run_once(network, example, "the network"), data)
    set_training_mode(network, recipe)
    if recipe.batch_size == accelerator.num_processes:
        _check_one_image(network, example)
    if runtime.channels_last:
        channels_last_(network)
    decay = recipe.optimizer.ema_decay
    ema = AveragedModel(network, multi_avg_fn=_averaging(decay), use_buffers=True) if decay else None
    learner, auxiliary = network, None
    gater = density_of = None
    if isinstance(network, GaterNet):
        gater = network.gater if isinstance(network.gater, Gater) else None  # a user's own may have no noise
        density_of = make_density(network, recipe.gating, example)
        if recipe.gating.auxiliary_weight or recipe.gating.open_probability:
            learner = GuidedNet(network, recipe.gating, len(data.classes)).to(accelerator.device)
            auxiliary = learner.classifier
    if runtime.compile:
        learner.compile()
    model, optimizer = accelerator.prepare(learner, make_optimizer(network, recipe, accelerator, auxiliary))
    teacher = load_teacher(recipe, data, accelerator)
    step = TrainingStep(
        model, optimizer, recipe, accelerator, to_input, density_of=density_of, gater=gater, teacher=teacher
    )
    evaluated = max(recipe.batch_size, batch_size_for(data.preprocessing, accelerator))
    return Prepared(
        accelerator=accelerator,
        data=data,
        to_input=to_input,
        network=network,
        model=model,
        optimizer=optimizer,
        ema=ema,
        step=captured(step, runtime),
        state=TrainingState(network, optimizer, ema, accelerator, auxiliary),
        train_batches=make_batches(data.train, recipe.batch_size, runtime, accelerator, seed),
        test_batches=make_batches(data.test, evaluated, runtime, accelerator),
    )


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """PyTorch's moving average, but that whole numbers, such as indices, are taken over: it would round them down."""
    average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], count: Any) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            average(averages, values, count)
        else:
            for held, value in zip(averages, values, strict=True):
                held.copy_(value)

    return update


@contextmanager
def _fitting() -> Iterator[None]:
    """TrainingError where what is made does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError, TypeError) as error:
        if not fills_memory(error) and "verflow" not in str(error):  # of sizes above 64 bits, which no memory has
            raise
        raise TrainingError(
            f"the network does not fit into memory ({first_line(error)}): name a smaller one, or a lower --bottleneck"
        ) from error


def _check_outputs(logits: Any, data: ImageData) -> None:
    """That a network gives one logit for each class of the data."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != len(data.classes):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"the network gives {given} for an image, but must give logits of {len(data.classes)} classes")


def _check_one_image(network: nn.Module, image: Tensor) -> None:
    """That a network can learn from one image (1, C, H, W) at a time; it stays as it is."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}  # which BatchNorm changes
    try:
        with torch.no_grad():
            torch.func.functional_call(network, buffers, (image,))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "one image a step, in a process, is too few for BatchNorm, which would see one value of each channel: "
            "raise batch_size"
        ) from error
