"""The compiled kernels: what they read, and machines without a compiler."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from random_networks import chain_of
from skipped_networks import THREE, gated, inverted, plan_of, random_gates
from small_networks import IMAGES

import gaternet
from gaternet.skipping.native import NativeProgram


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


def test_native_code_reads_no_closed_filter():
    """Not a number in the weights of closed filters, and of what reads them, reaches the result."""
    model = gated(inverted())
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
