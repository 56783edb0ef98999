"""What a training sums while it goes on."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gaternet.state import TrainingState


def machine_of(processes: int) -> Any:
    """One of several processes, of which each has the same sums."""
    machine = Mock(spec=Accelerator, num_processes=processes, scaler=None)
    machine.reduce.side_effect = lambda sums, how: processes * sums
    return machine


def state(machine: Any) -> TrainingState:
    network = nn.Linear(2, 2)
    return TrainingState(network, torch.optim.SGD(network.parameters(), fused=False), None, machine)


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_means_are_right_where_a_run_goes_on_with_more_or_fewer_processes(before, after, logged):
    """Ten steps of 32 images with a loss of 2 and none right, then ten of 1 and all right, over all processes."""
    first = state(machine := machine_of(before))
    for _ in range(10):
        images = torch.tensor(32.0) / before
        first.add({"loss": 2 * images, "correct": torch.tensor(0), "images": images})
    if logged:  # as where a signal stops several processes
        assert first.means(machine) == ({"loss": 2.0, "accuracy": 0.0},) * 2
    second = state(machine := machine_of(after))
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        images = torch.tensor(32) // after
        second.add({"loss": 1.0 * images, "correct": images, "images": 1.0 * images})
    window, epoch = second.means(machine)
    assert epoch == {"loss": 1.5, "accuracy": 0.5}
    assert window == ({"loss": 1.0, "accuracy": 1.0} if logged else epoch)


def test_means_of_an_epoch_are_of_what_all_processes_saw_though_the_state_is_one_of_them():
    """Each of two sees 32 images a step, one with a loss of 1 and all right, the other with 3 and none right."""

    def sums(loss: float, correct: int) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(32 * loss), "correct": torch.tensor(correct), "images": torch.tensor(32.0)}

    machine = machine_of(2)
    machine.reduce.side_effect = lambda mine, how: mine + torch.tensor([32 * 3.0, 0.0, 32.0])
    first, resumed = state(machine), state(machine)
    first.add(sums(1.0, 32))
    assert first.means(machine)[1] == {"loss": 2.0, "accuracy": 0.5}
    resumed.load_state_dict(first.state_dict())
    resumed.add(sums(1.0, 32))
    assert resumed.means(machine) == ({"loss": 2.0, "accuracy": 0.5}, {"loss": 2.0, "accuracy": 0.5})
