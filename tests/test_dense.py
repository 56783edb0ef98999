"""Dense engines compute what the plain network computes."""

import warnings

import pytest
import torch
from random_networks import chain_of
from skipped_networks import gated
from small_networks import IMAGES

from gaternet.skipping.bench import bench, time_interleaved
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
