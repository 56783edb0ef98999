"""Files that are whole or not there: written atomically, as JSON or as tensors, and read without running any pickle.

A reader, or a machine that dies, sees the old file or the new one.
"""

import argparse
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gaternet.errors import first_line

T = TypeVar("T")


def write_atomically(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, put it in `path`'s place; what it gave.

    Raises OSError, with `path` as it was, where the file cannot be written (a full disk, say).
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, name a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # of this thread, on any machine, alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        result = write(temporary)
        temporary.chmod(mode)  # as the umask has it: safetensors makes files that their owner alone can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        return result
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # where there can be no such file, the error is that of writing
            temporary.unlink()


def make_folder(path: Path) -> None:
    """Make a folder that is to be written into, if it is not there; OSError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise OSError(f"{path} is a file, not a folder: name another") from error
    except OSError as error:
        raise OSError(f"cannot write into {path} ({error.strerror}): mend its permissions, or name another") from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """The error to raise where `path` could not be written."""
    return OSError(f"cannot write {path} ({error}): free some space or mend its permissions; what was saved is whole")


def write_json(path: Path, data: Any) -> None:
    """Write plain data to `path`, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(data, indent=2) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """The plain data in `path`; ValueError if it is damaged."""
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): restore it from a copy") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a JSON object: is it a file of gaternet's?")
    return data


@contextmanager
def staged(directory: Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """A folder to fill, whose files then replace those of `directory`, but for the names in `keep` that it has."""
    make_folder(directory)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=directory))
    try:
        yield staging
        for path in staging.iterdir():
            if not (path.name in keep and (directory / path.name).exists()):
                path.replace(directory / path.name)
    finally:
        shutil.rmtree(staging)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write training state (tensors, numbers, strings, and lists and dicts of them), atomically."""

    def write(temporary: Path) -> None:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # so it says that the disk is full
            raise OSError(first_line(error)) from error

    write_atomically(path, write)


def load_tensors(path: Path) -> dict[str, Any]:
    """What a .safetensors file holds, or `torch.save` wrote: tensors and plain data; nothing else is ever unpickled.

    Plain data are also the arguments of a script (argparse.Namespace), which timm's checkpoints hold.

    Raises:
        ValueError: the file is damaged, or holds other Python objects (which could be malicious).
        OSError: it cannot be opened.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's guesses at the origin of a strange pickle
            known = argparse.Namespace in torch.serialization.get_safe_globals()
            with nullcontext() if known else torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects, which are refused because they could run code: "
            "get it from its source again, saved as a state_dict"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): get it from its source again") from error
    except Exception as error:  # on bytes that are no such file, PyTorch's reader raises whatever they lead it to
        raise ValueError(f"{path} is truncated or no PyTorch file: get it from its source again") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} does not hold a dict of named tensors, but a {type(data).__name__}")
    return data
