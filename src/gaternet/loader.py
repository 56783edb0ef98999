"""Batches of images: cut from memory and augmented where the network is, or read from files by PyTorch's loader."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from gaternet.augment import DRAWS, augment_batch
from gaternet.data import ImageSet, mix_seed
from gaternet.recipe import Runtime


class MemoryBatches:
    """Of images that are held as one tensor, which moves to the device; nothing waits for anything there."""

    def __init__(self, images: ImageSet, batch_size: int, accelerator: Accelerator, seed: int | None) -> None:
        assert isinstance(images.images, Tensor)
        self._images = images.images.to(accelerator.device)
        self._labels = torch.from_numpy(images.labels).to(accelerator.device)
        self._augmentation = images.augmentation if seed is not None else None
        self._size, self._seed, self._accelerator = batch_size, seed, accelerator

    def __len__(self) -> int:
        whole, rest = divmod(len(self._labels), self._size)
        return whole + (self._seed is None and rest > 0)

    def epoch(self, epoch: int = 0, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, but for the first `skip`."""
        count, device, seed = len(self._labels), self._accelerator.device, self._seed
        order, draws = torch.arange(count), torch.zeros(count, DRAWS)
        if seed is not None:
            order = EpochSampler(count, seed, epoch).order()
            draws = torch.rand(
                count, DRAWS, generator=torch.Generator().manual_seed(mix_seed("augmentation", seed, epoch))
            )
        order, draws = order.to(device), draws.to(device)
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        for step in range(skip, len(self)):
            index = order[step * self._size : (step + 1) * self._size][rank::processes]
            if not len(index):  # of a last batch that has fewer images than there are processes
                break
            images = self._images[index]
            if self._augmentation is not None and seed is not None:
                part = mix_seed("policy", seed, epoch, step, rank)
                images = augment_batch(images, self._augmentation, draws[index], part)
            yield images, self._labels[index]


class FileBatches:
    """Of images that are read when needed, by processes of their own."""

    def __init__(
        self, images: ImageSet, batch_size: int, runtime: Runtime, accelerator: Accelerator, seed: int | None
    ) -> None:
        self._images = images
        self._sampler = None if seed is None else EpochSampler(len(images), seed)
        loader = DataLoader(
            images,
            max(1, batch_size // accelerator.num_processes),
            sampler=self._sampler,
            num_workers=min(8, _cores()) if runtime.workers is None else runtime.workers,
            drop_last=seed is not None,
            pin_memory=accelerator.device.type == "cuda",
            worker_init_fn=partial(_ignore_signals, _end()),
            generator=torch.Generator(),  # so that the loader leaves PyTorch's own generator alone
        )
        self._loader = accelerator.prepare(loader)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int = 0, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, but for the first `skip`."""
        loader: Any = skip_first_batches(self._loader, skip) if skip else self._loader
        self._images.set_epoch(epoch)
        loader.set_epoch(epoch)  # would set another one itself
        if self._sampler is not None:  # which it does not reach where it skips for one process of several
            self._sampler.set_epoch(epoch)
        try:
            yield from loader
        except BaseException as error:
            if self._loader.num_workers:  # what holds the error would hold the frames where it arose, and so them
                error.__traceback__ = None
            raise


Batches = MemoryBatches | FileBatches


def make_batches(
    images: ImageSet, batch_size: int, runtime: Runtime, accelerator: Accelerator, seed: int | None = None
) -> Batches:
    """Batches of a set: uint8 images (B, C, H, W) and labels (B,), on the accelerator's device.

    Args:
        images: the set.
        batch_size: over all processes together; each gets its part.
        runtime: how many processes read files.
        accelerator: the device and the other processes.
        seed: for training: a new order each epoch, augmentation, and whole batches only. Without, all images in order.
    """
    if isinstance(images.images, Tensor):
        return MemoryBatches(images, batch_size, accelerator, seed)
    return FileBatches(images, batch_size, runtime, accelerator, seed)


def _cores() -> int:
    """Those that this process may use, shared out among the processes of a launcher on this machine; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def _end() -> Any:
    """A flag for the workers, whose value is 1 when this process ends, before it ends them."""
    end = multiprocessing.RawValue("b", 0)
    atexit.register(setattr, end, "value", 1)  # what was registered last is called first: multiprocessing's comes later
    return end


def _ignore_signals(end: Any, worker: int) -> None:
    """Ignore what a terminal sends to the whole process group: the main process saves first, and then ends its workers.

    That sends them SIGTERM, and waits until they obey; before its end they ignore that, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if end.value else None)


class EpochSampler(Sampler[int]):
    """A new order of `size` items each epoch, a function of (seed, epoch) alone."""

    def __init__(self, size: int, seed: int, epoch: int = 0) -> None:
        self.size, self.seed, self.epoch = size, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and so the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> Tensor:
        """The epoch's items, (size,)."""
        return torch.randperm(
            self.size, generator=torch.Generator().manual_seed(mix_seed("order", self.seed, self.epoch))
        )
