"""What carries out a plan here: native code, Triton's kernels or PyTorch's; and the timing of engines for "auto"."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from gaternet.skipping.kernels import Kernels
from gaternet.skipping.native import NativeProgram, NativeUnavailableError
from gaternet.skipping.plan import Plan
from gaternet.skipping.program import Program

KernelName = Literal["auto", "native", "triton", "torch"]
_TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_SECONDS = 0.3  # for which each engine is timed
Backbone = Callable[[Tensor, Tensor], Tensor]  # images (B, channels, H, W), gates (B, C) -> logits (B, K)


def make_program(plan: Plan, kernels: KernelName = "auto") -> Program | NativeProgram:
    """What carries out a plan.

    Args:
        plan: of a network.
        kernels: "native", compiled C++ for CPUs; "triton" for CUDA; "torch" for any device, slowly. "auto" takes the
            fast ones where they run, and warns where they should and do not.

    Raises:
        NativeUnavailableError: `kernels` is "native", and there is no C++ compiler, or the plan is not for the CPU.
        ValueError: there are no such kernels, or they are "triton", and Triton is not installed or not for the plan.
    """
    if kernels not in get_args(KernelName):
        raise ValueError(f"there are no kernels {kernels!r}: choose of {', '.join(get_args(KernelName))}")
    for_triton = plan.device.type == "cuda" and plan.dtype in _TRITON_TYPES
    if kernels == "triton" and not for_triton:
        raise ValueError(
            f"Triton's kernels are for float32, float16 and bfloat16 on CUDA, but the weights are {plan.dtype} on "
            f"{plan.device}: choose other kernels"
        )
    if kernels == "torch":
        return Program(plan, Kernels)
    if kernels == "triton" or (kernels == "auto" and for_triton):
        try:
            from gaternet.skipping.triton_kernels import TritonKernels
        except ImportError as error:
            if kernels == "triton":
                raise ValueError("Triton is not installed: pip install triton, or choose other kernels") from error
            warnings.warn("filters are skipped slowly, for Triton is not installed: pip install triton", stacklevel=3)
            return Program(plan, Kernels)
        return Program(plan, TritonKernels)
    try:
        return NativeProgram(plan)
    except NativeUnavailableError as error:
        if kernels == "native":
            raise
        if plan.device.type == "cpu" and plan.dtype == torch.float32:
            warnings.warn(f"filters are skipped slowly: {error}", stacklevel=3)
        return Program(plan, Kernels)


def time_engines(engines: Mapping[str, Backbone], images: Tensor, gates: Tensor) -> dict[str, float]:
    """Median seconds of each engine for a batch; each runs for `_SECONDS`, and at least three times after a first."""

    def once(engine: Backbone) -> float:
        began = time.perf_counter()
        engine(images, gates)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    medians = {}
    for name, engine in engines.items():
        once(engine)
        times: list[float] = []
        while len(times) < 3 or sum(times) < _SECONDS:
            times.append(once(engine))
        medians[name] = statistics.median(times)
    return medians
