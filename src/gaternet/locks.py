"""Locks on folders, which end with the process that holds them, however it ends."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock_folder(path: Path, wait: bool) -> int | None:
    """A file descriptor that holds the lock until `unlock_folder`; None where the system or the disk has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def unlock_folder(handle: int) -> None:
    """Let go of a lock, also where processes that were forked meanwhile have copies of its descriptor."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
