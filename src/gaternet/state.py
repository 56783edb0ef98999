"""What a training holds beside its options: the state that checkpoints save, from which it goes on."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class TrainingState:
    """Weights, optimizer, averages and position of a training. Its `state_dict` is what a checkpoint holds.

    Of several processes each sums what its own images gave, up to a line of the log; from then on it has its share of
    what all of them gave. The main one's sums are saved, and stand for all. A signal stops runs at such a line, so only
    after a kill are the means of an epoch resumed in its middle without what other processes had seen since.

    Attributes:
        epoch, step: epochs finished, and steps done, since the run's beginning.
        best: highest test accuracy so far, in [0, 1]; -1 before the first evaluation.
        seconds: spent on the current epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: AveragedModel | None,
        accelerator: Accelerator,
        auxiliary: nn.Module | None = None,
    ) -> None:
        parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "ema": ema, "auxiliary": auxiliary}
        parts["scaler"] = accelerator.scaler
        self.processes = accelerator.num_processes
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.epoch = self.step = 0
        self.best = -1.0
        self.seconds = 0.0
        self.epoch_sums: dict[str, Tensor] = {}
        self.window_sums: dict[str, Tensor] = {}  # since the last log line

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Count one step and what it summed; the tensors may be overwritten afterwards."""
        self.step += 1
        _add(self.window_sums, sums)

    def means(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Means over the images since the last call, and since the epoch's beginning, of all processes."""
        totals = accelerator.reduce(torch.stack([value.float() for value in self.window_sums.values()]), "sum")
        assert isinstance(totals, Tensor)
        window = dict(zip(self.window_sums, totals / self.processes, strict=True))
        self.window_sums = {}
        _add(self.epoch_sums, window)
        return _means(window), _means(self.epoch_sums)

    def end_epoch(self, accuracy: float) -> bool:
        """Go on to the next epoch; True if this one had the best accuracy so far."""
        self.epoch += 1
        self.seconds = 0.0
        self.epoch_sums = {}
        is_best = accuracy > self.best
        self.best = max(self.best, accuracy)
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain data."""
        numbers = {"epoch": self.epoch, "step": self.step, "best": self.best, "seconds": self.seconds}
        numbers["processes"] = self.processes
        sums = {"epoch_sums": self.epoch_sums, "window_sums": self.window_sums}
        return {**numbers, **sums, **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.seconds = state["seconds"]
        share = state.get("processes", self.processes) / self.processes  # of what each process now stands for
        device = next(self.parts["network"].parameters()).device
        for name in ("epoch_sums", "window_sums"):
            kept = {key: value.to(device) for key, value in state[name].items()}
            setattr(self, name, kept if share == 1 else {key: value * share for key, value in kept.items()})
        optimizer = self.parts["optimizer"]
        fused = [group["fused"] for group in optimizer.param_groups]
        for name, part in self.parts.items():
            if name != "scaler" or name in state:  # a run may go on in another precision
                part.load_state_dict(state[name])
        for group, ours in zip(optimizer.param_groups, fused, strict=True):
            group["fused"] = ours  # as it is fast here, not where the state was saved


def _add(total: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value.clone()


def _means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Over the images, as plain numbers."""
    named = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    images = named.pop("images")
    named["accuracy"] = named.pop("correct")
    return {name: total / images for name, total in named.items()}
