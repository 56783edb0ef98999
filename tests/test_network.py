"""What a recipe builds: a gated backbone of others', its starting weights, frozen parts, the penalty's weights."""

import dataclasses
import json
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from training_runs import assert_same_weights, send_signal_after, small

from gaternet.checkpoint import load_model, save_model
from gaternet.cost import CostModel, count_macs
from gaternet.data import ImageData, load_data
from gaternet.machine import make_accelerator
from gaternet.method import Gater, GaterNet
from gaternet.models import create_model
from gaternet.network import build_network, make_density, make_optimizer, prepared_for
from gaternet.recipe import Gating, Recipe, Runtime, override
from gaternet.recipes import find_recipe
from gaternet.train import Stopped, train

CPU = Runtime(cpu=True, precision="no", log_every=1)


def finetune(**changes: Any) -> Recipe:
    """The fine-tuning recipe on the digits, small and short."""
    small = {"backbone": "resnet20", "pretrained": False, "data": "digits", "batch_size": 256, "epochs": 1}
    return override(find_recipe("finetune"), {**small, **changes})


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def build(recipe: Recipe, data: ImageData) -> GaterNet:
    network = build_network(recipe, data, seed=0)
    assert isinstance(network, GaterNet)
    return network


def test_finetuning_starts_as_the_plain_network(digits, tmp_path):
    plain = create_model("resnet20", 10, 1).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    network = build(finetune(backbone_from=str(tmp_path / "plain.safetensors")), digits).eval()
    images = digits.preprocessing.normalize(digits.test.take(range(8)))
    logits, gates = network(images, return_gates=True)
    assert gates.all()
    assert torch.equal(logits, plain(images))
    assert {site.role for site in network.sites} == {"residual", "inner", "shortcut"}  # all, not only the paper's


def test_a_gated_backbone_starts_as_open_as_asked(digits):
    network = build(finetune(open=False, initial_bias=1.0), digits)
    assert isinstance(network.gater, Gater)
    assert network.gater.fc2.bias.eq(1).all()
    assert network.gater.fc2.weight.any()
    with pytest.raises(ValueError, match="initial_bias must be left out where open is set"):
        finetune(open=True, initial_bias=1.0)


def test_finetuned_model_is_saved_and_rebuilt(tmp_path):
    train(finetune(backbone="timm:resnet10t", image_size=32), tmp_path / "run", CPU)
    model, metadata = load_model(tmp_path / "run" / "last")
    assert metadata["backbone"] == {"name": "timm:resnet10t", "num_classes": 10, "in_chans": 1}
    assert metadata["extractor"] == {"name": "resnet20", "shrink": 2, "in_chans": 1}
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("part", ["backbone", "gater"])
def test_a_frozen_part_stays_as_it_was(digits, tmp_path, part):
    recipe = finetune(freeze=part, lr=0.1)
    before = build(recipe, digits).get_submodule(part).state_dict()
    train(recipe, tmp_path / "run", CPU)
    trained, _ = load_model(tmp_path / "run" / "last")
    after = trained.get_submodule(part).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # running statistics, too
    other = "gater" if part == "backbone" else "backbone"
    fresh = build(recipe, digits).get_submodule(other).state_dict()
    changed = trained.get_submodule(other).state_dict()
    assert any(not torch.equal(fresh[name], changed[name]) for name in fresh)


def test_the_gater_has_a_learning_rate_of_its_own(digits):
    network = build(finetune(), digits)
    optimizer = make_optimizer(network, finetune(lr=0.02, gater_lr=0.1), make_accelerator(CPU))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert {scales.pop(id(p)) for p in network.gater.parameters()} == {5.0}
    assert set(scales.values()) == {1.0}
    assert scales.keys() == {id(p) for p in network.backbone.parameters()}


def test_each_learning_rate_follows_the_schedule(monkeypatch, tmp_path):
    rates = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(finetune(lr=0.02, gater_lr=0.1, schedule="constant", warmup_epochs=0.0), tmp_path / "run", CPU)
    assert rates == [pytest.approx([0.02, 0.1])] * 5


def toy() -> GaterNet:
    network = create_model("resnet20_gated", 10, 1)
    assert isinstance(network, GaterNet)
    return network


def test_densities_by_hand():
    network, images = toy(), torch.zeros(1, 1, 8, 8)
    gates = torch.rand(3, network.num_gates)
    assert make_density(network, Gating(), images)(gates).tolist() == pytest.approx([gates.mean().item()])
    by_site = make_density(network, Gating(penalty="sites"), images)(gates)
    assert by_site.tolist() == pytest.approx([gates[:, s.start : s.stop].mean().item() for s in network.sites])
    rates = [statistics.mean(column) for column in zip(*gates.tolist(), strict=True)]
    assert make_density(network, Gating(penalty="each"), images)(gates).tolist() == pytest.approx(rates)
    hard = gates.round().requires_grad_()
    macs = count_macs(network, images.expand(3, 1, 8, 8))
    cost = CostModel.of(network, images)
    found = make_density(network, Gating(penalty="macs"), images)(hard)
    assert found.item() == pytest.approx(cost(hard).mean().item() / macs.backbone)
    (gradient,) = torch.autograd.grad(found.sum(), hard)
    assert (gradient > 0).all()  # each gate costs


def test_densities_count_shared_gates_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))

    from gaternet.sites import find_sites

    images = torch.zeros(1, 1, 8, 8)
    net = Net()
    sites = find_sites(net, images, "all")
    assert [site.role for site in sites] == ["inner", "depthwise", "inner"]
    network = GaterNet(net, Gater(nn.Flatten(), 64, 10), sites)
    assert make_density(network, Gating(penalty="sites"), images)(torch.rand(3, 10)).shape == (2,)


def test_target_of_each_site_is_steered_to(tmp_path):
    options = {
        "sparsity_ramp": 0.0,
        "density_weight": 300.0,
        "lr": 0.1,
        "gater_lr": 0.2,
        "epochs": 4,
        "sites": "residual",
    }
    record = train(finetune(target_density=0.3, penalty="sites", **options), tmp_path / "run", CPU)
    assert max(record["test_site_density"]) < 0.6
    assert len(record["test_site_density"]) == 9


@pytest.mark.parametrize("wrap", [False, True])
def test_weights_come_from_a_file_whatever_its_classes(digits, tmp_path, wrap):
    plain = create_model("resnet20", 7, 1)
    state: Any = {f"module.{name}": value for name, value in plain.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrap else state, tmp_path / "plain.pth")
    network = build(finetune(backbone_from=str(tmp_path / "plain.pth")), digits)
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]) != name.startswith("fc."), name


@pytest.mark.parametrize(
    ("name", "message"), [("a.safetensors", "is damaged or no"), ("a.pth", "does not hold a dict of named")]
)
def test_files_without_weights_are_refused(digits, tmp_path, name, message):
    torch.save({0: torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=message) as refused:
        build_network(finetune(backbone_from=str(tmp_path / name)), digits, seed=0)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("change", [lambda s: s.pop("bn1.weight"), lambda s: s.update(new=torch.ones(1))])
def test_weights_of_another_network_are_refused(digits, tmp_path, change):
    state = create_model("resnet20", 10, 1).state_dict()
    change(state)
    torch.save(dict(state), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds another model than the backbone of this recipe"):
        build_network(finetune(backbone_from=str(tmp_path / "other.pth")), digits, seed=0)


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize(
    ("name", "classifier"),
    [("resnet20", "fc."), ("timm:test_efficientnet", "classifier."), ("timm:test_byobnet", "head.fc.")],
)
def test_an_extractor_starts_from_a_network_of_its_kind(digits, tmp_path, name, classifier, shrink):
    plain: Any = create_model(name, 7, 1)
    save_model(plain, tmp_path / "plain", {"backbone": plain.gaternet_source})
    expected = {key: value for key, value in plain.state_dict().items() if not key.startswith(classifier)}

    def start(source: Path, shrink: int) -> GaterNet:
        options = {"extractor": name, "shrink": shrink, "extractor_from": str(source)}
        network = build(override(find_recipe("digits_resnet20_gated"), options), digits)
        state = network.gater.get_submodule("extractor").state_dict()
        found = {key.removeprefix("1."): value for key, value in state.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        return network

    network = start(tmp_path / "plain", shrink)
    network.save_pretrained(tmp_path / "gated")
    torch.save(network.gater.get_submodule("extractor").state_dict(), tmp_path / "extractor.pth")
    for source in ("gated", "extractor.pth"):  # with another shrink, too
        start(tmp_path / source, 1)
        start(tmp_path / source, 2)
    del expected[next(iter(expected))]
    torch.save(expected, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds another model than the extractor of this recipe"):
        start(tmp_path / "other.pth", shrink)


def test_a_pretrained_backbone_gets_the_inputs_that_it_knows(digits):
    rgb = dataclasses.replace(digits.preprocessing, mean=(0.1,) * 3, std=(0.2,) * 3)
    data = dataclasses.replace(digits, preprocessing=rgb)
    network = nn.Identity()
    assert prepared_for(data, network) is data
    gated: Any = create_model("resnet8_gated")
    gated.metadata["preprocessing"] = {"height": 1, "width": 1, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    assert prepared_for(data, gated).preprocessing.mean == (0.1, 0.2, 0.3)
    network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4)}  # pyright: ignore[reportArgumentType]
    found = prepared_for(data, network).preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.4,) * 3)
    assert prepared_for(digits, network) is digits  # grey images


@pytest.mark.parametrize(
    ("backbone_from", "model", "mean"),
    [
        ("weights.pth", "timm:test_resnet", 0.5),  # as timm has it
        ("weights.pth", "resnet20", None),  # as the data have it: nobody knows
        ("run", "timm:test_resnet", 0.3),  # as it was trained
        ("run/last/model.safetensors", "resnet20", 0.3),
        ("saved", "timm:test_resnet", 0.5),  # which does not say
        (None, "timm:test_resnet", None),
    ],
)
def test_a_backbone_that_starts_from_trained_weights_gets_the_inputs_that_they_know(
    tmp_path, backbone_from, model, mean
):
    images, labels = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8).numpy(), torch.arange(16).numpy() % 4
    np.savez(tmp_path / "rgb.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = load_data(str(tmp_path / "rgb.npz"))
    plain: Any = create_model(model, 4)
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    saved = {"preprocessing": {"height": 32, "width": 32, "mean": (0.3,) * 3, "std": (0.2,) * 3}}
    save_model(plain, tmp_path / "run" / "last", {"backbone": plain.gaternet_source, **saved})
    save_model(plain, tmp_path / "saved", {"backbone": plain.gaternet_source})
    changes: dict[str, Any] = {"model": model, "data": str(tmp_path / "rgb.npz"), "batch_size": 16, "epochs": 1}
    if backbone_from:
        changes["backbone_from"] = str(tmp_path / backbone_from)
    train(override(find_recipe("digits_resnet20"), changes), tmp_path / "new", CPU)
    _, metadata = load_model(tmp_path / "new" / "last")
    expected = data.preprocessing.mean if mean is None else (mean,) * 3
    assert metadata["preprocessing"]["mean"] == list(expected)


def test_a_plain_network_of_the_users_is_saved_with_what_it_is(tmp_path):
    network: Any = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    recipe = override(find_recipe("digits_resnet20"), {"batch_size": 256, "epochs": 1})
    train(recipe, tmp_path / "run", CPU, network=network)
    loaded, _ = load_model(tmp_path / "run" / "last")
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(loaded(images), network.eval()(images))


def test_a_changed_plain_network_must_be_given_again(tmp_path):
    network: Any = create_model("resnet20", 10, 1)
    network.bn1 = nn.Identity()
    recipe = override(find_recipe("digits_resnet20"), {"batch_size": 256, "epochs": 1})
    train(recipe, tmp_path / "run", CPU, network=network)
    with pytest.raises(ValueError, match="does not say how its backbone was built: load it with backbone="):
        load_model(tmp_path / "run" / "last")
    again: Any = create_model("resnet20", 10, 1)
    again.bn1 = nn.Identity()
    loaded, _ = load_model(tmp_path / "run" / "last", backbone=again)
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(loaded(images), network.eval()(images))


def test_a_gated_model_is_no_backbone(digits):
    with pytest.raises(ValueError, match="resnet20_gated is gated already"):
        build_network(finetune(backbone="resnet20_gated"), digits, seed=0)


def test_model_and_backbone_take_each_others_place():
    recipe = override(find_recipe("cifar10_resnet20_gated"), {"backbone": "timm:resnet18"})
    assert (recipe.model, recipe.backbone) == (None, "timm:resnet18")
    assert recipe.gated
    recipe = override(find_recipe("finetune"), {"model": "resnet20", "pretrained": False})
    assert (recipe.model, recipe.backbone) == ("resnet20", None)
    with pytest.raises(ValueError, match="name either a model or a backbone to gate, not both"):
        override(find_recipe("finetune"), {"model": "resnet20", "backbone": "resnet56"})
    with pytest.raises(ValueError, match="not neither"):
        Recipe("none", None)


def test_finetuning_resumes_to_the_same_weights(tmp_path: Path, monkeypatch):
    import gaternet.step

    recipe = finetune(epochs=2, freeze="none", gater_lr=0.03)
    train(recipe, tmp_path / "whole", CPU)
    original, calls = gaternet.step.training_step, []

    def breaks(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(gaternet.step, "training_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", CPU)
    monkeypatch.undo()
    train(recipe, tmp_path / "cut", CPU, resume=True)
    whole, cut = (load_model(tmp_path / name / "last")[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def cut_after(steps: int, recipe: Recipe, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        send_signal_after(patched, steps, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(recipe, path, CPU)


def test_a_run_goes_on_without_the_weights_that_it_started_from(tmp_path, monkeypatch):
    plain: Any = create_model("resnet20", 10, 1)
    inputs = {"height": 8, "width": 8, "mean": (0.12345678901234,), "std": (0.3,)}
    save_model(plain, tmp_path / "start" / "last", {"backbone": plain.gaternet_source, "preprocessing": inputs})
    start, cut = str(tmp_path / "start"), tmp_path / "cut"
    recipe = finetune(epochs=2, backbone_from=start, extractor_from=f"{start}/last/model.safetensors")
    train(recipe, tmp_path / "whole", CPU)
    cut_after(8, recipe, cut, monkeypatch)
    shutil.rmtree(start)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "preprocessing": None}))
    with pytest.raises(ValueError, match=f"no run or saved model {start}"):
        train(recipe, cut, CPU, resume=True)  # an older version's, which did not keep how images became its inputs
    (cut / "config.json").write_text(json.dumps(config))
    train(recipe, cut, CPU, resume=True)
    assert_same_weights(tmp_path / "whole", cut)
    assert load_model(cut / "last")[1]["preprocessing"]["mean"] == [0.12345678901234]


def test_a_run_goes_on_without_a_download(tmp_path, monkeypatch):
    create, asked = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **b: asked.append(pretrained) or create(*a, **b))
    recipe = finetune(epochs=2, backbone="timm:test_resnet", image_size=32, pretrained=True)
    cut_after(3, recipe, tmp_path / "cut", monkeypatch)
    assert asked.count(True) == 1
    train(recipe, tmp_path / "cut", CPU, resume=True)
    assert asked.count(True) == 1


def test_a_run_goes_on_with_its_teacher_alone(tmp_path, monkeypatch):
    train(small("resnet20", epochs=1), tmp_path / "teacher", CPU)
    recipe = small("resnet20", teacher=str(tmp_path / "teacher"))
    cut_after(3, recipe, tmp_path / "cut", monkeypatch)
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"no run or saved model .*teacher"):
        train(recipe, tmp_path / "cut", CPU, resume=True)


def test_a_recipes_options_reach_the_gater_of_a_published_model():
    options: dict[str, Any] = {"bottleneck": 5, "batch_norm": False, "initial_bias": 2.0, "shrink": 2}
    options |= {"noise_std": 0.5, "hard_probability": 0.25}
    network = build_network(small("resnet8_gated", extractor="resnet8", **options), load_data("digits"), seed=0)
    gater = network.get_submodule("gater")
    assert isinstance(gater, Gater)
    assert (gater.noise_std, gater.hard_probability, gater.fc1.out_features) == (0.5, 0.25, 5)
    assert isinstance(gater.norm, nn.Identity)
    assert gater.fc2.bias.eq(2).all()
    assert isinstance(gater.extractor, nn.Sequential)  # with what shrinks the images in front
