"""Locks on folders and files, which end with the process that holds them, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[int] = set()  # the descriptors of this process' locks


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
    _held.add(handle)
    return handle


def unlock_folder(handle: int) -> None:
    """Release a lock, also where its descriptor was duplicated; in a process that was forked since, do nothing."""
    if fcntl is not None and handle in _held:
        _held.remove(handle)
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A folder or a file that one process at a time has; the others wait. Where there are no locks, all have it."""
    lock = lock_folder(path, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            unlock_folder(lock)


def _close_copies() -> None:
    """In a process that was just forked: what it inherited would hold the lock of one that is killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_close_copies)
