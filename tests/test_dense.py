"""Dense engines compute what the plain network computes."""

import warnings
from typing import Any

import pytest
import torch
from random_networks import chain_of
from skipped_networks import gated
from small_networks import IMAGES

from gaternet.skipping.bench import Timing, bench, over, spread, time_interleaved
from gaternet.skipping.dense import build_dense

NEEDS = {"onnxruntime": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}


@pytest.mark.parametrize("name", ["eager", "channels_last", "inductor", "onnxruntime", "openvino"])
def test_engines_compute_the_same(name, unchecked_types):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'gaternet[engines]'")
    network = chain_of(["residual"]).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the engines' own
        found = build_dense(network, IMAGES, name)(IMAGES)
        torch.testing.assert_close(found, network(IMAGES))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_of_the_cpu_refuse_other_devices(name):
    with pytest.raises(ValueError, match=f"{name} runs on the CPU only here: move the network"):
        build_dense(chain_of(["residual"]), IMAGES.to("meta"), name)


def test_engines_that_cannot_run_here_are_left_out(monkeypatch):
    def build(network: torch.nn.Module, images: torch.Tensor, name: str) -> Any:
        if name == "inductor":
            raise RuntimeError("there is no compiler\nand more")
        return build_dense(network, images, name)

    monkeypatch.setattr("gaternet.skipping.bench.build_dense", build)
    notes: list[str] = []
    found = bench(gated(chain_of(["residual"])), IMAGES, (1.0,), ["inductor", "eager"], None, 1, 0.001, notes.append)
    assert [timing.name for timing in found] == ["dense: eager", "masked", "skipped", "gater"]
    assert notes == ["inductor cannot run here: there is no compiler"]


def test_a_network_is_compiled_for_the_size_of_each_batch(monkeypatch, unchecked_types):
    """Also behind others: open sizes may be slower."""
    sizes = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append([node.meta["example_value"].shape[0] for node in graph.graph.nodes if node.name.endswith("_x_")])
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile_(network, backend=backend, **options))
    network = chain_of(["residual"]).eval()
    for images in (IMAGES[:1], IMAGES, torch.cat([IMAGES, IMAGES])):
        build_dense(network, images, "inductor")
    assert [type(size) for found in sizes for size in found] == [int] * 3


def test_functions_take_turns():
    seen: list[str] = []
    times = time_interleaved({name: lambda n=name: seen.append(n) for name in "ab"}, rounds=3, seconds=0.001)
    turns = [name for name, before in zip(seen, [None, *seen[:-1]], strict=True) if name != before]
    assert len(turns) >= 4
    assert all(len(found) == 3 and min(map(min, found)) >= 0 for found in times.values())


def test_every_density_asked_for_has_rows_of_its_own():
    """Also those that come to the same gates."""
    model = gated(chain_of(["residual"]))
    found = bench(model, IMAGES, (1.0, 1.0, 0.5), ["eager"], rounds=1, seconds=0.001)
    names = [timing.name for timing in found]
    assert names == ["dense: eager", *["masked", "skipped"] * 3, "gater"]
    assert [timing.density for timing in found[:5]] == [None, 1, 1, 1, 1]
    assert all(timing.density != 1 and timing.macs < found[0].macs for timing in found[5:7])
    assert found[0].over_dense == 1


def test_ratios_and_spreads_are_of_what_was_timed():
    assert over([[2.0, 4.0, 100.0], [6.0], [9.0, 9.0]], [[1.0, 1.0, 1.0], [2.0], [9.0, 9.0]]) == 3
    assert spread([[0.001, 0.003], [0.002]]) == pytest.approx((2, 1.2, 2.8))
    assert Timing("x", 16, None, 0.0, 2.0, 2.0, 2.0, None).images_per_second == 8000


def test_what_runs_to_warm_up_is_not_timed():
    calls = []
    times = time_interleaved({"a": lambda: calls.append(0)}, rounds=2, seconds=0.01)
    assert 2 <= sum(map(len, times["a"])) <= len(calls) - 2  # one call in each turn at least is for warming up
