"""Triton's kernels compute what the plain ones compute: in Triton's interpreter, and on a GPU where there is one."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from random_networks import chain_of
from skipped_networks import THREE, gated, plan_of, random_gates
from small_networks import IMAGES, seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gaternet
from gaternet import skipping
from gaternet.skipping.engines import make_program
from gaternet.skipping.kernels import MULTIPLE, Kernels, Live
from gaternet.skipping.plan import DENSE, ConvSpec, Plan, Step
from gaternet.skipping.program import Program

pytest.importorskip("triton", reason="there is no Triton for this system")
NAME = "gaternet.skipping.triton_kernels"


def imported_anew(patch: pytest.MonkeyPatch) -> ModuleType:
    """The module, in a copy that is forgotten when the patch ends."""
    patch.setitem(sys.modules, NAME, skipping)
    patch.setattr(skipping, "triton_kernels", None, raising=False)
    del sys.modules[NAME]
    return importlib.import_module(NAME)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The module as it is where TRITON_INTERPRET is set, which counts when a kernel is defined.

    Triton itself is imported without, as elsewhere in this process: the kernels call none of its functions that are
    kernels themselves, such as tl.zeros and tl.sum.
    """
    from triton.runtime import interpreter

    builder, tl = interpreter.interpreter_builder, interpreter.tl
    dot = builder.create_dot

    def widened(a: Any, b: Any, *rest: Any) -> Any:  # the interpreter (3.9) multiplies bfloat16's bits as integers
        return dot(*(builder.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = imported_anew(patch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", widened)
        yield module


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def triton_kernels(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module for the device. What it leaves unwritten is not a number: nothing may read it."""
    module = request.getfixturevalue("interpreted") if device == "cpu" else importlib.import_module(NAME)
    empty = module._empty
    monkeypatch.setattr(module, "_empty", lambda *size: empty(*size).fill_(torch.nan))
    return module


@dataclass
class Case:
    """A convolution between two patterns: that of its channels, 0, and that of its filters, 1; either may be dense."""

    channels: int = 20
    filters: int = 13
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (9, 7)
    bias: bool = True
    depthwise: bool = False

    def plan(self, reads: int, filters: int, device: str, dtype: torch.dtype) -> Plan:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=seeded(1)).to(device, dtype)

        first = ConvSpec("first", random(self.channels, 3, 1, 1), None, (1, 1), (0, 0), (1, 1), 1)
        weight = random(self.filters, 1 if self.depthwise else self.channels, *self.kernel)
        groups = self.filters if self.depthwise else 1
        bias = random(self.filters) if self.bias else None
        second = ConvSpec("second", weight, bias, self.stride, self.padding, self.dilation, groups)
        gates = torch.arange(self.channels + self.filters)
        return Plan(
            input="images",
            output="y",
            input_shape=(3, *self.size),
            num_gates=len(gates),
            steps=[
                Step("conv", "x", ["images"], reads, reads, conv=first),
                Step("conv", "y", ["x"], filters, filters, conv=second),
            ],
            shapes={},
            patterns=list(gates.split([self.channels, self.filters])),
            constants={},
        )


CASES = {
    "1x1": Case(kernel=(1, 1), padding=(0, 0)),
    "1x1, stride": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2), bias=False),
    "3x3": Case(),
    "3x3, stride": Case(stride=(2, 2)),
    "3x3, dilation": Case(dilation=(2, 2), padding=(2, 2), bias=False),
    "all unlike": Case(kernel=(2, 5), stride=(3, 2), padding=(1, 3), dilation=(2, 1), size=(10, 12)),
    "no padding": Case(padding=(0, 0)),
    "one pixel": Case(kernel=(1, 1), padding=(0, 0), size=(1, 1)),
    "one channel, one filter": Case(channels=1, filters=1),
    "several tiles of each": Case(channels=70, filters=83, kernel=(1, 2), padding=(0, 1), size=(9, 10)),
    "multiples of 16": Case(channels=32, filters=48, bias=False),
}
PATTERNS = {"compact to compact": (0, 1), "dense to compact": (DENSE, 1), "compact to dense": (0, DENSE)}


def gates_for(plan: Plan) -> Tensor:
    """Of three images: about half of them, none, all."""
    gates = (torch.rand(3, plan.num_gates, generator=seeded(3)) < 0.5).float()
    gates[1], gates[2] = 0, 1
    return gates.to(plan.device)


def compact(oracle: Kernels, pattern: int, live: Live, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Random values; fillers that may be read are large, and the others are not numbers."""
    x = torch.randn(3, oracle.sizes[pattern], *size, generator=seeded(2)).to(oracle.plan.device, dtype)
    x = oracle.compress(x.contiguous(memory_format=torch.channels_last), pattern, live)
    for i, count in enumerate(live.counts[:, pattern].tolist()):
        x[i, count:] = 1000
        x[i, -(-count // MULTIPLE) * MULTIPLE :] = torch.nan
    return x


def assert_open_equal(found: Tensor, expected: Tensor, counts: Tensor | None, rtol: float = 1e-4) -> None:
    """The open channels are as expected, then come zeros up to a multiple of 16, then what is not written."""
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    for i in range(len(found)):
        count = found.shape[1] if counts is None else int(counts[i])
        scale = expected[i, :count].abs().max().item() if count else 1.0
        torch.testing.assert_close(found[i, :count].float(), expected[i, :count].float(), rtol=rtol, atol=rtol * scale)
        filled = -(-count // MULTIPLE) * MULTIPLE
        assert (found[i, count:filled] == 0).all()
        assert found[i, filled:].isnan().all()


def check_convolution(module: ModuleType, case: Case, patterns: str, relu: bool, device: str) -> None:
    reads, filters = PATTERNS[patterns]
    plan = case.plan(reads, filters, device, torch.float32)
    oracle, kernels = Kernels(plan), module.TritonKernels(plan)
    live = oracle.open_channels(gates_for(plan))
    if reads == DENSE:
        x = torch.randn(3, case.channels, *case.size, generator=seeded(2)).to(device)
    else:
        x = compact(oracle, reads, live, case.size, torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = oracle.conv(plan.steps[1], torch.nan_to_num(x), reads, live, relu)
        found = kernels.conv(plan.steps[1], x, reads, live, relu)
    assert_open_equal(found, expected, None if filters == DENSE else live.counts[:, 1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("relu", [False, True])
def test_convolutions(name, patterns, relu, device, triton_kernels):
    check_convolution(triton_kernels, CASES[name], patterns, relu, device)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("patterns", PATTERNS)
def test_convolutions_in_tiles_of_every_size(number, patterns, device, triton_kernels, monkeypatch):
    monkeypatch.setattr(triton_kernels._conv, "configs", [triton_kernels._CONFIGS[number]])
    check_convolution(triton_kernels, CASES["several tiles of each"], patterns, relu=True, device=device)


def test_only_open_tiles_are_multiplied(interpreted, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    case = Case(channels=70, filters=83, kernel=(1, 2), padding=(0, 1), size=(9, 10))
    plan = case.plan(0, 1, "cpu", torch.float32)
    kernels = interpreted.TritonKernels(plan)
    live = kernels.open_channels(gates_for(plan))
    products, dot = [], builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *args: products.append(args) or dot(*args))
    kernels.conv(plan.steps[1], torch.zeros(3, live.room[0], *case.size), 0, live, relu=False)
    tile = interpreted._conv.configs[0].kwargs
    tiles = [
        -(-channels // tile["CHANNELS"]) * -(-filters // tile["FILTERS"]) for channels, filters in live.counts.tolist()
    ]
    assert tiles == [2 * 2, 0, 3 * 3]
    assert len(products) == sum(tiles) * 2 * -(-9 * 11 // tile["PIXELS"])  # two taps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_in_full(dtype, device, triton_kernels):
    """The result is that of full precision on the same numbers, but for its own rounding."""
    plan, exact = (CASES["several tiles of each"].plan(0, 1, device, kind) for kind in (dtype, torch.float32))
    for half, full in zip(plan.steps, exact.steps, strict=True):
        assert half.conv is not None
        assert full.conv is not None
        full.conv.weight.copy_(half.conv.weight)
        if full.conv.bias is not None and half.conv.bias is not None:
            full.conv.bias.copy_(half.conv.bias)
    oracle, kernels = Kernels(exact), triton_kernels.TritonKernels(plan)
    live = oracle.open_channels(gates_for(plan))
    x = compact(oracle, 0, live, (9, 10), torch.float32).to(dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = oracle.conv(exact.steps[1], torch.nan_to_num(x.float()), 0, live, relu=True)
    found = kernels.conv(plan.steps[1], x, 0, live, relu=True)
    assert found.dtype == dtype
    assert_open_equal(found, expected, live.counts[:, 1], torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["3x3", "all unlike", "several tiles of each"])
@pytest.mark.parametrize("relu", [False, True])
def test_depthwise_convolutions(name, relu, device, triton_kernels):
    case = Case(**{**vars(CASES[name]), "channels": CASES[name].filters, "depthwise": True})
    plan = case.plan(1, 1, device, torch.float32)
    oracle, kernels = Kernels(plan), triton_kernels.TritonKernels(plan)
    live = oracle.open_channels(gates_for(plan))
    x = compact(oracle, 1, live, case.size, torch.float32)
    expected = oracle.depthwise(plan.steps[1], x, live, relu)
    assert_open_equal(kernels.depthwise(plan.steps[1], x, live, relu), expected, live.counts[:, 1])


@pytest.mark.parametrize("channels", [1, 13, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moves_between_dense_and_compact_tensors(channels, dtype, device, triton_kernels):
    plan = Case(channels=channels).plan(0, 1, device, dtype)
    oracle, kernels = Kernels(plan), triton_kernels.TritonKernels(plan)
    live = oracle.open_channels(gates_for(plan))
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
    for size in ((9, 7), (1, 1)):
        x = compact(oracle, 0, live, size, dtype)
        dense = torch.randn(3, channels, *size, generator=seeded(4)).to(device, dtype)
        for relu in (False, True):
            for layout in (torch.channels_last, torch.contiguous_format):
                target, expected = (dense.clone(memory_format=layout) for _ in range(2))
                oracle.add_open(expected, x, 0, live, relu)
                assert kernels.add_open(target, x, 0, live, relu) is target
                torch.testing.assert_close(target, expected, rtol=rounding, atol=0)
        assert torch.equal(kernels.expand(x, 0, live), oracle.expand(x, 0, live))
        found, expected = kernels.compress(dense, 0, live), oracle.compress(dense, 0, live)
        for i, count in enumerate(live.counts[:, 0].tolist()):
            assert torch.equal(found[i, :count], expected[i, :count])
            assert (found[i, count:] == 0).all()


def test_not_a_number_stays_so(device, triton_kernels):
    plan = CASES["1x1"].plan(0, 1, device, torch.float32)
    kernels = triton_kernels.TritonKernels(plan)
    live = kernels.open_channels(torch.ones(1, plan.num_gates, device=device))
    x = torch.ones(1, 20, 9, 7, device=device)
    x[0, 4, 2, 3] = torch.nan
    found = kernels.conv(plan.steps[1], x, 0, live, relu=True)
    assert found[0, :, 2, 3].isnan().all()
    assert found.isnan().sum() == 13
    added = kernels.add_open(torch.ones_like(x).contiguous(memory_format=torch.channels_last), x, 0, live, relu=True)
    assert added.isnan().sum() == 1


CHAINS = [
    ["residual", "inverted residual", "residual in place"],
    ["dense", "residual with SE", "max pooling"],
    ["shuffle", "twice", "projection"],
    ["depthwise", "conv alone", "branches", "GroupNorm"],
    ["grouped", "projection"],
]


@pytest.mark.parametrize("names", CHAINS, ids=", ".join)
def test_networks_skip_exactly(names, device, triton_kernels):
    model, images = gated(chain_of(names)).to(device), THREE.to(device)
    program = Program(plan_of(model, images), triton_kernels.TritonKernels)
    for density in (0.0, 0.5, 1.0):
        gates = random_gates(model, density).to(device)
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            expected = model.forward_gated(images, gates)
            found = program(images, gates)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_they_are_for_some_precisions_on_gpus(monkeypatch):
    monkeypatch.setattr(Kernels, "__init__", lambda kernels, plan: None)
    model = gated(chain_of(["residual"]))
    with pytest.raises(ValueError, match=r"for float32, float16 and bfloat16 on CUDA, but .* torch.float32 on cpu"):
        gaternet.skip(model, IMAGES, "slice", kernels="triton")
    plans = {dtype: plan_of(model.to(dtype), IMAGES.to(dtype)) for dtype in (torch.float16, torch.float64)}
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that need not be here
        half, double = (plan.to(torch.device("cuda:0")) for plan in plans.values())
        chosen = [type(make_program(plan).kernels).__name__ for plan in (half, double)]
        assert chosen == ["TritonKernels", "Kernels"]
        with pytest.raises(ValueError, match=r"torch.float64 on cuda:0: choose other kernels"):
            make_program(double, "triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_skips_as_the_model_itself(dtype):
    model = gated(chain_of(["residual", "inverted residual", "dense"])).to("cuda", dtype)
    images = THREE.to("cuda", dtype)
    fast, gates = gaternet.skip(model, images, "slice", kernels="triton"), random_gates(model, 0.5).to("cuda", dtype)
    with torch.no_grad():
        expected = model.forward_gated(images, gates)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05  # cuDNN rounds to TF32
    found = fast.forward_gated(images, gates)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_compile_for_gpus(dtype, monkeypatch, tmp_path):
    """Also where there is none: a driver that only names an H100, and in place of every launch the compilation."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    module, compiled = imported_anew(monkeypatch), []

    def compile_only(kernel: Any, grid: Any, x: Tensor, *args: Any, **options: Any) -> None:
        axes: Any = grid(module._conv.configs[0].kwargs) if callable(grid) else grid
        assert len(axes) == 1  # the others end at 65,535
        made = kernel.warmup(x, *args, grid=(1,), **options, enable_fp_fusion=True)
        compiled.extend(made if isinstance(made, list) else [made])

    h100 = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_launch", compile_only)
    monkeypatch.setattr(module._conv, "configs", module._conv.configs[:1])
    monkeypatch.setattr(driver, "_active", h100)
    model = gated(chain_of(["residual", "depthwise", "dense"])).to(dtype)
    images = IMAGES.to(dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        Program(plan_of(model, images), module.TritonKernels)(images, random_gates(model, 0.5, batch=2).to(dtype))
    assert {kernel.metadata.name for kernel in compiled} == {"_conv", "_spread", "_copy"}
    assert all("ptx" in kernel.asm for kernel in compiled)
    assert any("wgmma" in kernel.asm["ptx"] for kernel in compiled) == (dtype == torch.bfloat16)
