"""Smaller networks for the gates that images have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_networks import LINKS, chain_of
from skipped_networks import KERNELS, THREE, assert_skips_exactly, gated, plan_of, random_gates
from small_networks import IMAGES, Net, conv, seeded
from torch import Tensor

import gaternet
from gaternet.skipping import Skipper, specialise
from gaternet.skipping.engines import make_program
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.specialise import Specialised, prune


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("link", LINKS)
def test_subnetworks_compute_what_masking_computes(link, name):
    model = gated(chain_of([link, "conv alone", link]))
    kept = torch.rand(model.num_gates, generator=seeded(5)) < 0.6
    gates = random_gates(model, 0.7) * kept
    found = make_program(prune(plan_of(model), kept), name)(THREE, gates)
    with torch.no_grad():
        expected = model.forward_gated(THREE, gates)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_each_image_takes_the_smallest_subnetwork_that_covers_it(tmp_path):
    model = gated(chain_of(["residual", "residual with SE", "inverted residual"]))
    third = torch.arange(model.num_gates) < model.num_gates // 3
    few, many = random_gates(model, 0.5, 1, batch=20) * third, random_gates(model, 0.8, 2, batch=20) * ~third
    seen = torch.cat([few, many])
    fast = gaternet.skip(model, IMAGES, "specialise", calibration=seen, subnetworks=2)
    specialised = fast.program
    assert isinstance(specialised, Specialised)
    assert len(specialised.subnetworks) == 2
    assert (specialised.choose(seen) < 2).all()
    gates = torch.stack([seen[0], torch.ones(model.num_gates), torch.zeros(model.num_gates), seen[-1]])
    assert specialised.choose(gates).tolist() == [0, 2, 0, 1]
    images = torch.cat([THREE, THREE[:1]])
    with torch.no_grad():
        torch.testing.assert_close(fast.forward_gated(images, gates), model.forward_gated(images, gates))
    fast.save(tmp_path)
    loaded = Skipper.load(tmp_path)
    assert torch.equal(loaded.forward_gated(images, gates), fast.forward_gated(images, gates))
    pruned = specialised.subnetworks[0]
    assert isinstance(pruned, NativeProgram)
    assert pruned.weight_bytes < plan_of(model).weight_bytes


def test_specialise_needs_gates_and_engines_have_names(unchecked_types):
    model = gated(chain_of(["residual"]))
    with pytest.raises(ValueError, match="specialise needs gates to fit: pass calibration="):
        gaternet.skip(model, IMAGES, "specialise")
    for calibration in (torch.ones(3, 1), torch.ones(0, model.num_gates), torch.ones(model.num_gates)):
        with pytest.raises(ValueError, match=rf"calibration must be gates \(images, {model.num_gates}\)"):
            gaternet.skip(model, IMAGES, "specialise", calibration=calibration)
    with pytest.raises(ValueError, match="subnetworks must be at least 1, not 0"):
        gaternet.skip(model, IMAGES, "specialise", calibration=torch.ones(3, model.num_gates), subnetworks=0)
    with pytest.raises(ValueError, match="there is no engine 'fast': choose of auto, slice, specialise, mask"):
        gaternet.skip(model, IMAGES, "fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="there are no kernels 'fast': choose of auto, native, triton, torch"):
        gaternet.skip(model, IMAGES, "slice", kernels="fast")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", KERNELS)
def test_a_sum_with_a_scaled_branch_is_exact_in_subnetworks_too(name):
    """The shortcut comes first, and is what the sum is done in; a subnetwork holds it without its closed channels."""

    def body(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        branch, shortcut = net.branch(x), net.shortcut(x)
        return (branch * net.weigh(branch.mean((2, 3), keepdim=True)).sigmoid() + shortcut).relu()

    parts = {"stem": conv(3, 8), "branch": conv(8, 8), "shortcut": conv(8, 8, 1), "weigh": conv(8, 8, 1)}
    model = gated(Net(body, **parts))
    gates = random_gates(model, 0.5)
    assert_skips_exactly(model, THREE, gates)
    kept = gates.bool().any(0)
    with torch.no_grad():
        found = make_program(prune(plan_of(model), kept), name)(THREE, gates)
        torch.testing.assert_close(found, model.forward_gated(THREE, gates))


@pytest.mark.parametrize("name", KERNELS)
def test_a_convolution_that_adds_in_place_reads_what_its_subnetwork_holds(name):
    """Its own filters have no gates, and those that it reads are fewer in a subnetwork."""

    def body(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        x = x + net.two(net.one(x).relu())
        return x + net.four(net.three(x).relu())

    parts = {"one": conv(8, 24), "two": conv(24, 8), "three": conv(8, 24), "four": conv(24, 8)}
    model = gated(Net(body, stem=conv(3, 8), **parts), sites=lambda name, module: name in ("one", "three"))
    kept = torch.rand(model.num_gates, generator=seeded(5)) < 0.5
    gates, plan = random_gates(model, 0.7) * kept, prune(plan_of(model), kept)
    assert any(step.adds is not None and step.held for step in plan.steps)
    with torch.no_grad():
        torch.testing.assert_close(make_program(plan, name)(THREE, gates), model.forward_gated(THREE, gates))


def test_subnetworks_are_tried_beside_the_model(monkeypatch):
    model = gated(chain_of(["residual"]))
    calibration = random_gates(model, 0.5)
    gaternet.skip(model, IMAGES, "specialise", calibration=calibration)
    pruned = specialise._pruned
    monkeypatch.setattr(specialise, "_pruned", lambda spec, *rest: replace(p := pruned(spec, *rest), weight=-p.weight))
    with pytest.raises(ValueError, match="the backbone computes something else than its plan"):
        gaternet.skip(model, IMAGES, "specialise", calibration=calibration)


def test_calibration_takes_hard_gates_alone():
    model = gated(chain_of(["residual"]))
    with pytest.raises(ValueError, match="calibration must be gates that are 0 or 1"):
        gaternet.skip(model, IMAGES, "specialise", calibration=torch.full((4, model.num_gates), 0.3))
