"""The compiled kernels: what they read, and machines without a compiler."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from random_networks import chain_of
from skipped_networks import THREE, assert_skips_exactly, gated, inverted, plan_of, random_gates
from small_networks import IMAGES, Net, conv, norm
from torch import nn

import gaternet
from gaternet.skipping.native import NativeProgram, library


def test_threads_change_no_bit():
    model = gated(chain_of(["residual", "inverted residual", "residual with SE"]))
    program, gates, threads = NativeProgram(plan_of(model)), random_gates(model, 0.5), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(program(THREE, gates))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def grouped(groups: int, channels: int, filters: int, **options: Any) -> Net:
    """A convolution in groups of so many channels and filters, between two that are whole."""
    return Net(
        lambda net, x: net.last(net.grouped(net.first(x)).relu()),
        first=nn.Sequential(conv(3, groups * channels), norm(groups * channels), nn.ReLU()),
        grouped=conv(groups * channels, groups * filters, groups=groups, **options),
        last=conv(groups * filters, 8),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "channels", "filters"), [(2, 9, 40), (3, 1, 2), (4, 4, 4), (8, 3, 17)])
def test_grouped_convolutions_skip_within_each_group(groups, channels, filters, bias):
    """Also where a group has nothing open, and where threads share a group, or the groups."""
    model, threads = gated(grouped(groups, channels, filters, bias=bias, stride=2)), torch.get_num_threads()
    program = NativeProgram(plan_of(model))
    try:
        for density in (0.0, 0.2, 0.6, 1.0):
            gates = random_gates(model, density)
            assert_skips_exactly(model, THREE, gates)
            for images in (THREE[:1], THREE):  # of one, all threads work on the same image
                results = []
                for count in (1, 2, 3, 5):
                    torch.set_num_threads(count)
                    results.append(program(images, gates[: len(images)]))
                assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("network", [inverted, lambda: grouped(4, 4, 6)])
def test_native_code_reads_no_closed_filter(network):
    """Not a number in the weights of closed filters, and of what reads them, reaches the result."""
    model = gated(network())
    gates, plan = random_gates(model, 0.5, batch=1), plan_of(model)
    expected = NativeProgram(plan)(IMAGES[:1], gates)
    sites = {site.conv: gates[0, site.start : site.stop] == 0 for site in model.sites}
    for step in plan.steps:
        if step.conv is not None and step.conv.name in sites:
            step.conv.weight[sites[step.conv.name]] = torch.nan
            if step.conv.bias is not None:
                step.conv.bias[sites[step.conv.name]] = torch.nan
    assert torch.equal(NativeProgram(plan)(IMAGES[:1], gates), expected)


def test_without_a_compiler_it_is_slow_and_says_so(monkeypatch, tmp_path):
    from gaternet.skipping.native import library

    model = gated(chain_of(["residual"]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"skipped slowly: native code needs a C\+\+ compiler: install g\+\+"):
            fast = gaternet.skip(model, IMAGES, "slice")
        with pytest.raises(library.NativeUnavailableError):
            gaternet.skip(model, IMAGES, "slice", kernels="native")
    finally:
        library._load.cache_clear()
    with torch.no_grad():
        torch.testing.assert_close(fast(IMAGES), model(IMAGES))


def test_native_code_that_cannot_be_kept_is_compiled_for_now(monkeypatch, tmp_path):
    from gaternet.skipping.native import library

    def refuse(path, write):
        raise OSError("read-only")

    monkeypatch.setattr(library, "write_atomically", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"cannot be kept in .*gaternet \(read-only\), .* set XDG_CACHE_HOME"):
            assert library.load_library().half_lanes() > 0
        assert not any(tmp_path.rglob("*.so"))
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        library._load.cache_clear()
        assert library.load_library().half_lanes() > 0
        assert len(list(tmp_path.rglob("*.so"))) == 1
    finally:
        library._load.cache_clear()


def test_a_compiler_that_fails_is_asked_once(monkeypatch, tmp_path):
    """And not at all for weights that native code is not for."""
    from gaternet.skipping.native import library

    calls = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho >> {calls}\necho an error >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    model = gated(chain_of(["residual"]))
    try:
        with pytest.raises(library.NativeUnavailableError, match="for float32 weights"):
            NativeProgram(plan_of(copy.deepcopy(model).double(), IMAGES.double()))
        assert not calls.exists()
        for _ in range(2):
            with pytest.raises(library.NativeUnavailableError, match="cannot compile the native code: an error"):
                NativeProgram(plan_of(model))
        assert calls.read_text() == "\n"
    finally:
        library._load.cache_clear()


def test_one_thread_compiles_at_a_time(monkeypatch, tmp_path):
    from gaternet.skipping.native import library

    inside: list[Path] = []

    def compile_slowly(compiler: str, path: Path) -> None:
        inside.append(path)
        time.sleep(0.1)
        found = len(inside)
        inside.remove(path)
        raise library.NativeUnavailableError(f"{found} at a time")

    monkeypatch.setattr(library, "_compile", compile_slowly)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    with ThreadPoolExecutor(3) as pool:
        for waiting in [pool.submit(library.load_library) for _ in range(3)]:
            with pytest.raises(library.NativeUnavailableError, match="1 at a time"):
                waiting.result()


def test_a_library_is_compiled_anew_for_other_sources_or_another_processor(monkeypatch, tmp_path):
    names = []

    def fail(compiler: str, path: Path) -> None:
        names.append(path.name)
        raise library.NativeUnavailableError("not now")

    monkeypatch.setattr(library, "_compile", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "program.cpp"
    source.write_text("// another version")
    for changes in ({}, {"_processor": lambda: "another"}, {"_SOURCES": [source]}):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(library, name, value)
            library._load.cache_clear()
            with pytest.raises(library.NativeUnavailableError):
                library.load_library()
    library._load.cache_clear()
    assert len(set(names)) == 3
