"""The C++ library: compiled on first use with the machine's compiler, and kept in the user's cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from gaternet.files import write_atomically

_NAMES = ("program.cpp", "convolution.h", "depthwise.h", "functions.h", "vectors.h")
_SOURCES = [Path(__file__).with_name(name) for name in _NAMES]
# What an operation does, and the activation functions: C++ numbers them by these lists, too.
KINDS: list[str] = [
    "conv",
    "depthwise",
    "add",
    "add_open",
    "expand",
    "compress",
    "max_pool",
    "average_pool",
    "mean",
    "pointwise",
    "scale",
    "copy",
    "cat",
    "subsample",
    "pad",
    "zeros",
    "relu_closed",
]
FUNCTIONS: list[str] = ["identity", "relu", "relu6", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu"]
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"]
_FLAGS += [f"-D{name}={','.join(names).upper()}" for name, names in (("KINDS", KINDS), ("FUNCTIONS", FUNCTIONS))]
ADDS_TO_VALUE, ADDS_TO_ZEROS = 1, 2
_LOCK = threading.Lock()
_FAILED: dict[str, str] = {}  # the libraries that a compiler has failed to make in this process, and why


class NativeUnavailableError(RuntimeError):
    """There is no native code for this here; the message says why."""


def _numbers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_int64) for name in names)


class Conv(ctypes.Structure):
    """`Conv` of convolution.h."""

    _fields_ = (
        *_numbers("height", "width", "out_height", "out_width", "channels", "filters"),
        *_numbers("kernel_height", "kernel_width", "stride_height", "stride_width", "pad_height", "pad_width"),
        *_numbers("dilation_height", "dilation_width", "groups", "offset"),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Op(ctypes.Structure):
    """`Op` of program.cpp."""

    _fields_ = (
        *_numbers("kind", "function", "source", "other", "target", "reads", "writes", "adds"),
        ("shape", Conv),
    )


class Value(ctypes.Structure):
    """`Value` of program.cpp."""

    _fields_ = (("data", ctypes.c_void_p), *_numbers("step", "room"))


class Live(ctypes.Structure):
    """`Live` of program.cpp."""

    _fields_ = (
        ("offsets", ctypes.c_void_p),
        *_numbers("patterns"),
        ("numbers", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    )


def load_library() -> Any:
    """The compiled library; threads wait for the first that compiles it.

    Raises:
        NativeUnavailableError: it cannot be compiled here.
    """
    with _LOCK:
        return _load()


@functools.cache
def _load() -> Any:
    if sys.platform == "win32":
        raise NativeUnavailableError("native code needs a Unix-like system")
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailableError("native code needs a C++ compiler: install g++ or clang++, or set CXX")
    key = [*(source.read_text() for source in _SOURCES), compiler, *_FLAGS, _processor()]
    name = f"native-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.so"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaternet" / name
    with suppress(OSError):  # not compiled yet, or no home that code runs from
        return _declared(ctypes.CDLL(str(path)))
    if name in _FAILED:
        raise NativeUnavailableError(_FAILED[name])
    with tempfile.TemporaryDirectory(prefix="gaternet-") as folder:
        built = Path(folder) / name
        _compile(compiler, built)
        try:
            write_atomically(path, lambda temporary: shutil.copy(built, temporary))
            return _declared(ctypes.CDLL(str(path)))
        except OSError as error:
            not_kept = error
        try:
            library = _declared(ctypes.CDLL(str(built)))
        except OSError as error:
            raise NativeUnavailableError(
                f"native code cannot be run from {path.parent} or {folder}: {error}"
            ) from error
    warnings.warn(
        f"native code cannot be kept in {path.parent} ({not_kept}), so that each process compiles it anew: set "
        "XDG_CACHE_HOME to a folder that can be written and run from",
        stacklevel=2,
    )
    return library


def _compile(compiler: str, path: Path) -> None:
    done = subprocess.run([compiler, *_FLAGS, str(_SOURCES[0]), "-o", str(path)], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        _FAILED[path.name] = f"{compiler} cannot compile the native code: {reason}"
        raise NativeUnavailableError(_FAILED[path.name])


def _declared(library: Any) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.half_lanes.restype = library.panel_lanes.restype = library.size_of.restype = number
    for place, twin in enumerate((Conv, Op, Value, Live)):
        assert library.size_of(place) == ctypes.sizeof(twin), f"{twin.__name__} has other fields in C++"
    library.pack_weights.argtypes = [pointer, number, number, number, number, pointer]
    library.unpack_weights.argtypes = [pointer, number, number, number, number, pointer]
    library.open_channels.argtypes = [pointer, number, number, pointer, pointer, number, pointer, pointer]
    library.run.argtypes = [pointer, number, pointer, number, pointer, pointer, number, number, number]
    for name in ("pack_weights", "unpack_weights", "open_channels", "run"):
        getattr(library, name).restype = None
    return library


def _processor() -> str:
    """What the processor can do: code compiled for one must not run on another that shares the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(found)) or platform.platform() + platform.processor()
