"""Training: one visible loop on Accelerate (CPU, one GPU, or many processes and machines).

Every random draw of a step is a function of (seed, step, process), the order of the images one of (seed, epoch), and so
is their augmentation, but for policies (`gaternet.augment`). So no generator's state needs saving, and a run that is
killed and resumed ends with the same weights: bit for bit where sums always come in the same order, as on a CPU.
"""

import math
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from gaternet import checkpoint
from gaternet.data import load_data, mix_seed
from gaternet.errors import Stopped, TrainingError, fills_memory, first_line
from gaternet.evaluate import evaluate
from gaternet.files import read_json
from gaternet.machine import (
    accelerate_restored,
    collect_signals,
    import_tensorboard,
    make_accelerator,
    seed_step,
    should_stop,
    tensorboard,
    tuned_convolutions,
)
from gaternet.method import GaterNet
from gaternet.network import model_metadata, set_training_mode
from gaternet.objective import schedule, unreached
from gaternet.preparation import Prepared, prepare
from gaternet.progress import TrainingDisplay
from gaternet.recipe import Recipe, Runtime
from gaternet.run import STATE, RunDirectory
from gaternet.state import TrainingState


@tuned_convolutions()
@accelerate_restored()
def train(
    recipe: Recipe,
    run_dir: str | Path,
    runtime: Runtime | None = None,
    seed: int = 0,
    resume: bool = False,
    network: nn.Module | None = None,
) -> dict[str, Any]:
    """Train a recipe, evaluating after each epoch, and keep everything in `run_dir` (see `gaternet.run`).

    Args:
        recipe: what to train, on what, and how.
        run_dir: must be new, or hold the same run where `resume` is set.
        runtime: how to use this machine.
        seed: of the weights, the order of images, the augmentation and the gates' noise.
        resume: continue the run that is there.
        network: train this one, for example a GaterNet that `gate` made, in place of the recipe's own; of the
            recipe, options that build a network or start it from weights then have no effect. A GaterNet's metadata
            then name its classes, its preprocessing and this training, so that `save_pretrained` saves them, too. On
            one GPU its step is captured once and replayed: set `Runtime.cuda_graph` to False where its Python code
            does something else from step to step.

    Returns:
        The metrics of the last epoch, as in metrics.jsonl; accuracies and densities lie in [0, 1].

    Raises:
        ValueError: the recipe, the data or the run directory cannot be used.
        OSError: nothing more can be written, for example to a full disk; what was saved stays whole.
        TrainingError: the loss is no longer finite, or memory is full. `Stopped`: a signal came.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed}")
    runtime = runtime or Runtime()
    accelerator = make_accelerator(runtime)
    if recipe.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size {recipe.batch_size} does not divide among {accelerator.num_processes} processes")
    RunDirectory(Path(run_dir)).check(resume)  # before images are read, which takes its time
    with accelerator.local_main_process_first():  # one download a machine
        data = load_data(recipe.data, recipe.augmentation, recipe.image_size, runtime.data_root, seed)
    known = RunDirectory(Path(run_dir)).preprocessing() if resume else None
    learnable = [] if network is None else [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    prepared = prepare(recipe, data, runtime, seed, accelerator, network, known)
    if runtime.tensorboard:
        import_tensorboard()
    config: dict[str, Any] = {"recipe": asdict(recipe), "images": data.identity(), "seed": seed}
    if network is not None:
        config["network"] = type(network.backbone if isinstance(network, GaterNet) else network).__name__
    about = {"runtime": asdict(runtime), "preprocessing": asdict(prepared.data.preprocessing), **_way(accelerator)}
    run, saved = _open_run(Path(run_dir), config, about, resume, accelerator)  # all faults were found

    network, training, ema = prepared.network, prepared.state, prepared.ema
    steps_per_epoch = len(prepared.train_batches)
    record: dict[str, Any] = {}
    main = accelerator.is_main_process
    with (
        _loaded(run, training, saved),
        _given_back(prepared.model, accelerator, learnable),
        TrainingDisplay(recipe.epochs, steps_per_epoch, training.step, quiet=not main) as display,
        tensorboard(run.path if runtime.tensorboard and main else None, training.step) as board,
        collect_signals() as received,
    ):
        if resume and main:
            run.note_data(recipe.data)
            if training.epoch < recipe.epochs:
                run.note_place(training.epoch + 1, training.step, _way(accelerator))
        if training.epoch == recipe.epochs:
            _tell(network, read_json(run.path / "last" / checkpoint.CONFIG)["metadata"])
            return run.epochs()[-1]
        for line in (_title(recipe, prepared, config.get("network")), *unreached(recipe)):
            display.line(line)
        for epoch in range(training.epoch, recipe.epochs):
            set_training_mode(network, recipe)
            clock = _Clock(recipe.batch_size, training.step, training.seconds)
            metrics: dict[str, float] = {}
            for images, labels in prepared.train_batches.epoch(epoch, training.step - epoch * steps_per_epoch):
                seed_step(mix_seed("step", seed, training.step, accelerator.process_index), accelerator.device)
                training.add(prepared.step(images, labels, schedule(recipe, training.step, steps_per_epoch)))
                if ema is not None:
                    ema.update_parameters(network)

                ends = training.step == (epoch + 1) * steps_per_epoch
                logs = ends or training.step % runtime.log_every == 0
                if logs:
                    window, metrics = training.means(accelerator)
                    _check_loss(window, epoch, training.step)
                    metrics["images_per_second"] = clock.images_per_second(training.step)
                    display.step(epoch, training.step, metrics)
                    if main:
                        norms = _gradient_norms(network)
                        run.log({"kind": "step", "step": training.step, "epoch": epoch + 1, **window, **norms})
                if ends:
                    break  # saved below, with the evaluation
                training.seconds = clock.since_start()
                stops = should_stop(received, accelerator, logs)
                if stops or clock.since_save() >= 60 * runtime.save_minutes:
                    _check_weights(network, epoch, training.step)
                    run.save_state(training.state_dict(), main)
                    clock.saved()
                if stops:
                    accelerator.wait_for_everyone()  # where one process ends, its launcher ends the others
                    raise _stopped(received, run, epoch, training.step)

            _check_weights(network, epoch, training.step)
            tested = _evaluated(prepared)
            display.epoch(epoch, metrics, tested)
            is_best = training.end_epoch(tested["accuracy"])
            record = _epoch_record(prepared, metrics, tested, clock.since_start())
            metadata = model_metadata(recipe, prepared.judged, prepared.data, seed, training.epoch, tested)
            _tell(network, metadata)
            if main:
                run.log(record)
                for name in ("best", "last") if is_best else ("last",):
                    checkpoint.save_model(prepared.judged, run.path / name, metadata)
                if board is not None:
                    for name, value in record.items():
                        if isinstance(value, float):
                            board.add_scalar(name.replace("_", "/", 1), value, training.step)
            run.save_state(training.state_dict(), main)
            if training.epoch < recipe.epochs and should_stop(received, accelerator, True):
                accelerator.wait_for_everyone()
                raise _stopped(received, run, epoch, training.step)
    accelerator.wait_for_everyone()  # what follows may read what the main process has still to write
    return record


def _tell(network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """What is saved beside the weights is known to a GaterNet itself."""
    if isinstance(network, GaterNet):
        network.metadata.update(metadata)


def _evaluated(prepared: Prepared) -> dict[str, Any]:
    """What the network does on the test images after an epoch, see `evaluate`."""
    accelerator, judged = prepared.accelerator, prepared.judged
    if accelerator.num_processes > 1:  # each saw other images: agree on BatchNorm's statistics
        broadcast([*prepared.network.buffers(), *judged.buffers()])
    with torch.compiler.set_stance("force_eager"):  # evaluation is not worth a compilation of its own
        return evaluate(judged, prepared.test_batches, prepared.to_input, accelerator)


def _epoch_record(
    prepared: Prepared, metrics: Mapping[str, float], tested: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for the epoch that has ended."""
    training = prepared.state
    return {
        "kind": "epoch",
        "epoch": training.epoch,
        "step": training.step,
        "lr": prepared.optimizer.param_groups[0]["lr"],
        **{f"train_{name}": value for name, value in metrics.items()},
        **{f"test_{name}": value for name, value in tested.items()},
        "seconds": seconds,
    }


@contextmanager
def _loaded(run: RunDirectory, training: TrainingState, state: dict[str, Any] | None) -> Iterator[None]:
    """Training as it was saved, if it was; the run is free again afterwards, also where that cannot be loaded.

    What was saved is emptied: it is as large as all that training holds.
    """
    with closing(run):
        if state is not None:
            try:
                training.load_state_dict(state)
                state.clear()
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{run.path / STATE} does not fit this run ({first_line(error)}): it is damaged, or of another "
                    "version of gaternet; restore it, or name another --out"
                ) from error
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if (explained := _explained(error)) is None:
                raise
            raise explained from error


@contextmanager
def _given_back(
    model: nn.Module, accelerator: Accelerator, learnable: list[tuple[nn.Parameter, bool]]
) -> Iterator[None]:
    """At the end the model, which may be the caller's, has no mixed precision, and learns what it did before."""
    try:
        yield
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        for parameter, learns in learnable:
            parameter.requires_grad_(learns)


def _open_run(
    path: Path, config: Mapping[str, Any], about: Mapping[str, Any], resume: bool, accelerator: Accelerator
) -> tuple[RunDirectory, dict[str, Any] | None]:
    """A run directory, begun or continued, and the state to go on from, if there is one.

    What is told `about` a new one may be otherwise when it goes on, unlike its `config`.
    """
    run, state = RunDirectory(path), None
    with accelerator.main_process_first():  # the others read what the main process has put in order
        if resume:
            state = run.resume(config, accelerator.is_main_process)
        elif accelerator.is_main_process:
            run.start({**config, **about})
    return run, state


def _way(accelerator: Accelerator) -> dict[str, Any]:
    return {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}


def _check_loss(window: Mapping[str, float], epoch: int, step: int) -> None:
    if not math.isfinite(window["loss"] + window.get("penalty", 0.0)):
        raise _diverged(f"the loss is {window['loss']}", epoch, step)


def _check_weights(network: nn.Module, epoch: int, step: int) -> None:
    """Before they take the place of others."""
    norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in network.parameters()]).item()
    if not math.isfinite(norm):
        raise _diverged(f"the weights' norm is {norm}", epoch, step)


def _diverged(what: str, epoch: int, step: int) -> TrainingError:
    return TrainingError(
        f"{what} in epoch {epoch + 1} by step {step}: start again with a lower --lr, a longer --warmup-epochs or "
        "--precision no, in another --out; what was saved before is whole"
    )


def _gradient_norms(network: nn.Module) -> dict[str, float]:
    parts = {"backbone": network.backbone, "gater": network.gater} if isinstance(network, GaterNet) else {"": network}
    norms = {}
    for name, part in parts.items():
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        norms[f"{name}_gradient_norm".lstrip("_")] = torch.nn.utils.get_total_norm(gradients).item()
    return norms


def _title(recipe: Recipe, prepared: Prepared, given: str | None) -> str:
    network, data, accelerator = prepared.network, prepared.data, prepared.accelerator
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    gates = f", {network.num_gates:,} gates" if isinstance(network, GaterNet) else ""
    where = f"{accelerator.num_processes} x {accelerator.device.type}, {accelerator.mixed_precision} precision"
    name = given or recipe.model or recipe.backbone
    return (
        f"{recipe.name}: {name} ({parameters:.2f}M parameters{gates}) on {recipe.data}, "
        f"{len(data.train):,} + {len(data.test):,} images, {recipe.duration}, {where}"
    ).replace("no precision", "full precision")


class _Clock:
    def __init__(self, batch_size: int, step: int, seconds: float) -> None:
        self.batch_size, self.first_step, self.before = batch_size, step, seconds
        self.start = self.save = time.monotonic()

    def images_per_second(self, step: int) -> float:
        return (step - self.first_step) * self.batch_size / (time.monotonic() - self.start)

    def since_start(self) -> float:
        return self.before + time.monotonic() - self.start

    def since_save(self) -> float:
        return time.monotonic() - self.save

    def saved(self) -> None:
        self.save = time.monotonic()


def _explained(error: Exception) -> TrainingError | None:
    """What can be done about the usual failures of a machine; None for other errors."""
    text = first_line(error)
    if fills_memory(error):
        return TrainingError(
            f"memory is full ({text}): go on with --resume once other programs are gone, or start anew with a lower "
            "--batch-size or --image-size, in another --out"
        )
    if "DataLoader worker" in text:
        return TrainingError(f"a process that reads images died ({text}): go on with --resume and fewer --workers")
    if isinstance(error, torch.distributed.DistError) or "Connection closed by peer" in text:
        return TrainingError(f"another process of the run is gone ({text}): see why, and go on with --resume")
    return None


def _stopped(received: list[int], run: RunDirectory, epoch: int, step: int) -> Stopped:
    signum = received[0] if received else signal.SIGTERM  # another process got it
    text = f"stopped in epoch {epoch + 1} after step {step}, with all saved"
    return Stopped(f"{text}: gaternet train --resume --out {shlex.quote(str(run.path))} goes on with it", signum)
