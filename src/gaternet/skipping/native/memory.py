"""Memory in large pages: with pages of 4 KiB, a pass over a network's weights waits for addresses to be looked up."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

LANES = 16  # numbers of a cache line


def large_pages(count: int) -> Tensor:
    """Zeros (count,), float32, in pages of 2 MiB where the system grants them."""
    memory = mmap.mmap(-1, max(4 * count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=count)


def round_up(count: int) -> int:
    """The next multiple of a cache line's numbers."""
    return -(-count // LANES) * LANES
