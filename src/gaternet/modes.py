"""How a network runs: in evaluation mode, in its own precision, without logs; its copies; how its weights lie."""

import copy
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from gaternet.errors import fills_memory, first_line

_ALONE = threading.RLock()


@torch.no_grad()
def run_once(network: nn.Module, images: Tensor, name: str) -> Any:
    """What a network gives in evaluation mode; ValueError, which calls it `name`, if it cannot take such images."""
    try:
        with evaluation_mode(network):
            return network(images)
    except Exception as error:  # the network's own code may raise anything
        if fills_memory(error):
            raise
        raise ValueError(
            f"{name} cannot take images {tuple(images.shape)} ({first_line(error)}): give images of another size, or "
            "shrink them less"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the logs and warnings of exporters, which print whole graphs where they fail.

    One thread at a time: these are the process's, and torch.export takes one network at a time.
    """
    with _ALONE:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where torch.export prints them, too
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each module is in the mode it was in, so that frozen ones stay frozen."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        if training[network]:
            network.train()  # which may do more than set the mode, such as take weights apart that eval() had merged
        for module, was in training.items():
            module.training = was


def trial_copy(network: nn.Module) -> nn.Module:
    """A copy to run that leaves the network as it is, or the network itself if it has no copies.

    It has the network's weights, without gradients, and buffers of its own, which some layers change in each run.
    """
    known: dict[int, Any] = {}
    try:
        for module in network.modules():
            known |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
        known |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
        known |= {id(buffer): buffer.detach().clone() for buffer in network.buffers()}
        return copy.deepcopy(network, known)
    except Exception:  # its own code may raise anything
        return network


def full_copy(network: nn.Module) -> nn.Module:
    """A copy with tensors of its own; ValueError if the network has none."""
    try:
        return copy.deepcopy(network)
    except Exception as error:  # its own code may raise anything
        raise ValueError(
            f"the {type(network).__name__} cannot be copied ({first_line(error)}): where it keeps a tensor of a "
            "training step, run it once under torch.no_grad() first"
        ) from error


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """In the precision of weights and images, whatever is around: what is read, skipped or exported stays in it."""
    known = torch.amp.is_autocast_available(device_type)  # the device meta has none
    active = known and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def channels_last_(network: nn.Module) -> None:
    """Let weights lie as NHWC in memory; with images that do, convolutions are faster on most devices."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:  # nn.Module.to takes no tensors of other ranks above that
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
