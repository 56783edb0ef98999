"""A Skipper that was saved computes the same, and a file from anywhere does no harm."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_networks import chain_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skipped_networks import KERNELS, THREE, gated, plan_of, random_gates
from small_networks import IMAGES, Net, conv
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gaternet
from gaternet.cost import CostModel
from gaternet.skipping import Skipper
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.native.operations import operation
from gaternet.skipping.plan import Call, ConvSpec, Plan, Ref, Step
from gaternet.skipping.saved import _filled_in, load_plan, save_plan


@pytest.mark.parametrize("name", KERNELS)
def test_saved_and_loaded_it_computes_the_same(name, tmp_path):
    model = gated(
        chain_of(
            ["residual with SE", "inverted residual", "depthwise, two filters a channel", "dense", "shuffle", "windows"]
        )
    )
    fast, gates = gaternet.skip(model, IMAGES, "slice", kernels=name), random_gates(model, 0.5)
    fast.save(tmp_path / "fast")
    for other in KERNELS:
        loaded = Skipper.load(tmp_path / "fast", kernels=other)
        torch.testing.assert_close(loaded(IMAGES), fast(IMAGES))
        assert loaded._hard
        found = loaded.forward_gated(THREE, gates)
        assert torch.equal(found, fast.forward_gated(THREE, gates)) or other != name
        assert str(loaded.plan) == str(fast.plan)


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path):
    model = gated(chain_of(["residual"]))
    with pytest.raises(ValueError, match="the engine mask runs the model itself"):
        gaternet.skip(model, IMAGES, "mask").save(tmp_path)
    gaternet.skip(model, IMAGES, "slice").save(tmp_path)
    (tmp_path / "gater.safetensors").write_bytes(b"no plan")
    with pytest.raises(ValueError, match=r"gater\.safetensors is not a plan"):
        Skipper.load(tmp_path)
    with pytest.raises(OSError, match="config"):
        Skipper.load(tmp_path / "elsewhere")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """The plan in a file, changed by hand."""
    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["plan"])
    tensors = load_file(path)
    change(plan, tensors)
    save_file(tensors, path.with_name("changed"), {"plan": json.dumps(plan)})
    return path.with_name("changed")


NOT_FOR_FILES = ["__class__.mro", "copy_.default", "relu.out", "from_file.default", "_sparse_coo_tensor_unsafe.default"]
# The process dies of these where their indices, or numbers, are of the wrong kind.
NOT_FOR_FILES += ["max_pool2d_with_indices_backward.default", "segment_reduce.default", "div.Tensor_mode"]
NOT_FOR_FILES += ["mul.left_t"]  # makes a list as long as the file says


@pytest.mark.parametrize("name", NOT_FOR_FILES)
def test_a_file_cannot_call_what_does_more_than_compute(name, tmp_path):
    save_plan(plan_of(gated(chain_of(["windows"]))), tmp_path / "plan")

    def rename(plan, tensors):
        next(step for step in plan["steps"] if step["call"])["call"][0] = name

    with pytest.raises(ValueError, match="none of PyTorch's that a plan may hold"):
        load_plan(rewritten(tmp_path / "plan", rename))


def test_attention_does_not_read_beyond_its_keys():
    call = Call(torch.ops.aten.scaled_dot_product_attention.default, [Ref("q"), Ref("k"), Ref("v")], {})
    values = {name: torch.rand(1, 2, count, 8) for name, count in (("q", 4), ("k", 5), ("v", 6))}
    with pytest.raises(ValueError, match="as many keys as values, but has 5 and 6"):
        call(values)


def first(plan, kind):
    return next(step for step in plan["steps"] if step["kind"] == kind)


def renamed(plan, old, new):
    plan.update(json.loads(json.dumps(plan).replace(f'"{old}"', f'"{new}"')))


def over_the_images(plan, tensors):
    """The first convolution, with as many filters as the images have channels, adds to them."""
    step = first(plan, "conv")
    for name in (f"weight.{step['out']}", f"bias.{step['out']}"):
        if name in tensors:
            tensors[name] = tensors[name][:3].clone()
    step.update(sources=[plan["input"]] * 2, adds=plan["input"], pattern=-1, filters=-1, mask=None)
    plan.update(steps=[step], output=step["out"])
    plan["shapes"][step["out"]] = [3, 8, 8]


def in_groups(plan, tensors, step):
    weight = f"weight.{step['out']}"
    tensors[weight] = tensors[weight][:, : tensors[weight].shape[1] // 2].clone()
    step["conv"]["groups"] = 2


def dense_groups(plan, tensors):
    """A convolution in two groups, whose filters have gates, is said to make a dense value."""
    step = next(step for step in plan["steps"] if step["filters"] != -1 and step["sources"] != [plan["input"]])
    in_groups(plan, tensors, step)
    step["pattern"] = -1


LIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "larger values": lambda plan, tensors: plan["shapes"].update({first(plan, "conv")["out"]: [8, 800, 800]}),
    "larger images": lambda plan, tensors: plan["shapes"].update({plan["input"]: [3, 800, 800]}),
    "another size of images": lambda plan, tensors: plan.update(input_shape=[3, 4, 4]),
    "images of negative size": lambda plan, tensors: [
        plan.update(input_shape=[3, -8, 8]),
        plan["shapes"].update({plan["input"]: [3, -8, 8]}),
    ],
    "no source": lambda plan, tensors: [
        tensors.update({"constant.large": torch.zeros(1, *plan["shapes"][first(plan, "add")["out"]])}),
        first(plan, "add").update(kind="keep", sources=[], call=["relu.default", [{"ref": "large"}], {"dict": {}}]),
    ],
    "no such source": lambda plan, tensors: first(plan, "conv").update(sources=["nothing"]),
    "a constant with a value's name": lambda plan, tensors: tensors.update(
        {f"constant.{plan['output']}": torch.ones(1)}
    ),
    "a value twice": lambda plan, tensors: first(plan, "add").update(out=first(plan, "conv")["out"]),
    "strides": lambda plan, tensors: first(plan, "conv")["conv"].update(stride=[3, 3]),
    "no stride": lambda plan, tensors: first(plan, "conv")["conv"].update(stride=[0, 0]),
    "negative padding": lambda plan, tensors: [
        first(plan, "conv")["conv"].update(padding=[-1, -1]),
        plan.update(steps=[first(plan, "conv")], output=first(plan, "conv")["out"]),
        plan["shapes"].update({plan["output"]: [8, 4, 4]}),
    ],
    "no dilation": lambda plan, tensors: first(plan, "conv")["conv"].update(dilation=[0, 0], padding=[0, 0]),
    "all below 0": lambda plan, tensors: first(plan, "conv")["conv"].update(dilation=[-1, -1], padding=[-1, -1]),
    "weights held": lambda plan, tensors: first(plan, "conv").update(held=True),
    "no such pattern": lambda plan, tensors: first(plan, "conv").update(filters=99),
    "no such gate": lambda plan, tensors: tensors["pattern.0"].fill_(plan["num_gates"]),
    "a short pattern": lambda plan, tensors: tensors.update({"pattern.0": tensors["pattern.0"][:1].clone()}),
    "a mask of no gates": lambda plan, tensors: first(plan, "conv").update(mask=[9999] * 8),
    "a short bias": lambda plan, tensors: [
        tensors.update({k: v[:1].clone()}) for k, v in tensors.items() if "bias" in k
    ],
    "half a bias": lambda plan, tensors: [tensors.update({k: v.half()}) for k, v in tensors.items() if "bias" in k],
    "one stride for both sides": lambda plan, tensors: first(plan, "conv")["conv"].update(stride=[1]),
    "a name of the program's own": lambda plan, tensors: renamed(plan, plan["output"], "added.mask"),
    "another pattern than its sources'": lambda plan, tensors: first(plan, "add").update(pattern=0),
    "no output": lambda plan, tensors: plan.update(output="nothing"),
    "no convolution": lambda plan, tensors: first(plan, "conv").update(conv=None),
    "a sum with a call": lambda plan, tensors: first(plan, "add").update(call=["relu.default", [], {"dict": {}}]),
    "a word for a condition": lambda plan, tensors: first(plan, "conv").update(relu="x"),
    "a number for a list": lambda plan, tensors: first(plan, "conv").update(free=3),
    "half a gate": lambda plan, tensors: first(plan, "conv").update(mask=[0.5] * 8),
    "a sum over the images": over_the_images,
    "a sum over what others hold": lambda plan, tensors: first(plan, "add").update(in_place=0),
    "a value that is freed too early": lambda plan, tensors: first(plan, "conv").update(
        free=[first(plan, "conv")["out"]]
    ),
    "groups as a dense value": dense_groups,
    "another format": lambda plan, tensors: plan.update(format=2),
    "another field": lambda plan, tensors: first(plan, "conv").update(surprise=1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_whose_shapes_are_not_those_of_its_operations_is_refused(lie, tmp_path, unchecked_types):
    save_plan(plan_of(gated(chain_of(["residual"]))), tmp_path / "plan")
    load_plan(rewritten(tmp_path / "plan", lambda plan, tensors: None))
    with pytest.raises(ValueError, match="is not a plan of this version"):
        load_plan(rewritten(tmp_path / "plan", LIES[lie]))


def test_a_convolution_in_groups_adds_to_nothing(tmp_path, unchecked_types):
    def add(plan, tensors):
        step = next(step for step in plan["steps"] if step["adds"])
        in_groups(plan, tensors, step)
        step["filters"] = -1

    save_plan(plan_of(gated(chain_of(["projection"]))), tmp_path / "plan")
    with pytest.raises(ValueError, match="is not a plan of this version"):
        load_plan(rewritten(tmp_path / "plan", add))


def test_native_code_reads_what_was_checked_and_nothing_else(tmp_path):
    """The call's argument is a large constant, its source a small value; a product of unlike channels; half weights."""
    net = Net(lambda net, x: net.last(net.conv(x).sigmoid() * net.gate), conv=conv(3, 8), last=conv(8, 8), gate=GATE)
    save_plan(plan_of(gated(net)), tmp_path / "plan")

    def enlarge(plan, tensors):
        step = next(step for step in plan["steps"] if step["call"] and step["call"][0].startswith("sigmoid"))
        tensors["constant.large"] = torch.zeros(1, 8, 64, 64)
        step["call"][1] = [{"ref": "large"}]
        step.update(kind="aten", pattern=-1)
        plan["shapes"][step["out"]] = [8, 64, 64]
        plan["steps"] = plan["steps"][: plan["steps"].index(step) + 1]
        plan["output"] = step["out"]

    plan = load_plan(rewritten(tmp_path / "plan", enlarge))
    assert operation(plan, plan.steps[-1]) is None
    found = NativeProgram(plan)(IMAGES, torch.ones(2, plan.num_gates))
    assert torch.equal(found, torch.full((1, 8, 64, 64), 0.5))

    def halve(plan, tensors):
        step = next(step for step in plan["steps"] if step["call"] and step["call"][0].startswith("linear"))
        for name in [arg["ref"] for arg in step["call"][1][1:]]:
            tensors[f"constant.{name}"] = tensors[f"constant.{name}"].half()

    plan = load_plan(rewritten(tmp_path / "plan", halve))
    assert all(operation(plan, step) is None for step in plan.steps if step.out == "linear")


def test_options_may_be_named_in_a_file(tmp_path):
    save_plan(plan_of(gated(chain_of(["residual"]))), tmp_path / "plan")
    before = load_plan(tmp_path / "plan")

    def name_them(plan, tensors):
        call = next(step["call"] for step in plan["steps"] if step["call"] and step["call"][0] == "mean.dim")
        call[1:] = [call[1][:1], {"dict": {"dim": call[1][1]}}]

    gates = torch.ones(2, before.num_gates)
    found = NativeProgram(load_plan(rewritten(tmp_path / "plan", name_them)))(IMAGES, gates)
    torch.testing.assert_close(found, NativeProgram(before)(IMAGES, gates))


GATE = torch.rand(1, 8, 1, 1)


def test_a_gater_of_another_backbone_is_refused(tmp_path):
    for name, parts in (("one", ["residual"]), ("other", ["residual", "dense"])):
        gaternet.skip(gated(chain_of(parts)), IMAGES, "slice").save(tmp_path / name)
    shutil.copy(tmp_path / "other" / "gater.safetensors", tmp_path / "one" / "gater.safetensors")
    with pytest.raises(ValueError, match="holds a gater for another backbone"):
        Skipper.load(tmp_path / "one")


@pytest.mark.parametrize("kept", [5, [5], [["a"]], [[10**9]], [[True]], [[1.0]]])
def test_subnetworks_of_gates_that_there_are_not_are_refused(kept, tmp_path):
    gaternet.skip(gated(chain_of(["residual"])), IMAGES, "slice").save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"engine": "specialise", "hard": True, "kept": kept}))
    with pytest.raises(ValueError, match="keeps gates that there are not"):
        Skipper.load(tmp_path)


@pytest.mark.parametrize("name", KERNELS)
def test_a_gater_that_gives_fewer_gates_than_images_is_refused(name, tmp_path, unchecked_types):
    """Its file says that its gates are hard, and for one image they are as many as they should be."""
    gaternet.skip(gated(chain_of(["residual"])), IMAGES, "slice").save(tmp_path)

    def hold(plan, tensors):
        tensors["constant.held"] = torch.ones(1, *plan["shapes"][plan["output"]])
        (step,) = [step for step in plan["steps"] if step["out"] == plan["output"]]
        step.update(sources=[], call=["relu.default", [{"ref": "held"}], {"dict": {}}])

    rewritten(tmp_path / "gater.safetensors", hold).rename(tmp_path / "gater.safetensors")
    fast = Skipper.load(tmp_path, kernels=name)
    assert fast._hard
    fast(IMAGES[:1])
    with pytest.raises(ValueError, match="gates must be"):
        fast(IMAGES)


def test_a_plan_moves_to_another_device(tmp_path):
    save_plan(plan_of(gated(chain_of(["residual with SE", "windows"]))), tmp_path / "plan")
    plan = load_plan(tmp_path / "plan", device="meta")
    assert all(tensor.is_meta for tensor in plan._weights)
    biases = [step.conv.bias for step in plan.steps if step.conv is not None and step.conv.bias is not None]
    assert biases
    assert all(bias.is_meta for bias in biases)
    assert all(tensor.device.type == "cpu" for tensor in plan.patterns)


def test_a_call_makes_its_tensors_on_the_device_that_it_moved_to():
    call = Call(torch.ops.aten.zeros_like.default, [Ref("x")], {"device": torch.device("cpu")})
    assert call.to(torch.device("meta"))({"x": IMAGES}).is_meta


def test_a_file_names_nothing_of_pytorch_but_options():
    for name in ("load", "pi", "nothing"):
        with pytest.raises(ValueError, match=rf"it names torch\.{name}"):
            _filled_in({"torch": name})


def test_a_plan_is_where_its_weights_are_not_where_a_number_is():
    """Code such as `x * torch.tensor(2.0)` makes its number on the CPU, wherever the network is."""
    model = gated(Net(lambda net, x: net.one(x) * torch.tensor(2.0), one=conv(3, 8)))
    plan = plan_of(model)
    numbers = {name: value for name, value in plan.constants.items() if value.ndim == 0}
    assert numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = plan.to(torch.device("cuda"))
    for steps in (moved.steps, []):
        assert replace(moved, steps=steps, constants={**numbers, **moved.constants, **numbers}).device.type == "cuda"


@pytest.mark.parametrize(
    ("channels", "height", "weight", "groups", "filters"),
    [
        (0, 8, (4, 0, 1, 1), 1, 0),
        (4, 8, (5, 2, 1, 1), 2, 5),
        (4, 8, (0, 4, 1, 1), 1, 0),
        (4, 8, (8, 4, 0, 1), 1, 8),
        (4, 0, (4, 4, 1, 1), 1, 4),
    ],
)
def test_convolutions_that_tensors_without_data_pass_are_refused(channels, height, weight, groups, filters, tmp_path):
    padding = 0 if height else 1
    spec = ConvSpec("conv", torch.zeros(weight), torch.zeros(weight[0]), (1, 1), (padding, padding), (1, 1), groups)
    sides = [side + 2 * padding - kernel + 1 for side, kernel in zip((height, 8), weight[2:], strict=True)]
    part = Call(torch.ops.aten.slice.Tensor, [Ref("x"), 1, 0, channels, 1], {})
    steps = [Step("aten", "part", ["x"], call=part), Step("conv", "out", ["part"], free=["x", "part"], conv=spec)]
    shapes = {"x": (5, height, 8), "part": (channels, height, 8), "out": (filters, *sides)}
    save_plan(Plan("x", "out", (5, height, 8), 0, steps, shapes, [], {"c": torch.zeros(1)}), tmp_path / "plan")
    with pytest.raises(ValueError, match="what it says of out contradicts its operations"):
        load_plan(tmp_path / "plan")


@pytest.mark.parametrize(
    ("usual", "alias"),
    [
        (lambda a, b: torch.cat([a, b], 1)[:, :8], lambda a, b: torch.concat([a, b], 1)[:, :8]),
        (lambda a, b: a - b.neg(), lambda a, b: a.subtract(b.negative())),
        (lambda a, b: a * b.mean((2, 3), True).sigmoid(), lambda a, b: a.multiply(b.mean((2, 3), True).sigmoid())),
        (lambda a, b: b.clamp(0, 6), lambda a, b: b.clip(0, 6)),
        (lambda a, b: b.relu(), lambda a, b: b.clamp_min(0)),
        (lambda a, b: b.clamp(max=6), lambda a, b: b.clamp_max(6)),
        (lambda a, b: b / 2, lambda a, b: b.divide(2)),
    ],
    ids=["cat", "sub", "mul", "clamp", "clamp_min", "clamp_max", "div"],
)
def test_an_operation_by_another_name_is_the_same(usual, alias, tmp_path):
    sites, macs = [], []
    for act in (usual, alias):
        torch.manual_seed(0)
        net = Net(lambda net, x, act=act: net.c(act(x := net.a(x), net.b(x))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
        model = gated(net)
        sites.append(model.sites)
        macs.append(CostModel.of(model, IMAGES)(random_gates(model, 0.5)).tolist())
        gaternet.skip(model, IMAGES, "slice").save(tmp_path / act.__name__)
        with torch.no_grad():
            torch.testing.assert_close(Skipper.load(tmp_path / act.__name__)(IMAGES), model(IMAGES))
    assert sites[0] == sites[1]
    assert macs[0] == macs[1]
