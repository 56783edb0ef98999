"""The machine under a run: Accelerate, precision, seeds, signals, a GPU for several processes, TensorBoard."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import Tensor

from gaternet.provenance import processor
from gaternet.recipe import Runtime

PARENT = "GATERNET_PARENT"  # names the process that started a run, and without which it is not to go on
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def make_accelerator(runtime: Runtime) -> Accelerator:
    """Accelerate's view of this machine and of the other processes, with the precision of `runtime`.

    Raises:
        ValueError: the precision is fp16 and there is no GPU.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    AcceleratorState._reset_state(alone)  # a second run in one process may have another precision, or device
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if _has_fast_bf16(runtime.cpu) else "no"
    cpu = runtime.cpu or not torch.accelerator.is_available()  # said outright, or torchrun's processes would not meet
    pinned = torch.cuda.is_available() and not cpu  # as the loader's batches are: their copies need no waiting
    loading = DataLoaderConfiguration(even_batches=False, non_blocking=pinned)  # no image twice
    whole = GradientAccumulationPlugin(num_steps=1)  # or the environment might say by what gradients are divided
    accelerator = Accelerator(
        mixed_precision=precision, cpu=cpu, dataloader_config=loading, gradient_accumulation_plugin=whole
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU, for its gradients must be scaled: use --precision bf16 or no")
    return accelerator


@contextmanager
def accelerate_restored() -> Iterator[None]:
    """What Accelerate knows of the whole process, such as its precision, is afterwards what the caller's made it."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    states = [AcceleratorState, GradientState, *([PartialState] if alone else [])]  # processes that met stay together
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        for state, known in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(known)


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the generators that a training step on `device` draws from."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _has_fast_bf16(cpu: bool) -> bool:
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available() and not cpu:
        return False
    # Intel's bf16 products without AMX are no faster than its float32 ones, AMD's are
    slow = "Intel" in processor()
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not slow)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms on each new size of a convolution, and keeps the fastest; what was set comes back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """The environment of processes whose kernels are to run side by side on the one GPU that this process sees.

    Without NVIDIA's Multi-Process Service (MPS) they take turns, and nothing is gained. It is started, and ended; where
    it is not installed, does not work, or seems to run already, the environment is empty.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    runs = "CUDA_MPS_PIPE_DIRECTORY" in os.environ or Path("/tmp/nvidia-mps/control").exists()
    if control is None or runs:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="gaternet-mps-", ignore_cleanup_errors=True) as folder:
        service = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = dict(service)
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = "0"  # its processes count from the first that the service sees
        try:
            works = _runs([control, "-d"], service) and _runs([sys.executable, "-c", _USE_GPU], environment)
            yield environment if works else {}
        finally:
            _runs([control], service, b"quit\n")


_USE_GPU = "import torch; torch.ones(1, device='cuda').item()"


def _runs(command: list[str], environment: Mapping[str, str], said: bytes = b"") -> bool:
    """Whether a command ends well, in a session of its own, so that Ctrl-C does not reach it."""
    try:
        ended = subprocess.run(
            command,
            env={**os.environ, **environment},
            input=said,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Notes SIGINT, SIGTERM and SIGHUP, so that the loop can end between two steps; a second Ctrl-C ends it at once.

    A second SIGTERM does not: job managers and launchers each send theirs. SIGHUP comes when a terminal closes, but
    not under nohup.
    """
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        if received and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        received.append(signum)

    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has none
        signals.append(signal.SIGHUP)
    try:
        before = {signum: signal.signal(signum, note) for signum in signals}
    except ValueError:  # not in the main thread: signals are the program's own business
        before = {}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_with_parent() -> None:
    """Let this process be told to stop when the one that `PARENT` names is gone, however that ended; on Linux alone."""
    parent = os.environ.get(PARENT)
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # already
            os.kill(os.getpid(), signal.SIGTERM)


def should_stop(received: list[int], accelerator: Accelerator, sync: bool) -> bool:
    """Whether to stop; several processes agree on it where `sync` is set, in the same step all of them."""
    if accelerator.num_processes == 1:
        return bool(received)
    if not sync:
        return False
    flags = accelerator.reduce(torch.tensor(float(len(received)), device=accelerator.device), "sum")
    assert isinstance(flags, Tensor)
    return flags.item() > 0


@contextmanager
def tensorboard(directory: Path | None, step: int) -> Iterator[Any]:
    """A SummaryWriter into `directory`, continuing after `step`; None where there is no directory."""
    if directory is None:
        yield None
        return
    with import_tensorboard()(directory / "tensorboard", purge_step=step + 1) as writer:
        yield writer


def import_tensorboard() -> Any:
    """SummaryWriter; ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ValueError("TensorBoard is not installed: pip install tensorboard") from error
    return SummaryWriter
