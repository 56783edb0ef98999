"""A training step: forward, backward and update for one batch; on a GPU it can be captured once, and then replayed.

A small network leaves a GPU waiting for the processor, which launches hundreds of kernels a step. A CUDA graph launches
them all at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.data import ToInput
from gaternet.errors import first_line
from gaternet.method import Gater, gate_sparsity
from gaternet.objective import Schedule, distillation_loss, gate_penalty
from gaternet.recipe import Recipe, Runtime

WARM_UP = 3  # steps before one is captured: memory, cuDNN's choices and the optimizer's state are settled by then

Sums = dict[str, Tensor]


class TrainingStep:
    """All that is done with one batch.

    Args:
        model: what learns, as `training_step` takes it.
        optimizer: of its parameters, see `network.make_optimizer`.
        recipe, accelerator, density_of: see `training_step`.
        to_input: pixels -> inputs of the model.
        gater: whose noise changes with time, if there is one.
        teacher: pixels -> logits to learn from, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        recipe: Recipe,
        accelerator: Accelerator,
        to_input: ToInput,
        *,
        density_of: Callable[[Tensor], Tensor] | None = None,
        gater: Gater | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.recipe, self.accelerator = model, optimizer, recipe, accelerator
        self.to_input, self.density_of, self.gater, self.teacher = to_input, density_of, gater, teacher

    def __call__(self, images: Tensor, labels: Tensor, now: Schedule) -> Sums:
        """Learn from pixels (B, C, H, W) in uint8 and labels (B,); see `training_step` for what it returns."""
        self.set_rate(now.rate)
        self.optimizer.zero_grad()
        inputs, targets = self.to_input(images), self.teacher(images) if self.teacher else None
        with _scheduled(self.gater, self.recipe, now):
            sums = training_step(
                self.model, inputs, labels, self.recipe, now.ramp, self.accelerator, self.density_of, targets
            )
        self.optimizer.step()
        return sums

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the learning rate of each group of parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]


class CapturedStep:
    """The same step, as a CUDA graph from its fourth call on. Its batches have one size.

    What it returns is overwritten by the next call.
    """

    def __init__(self, step: TrainingStep) -> None:
        self.step, self._graph = step, StepGraph()
        self._calls = 0
        self._batch: tuple[Tensor, Tensor] | None = None
        self._now = [torch.ones((), device=step.accelerator.device) for _ in Schedule._fields]

    def __call__(self, images: Tensor, labels: Tensor, now: Schedule) -> Sums:
        """See `TrainingStep`.

        Raises:
            ValueError: the step cannot be captured.
        """
        if self._batch is None:
            self._batch = torch.empty_like(images), torch.empty_like(labels)
        for ours, theirs in zip(self._batch, (images, labels), strict=True):
            ours.copy_(theirs)
        for ours, value in zip(self._now, now, strict=True):
            ours.fill_(value)  # a graph reads numbers where they lay when it was captured
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._graph.capture(self._run)
        sums = self._graph.replay() if self._calls > WARM_UP else self._graph.warm_up(self._run)
        self.step.set_rate(now.rate)  # numbers again, as they are logged and saved
        return sums

    def _run(self) -> Sums:
        assert self._batch is not None
        return self.step(*self._batch, Schedule(*self._now))


class StepGraph:
    """A CUDA graph of a function without arguments."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._graph = torch.cuda.CUDAGraph()
        self._result: Sums = {}

    def warm_up(self, run: Callable[[], Sums]) -> Sums:
        """Run it once, on the stream on which it is captured: the graph of gradients remembers that."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def capture(self, run: Callable[[], Sums]) -> None:
        """Capture what it would do.

        Raises:
            ValueError: it does what no graph can, such as waiting for the GPU. The process should end then.
            torch.OutOfMemoryError: the graph keeps what it works with for itself.
        """
        try:
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error
            while first.__context__ is not None:  # leaving the graph fails as well
                first = first.__context__
            raise ValueError(
                f"this training step cannot be a CUDA graph ({first_line(first)}): run it with --no-cuda-graph, "
                "and with --resume where there is a run already"
            ) from error

    def replay(self) -> Sums:
        """Do what was captured; what it returns lies where it lay before."""
        self._graph.replay()
        return self._result


def captured(step: TrainingStep, runtime: Runtime) -> TrainingStep | CapturedStep:
    """The step as a CUDA graph, where that is wanted and can be."""
    return CapturedStep(step) if runtime.cuda_graph and can_be_captured(step.accelerator) else step


def can_be_captured(accelerator: Accelerator) -> bool:
    """One process on a GPU, whose optimizer waits for nothing, as one for fp16 does."""
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and accelerator.scaler is None


def training_step(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    ramp: float | Tensor,
    accelerator: Accelerator,
    density_of: Callable[[Tensor], Tensor] | None = None,
    targets: Tensor | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of one batch (equation 8); sums over the batch, on the device: nothing waits for them.

    `model` is a network, or a GaterNet's `GuidedNet` where the recipe asks for what that adds. `ramp` scales the gates'
    penalty. `density_of` is a GaterNet's `make_density`; `targets` are the logits of a teacher, where there is one.
    """
    smoothing = recipe.optimizer.label_smoothing
    logits, *others = (model(inputs),) if density_of is None else model(inputs, return_gates=True)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    if targets is not None:
        share = recipe.distillation.teacher_weight
        learned = distillation_loss(logits, targets, recipe.distillation.temperature)
        loss = (1 - share) * loss + share * learned
    sums = {"loss": loss.detach() * len(labels), "correct": (logits.argmax(1) == labels).sum()}
    if density_of is not None:
        gates = others[0]
        density = density_of(gates)  # (S,)
        if accelerator.num_processes > 1:  # the value of the whole batch, with the gradient of this process' part
            mean = accelerator.reduce(density.detach(), "mean")
            assert isinstance(mean, Tensor)
            density = density + (mean - density.detach())
        penalty = gate_penalty(density, recipe.gating, ramp)
        sums |= {"density": gate_sparsity(gates.detach()) * len(labels), "penalty": penalty.detach() * len(labels)}
        loss = loss + penalty
        if recipe.gating.auxiliary_weight:
            auxiliary = F.cross_entropy(others[1].float(), labels, label_smoothing=smoothing)
            sums["auxiliary_loss"] = auxiliary.detach() * len(labels)
            loss = loss + recipe.gating.auxiliary_weight * auxiliary
    accelerator.backward(loss)
    return sums | {"images": torch.full_like(loss, len(labels)).detach()}


@contextmanager
def _scheduled(gater: Gater | None, recipe: Recipe, now: Schedule) -> Iterator[None]:
    """The gater's noise and slope as they are now, for a step; what is saved is as before."""
    if gater is None:
        yield
        return
    noise_std, slope = gater.noise_std, gater.slope
    gater.noise_std = noise_std * now.noise
    if recipe.gating.final_slope != 1:
        gater.slope = now.slope
    try:
        yield
    finally:
        gater.noise_std, gater.slope = noise_std, slope
