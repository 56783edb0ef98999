"""The paper's networks: what its tables count, and a gated unit written out by hand."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.cost import count_dense_macs, count_macs
from gaternet.gating import gate
from gaternet.method import Gater, GaterNet
from gaternet.models import CifarResNet, create_model, model_names
from gaternet.models.cifar_resnet import BasicBlock, Bottleneck, SqueezeExcite, residual_sites
from gaternet.models.create import create_backbone
from gaternet.models.densenet import DenseNet, dense_sites
from gaternet.models.imagenet import IMAGENET, imagenet_sites
from gaternet.models.shake_shake import ShakeShake, branch_sites, shake
from gaternet.recipes import RECIPES
from gaternet.sites import find_sites

PAPER_ROWS = [recipe for recipe in RECIPES.values() if recipe.paper]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shake_(model: nn.Module) -> None:
    """Evaluation mode and random BatchNorms: fresh ones shift nothing, so a gate before one would go unseen."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor, 0.0 if tensor is module.running_mean else 0.5, 0.5, generator=generator)
    model.eval()


@pytest.mark.parametrize("recipe", PAPER_ROWS, ids=lambda recipe: recipe.name)
def test_parameters_and_gates_are_those_of_the_papers_tables(recipe):
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[recipe.data]
    with torch.device("meta"):
        model = create_model(recipe.model, classes, **recipe.gater_options())
    counted = f"{parameters(model) / 1e6:.2f}M"
    if recipe.model.startswith("inception"):  # as published by its authors; the paper counts 1.82 and 3.41 more
        assert (counted, recipe.paper.params) in (("42.68M", "44.50M"), ("58.26M", "61.67M"))
    else:
        assert counted == recipe.paper.params or recipe.paper.params is None
    assert (model.num_gates if isinstance(model, GaterNet) else None) == recipe.paper.gates


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [("resnet20", 10, 272_474), ("resnet56", 10, 855_770), ("resnet164", 10, 1_620_058), ("resnet164", 100, 1_643_188)],
)
def test_exact_parameters_of_backbones(name, classes, expected):
    assert parameters(create_model(name, classes)) == expected


@pytest.mark.parametrize(("name", "expected"), [("resnet20_gated", 275_368), ("resnet56_gated", 281_416)])
def test_exact_parameters_of_the_public_codes_gaters(name, expected):
    model = create_model(name, batch_norm=False)
    assert isinstance(model, GaterNet)
    assert parameters(model.gater) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet20", 336), ("resnet56", 1008), ("resnet110", 2016), ("resnet164", 7200)]
)
def test_sites_follow_the_last_conv_of_each_unit_in_execution_order(name, expected):
    model = create_model(f"{name}_gated").eval()
    assert isinstance(model, GaterNet)
    convolved: dict[str, Tensor] = {}
    ran: list[str] = []  # sites in the order in which they run
    for site in model.sites:
        conv, norm = model.backbone.get_submodule(site.conv), model.backbone.get_submodule(site.name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert conv.out_channels == norm.num_features == site.channels

        def keep(module: nn.Module, args: tuple, output: Tensor, name: str = site.conv) -> None:
            convolved[name] = output

        def check(module: nn.Module, args: tuple, site=site) -> None:
            ran.append(site.name)
            assert args[0] is convolved[site.conv]  # the norm acts on nothing but the gated filters

        conv.register_forward_hook(keep)
        norm.register_forward_pre_hook(check)
    model.backbone(torch.rand(1, 3, 4, 4))
    assert ran == [site.name for site in model.sites]
    units = [name for name, module in model.backbone.named_modules() if isinstance(module, BasicBlock | Bottleneck)]
    assert [site.name.rpartition(".")[0] for site in model.sites] == units  # one each
    assert [site.start for site in model.sites] == [0, *(site.stop for site in model.sites[:-1])]
    assert {site.role for site in model.sites} == {"residual"}
    assert model.num_gates == expected


def by_hand(net: CifarResNet, images: Tensor, gates: Tensor) -> Tensor:
    """A gated residual network, unit by unit: filters, BatchNorm, gate, SE, addition, ReLU."""
    x, start = F.relu(net.bn1(net.conv1(images))), 0
    for stage in (net.layer1, net.layer2, net.layer3):
        for unit in stage.children():
            assert isinstance(unit, BasicBlock | Bottleneck)
            y = F.relu(unit.bn1(unit.conv1(x)))
            if isinstance(unit, Bottleneck):
                y = unit.bn3(unit.conv3(F.relu(unit.bn2(unit.conv2(y)))))
            else:
                y = unit.bn2(unit.conv2(y))
            stop = start + y.shape[1]
            y = y * gates[:, start:stop].reshape(len(y), -1, 1, 1)
            start = stop
            if isinstance(unit.se, SqueezeExcite):
                first, second = unit.se.fc1, unit.se.fc2
                scale = F.relu(F.linear(y.mean((2, 3)), first.weight.flatten(1), first.bias))
                scale = F.linear(scale, second.weight.flatten(1), second.bias)
                y = y * scale.sigmoid().reshape(len(y), -1, 1, 1)
            x = F.relu(y + (x if x.shape == y.shape else unit.downsample(x)))
    return net.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet20", "resnet20_se", "resnet164"])
def test_gated_network_is_the_one_written_by_hand(name):
    backbone, plain = create_backbone(name), create_backbone(name)
    assert isinstance(backbone, CifarResNet)
    assert isinstance(plain, CifarResNet)
    shake_(plain)
    sites = residual_sites(backbone)
    backbone.load_state_dict(plain.state_dict())
    model = GaterNet(backbone, nn.Identity(), sites).eval().double()
    plain.double()
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    gates = torch.randint(2, (3, sites[-1].stop)).double()
    with torch.no_grad():
        gated = model.forward_gated(images, gates)
        torch.testing.assert_close(gated, by_hand(plain, images, gates))
        assert (gated - plain(images)).abs().max() > 0.1  # the gates matter, so the comparison says something


@pytest.mark.parametrize("name", ["resnet20", "resnet164"])
def test_stages_halve_the_image_twice_and_change_width_by_conv_and_batchnorm(name):
    net, sizes = create_backbone(name).eval(), []
    assert isinstance(net, CifarResNet)
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[1:])))
        assert all(isinstance(unit.downsample, nn.Identity) for unit in list(stage.children())[1:])
    net(torch.rand(1, 3, 32, 32))
    widths = (16, 32, 64) if name == "resnet20" else (16, 128, 256)
    assert sizes == [(width, side, side) for width, side in zip(widths, (32, 16, 8), strict=True)]
    kinds = [[type(part) for part in net.get_submodule(f"layer{stage}.0.downsample").children()] for stage in (1, 2, 3)]
    assert kinds == [[], [nn.Conv2d, nn.BatchNorm2d], [nn.Conv2d, nn.BatchNorm2d]]


CIFAR_MODELS = [name for name in model_names() if re.sub("_(gated|wider|narrow|se)$", "", name) not in IMAGENET]


@pytest.mark.parametrize("name", CIFAR_MODELS)
def test_every_model_runs_and_every_parameter_learns(name):
    options: Any = {"batch_norm": False} if name.endswith("_gated") else {}  # which would take fc1's bias away
    model = create_model(name, num_classes=7, in_chans=1, **options)
    logits = model(torch.rand(4, 1, 8, 8))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["resnet20", "resnet20_wider", "resnet164"])
def test_without_classes_a_backbone_gives_its_features(name):
    net = create_backbone(name, num_classes=0).eval()
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, net.num_features)


def test_convs_start_kaiming_normal_and_biases_at_zero():
    net = create_backbone("resnet20_se")
    conv = net.get_submodule("layer3.0.conv1")  # 32 -> 64: its fan-out is not its fan-in
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_options_reach_the_gater():
    options: dict[str, Any] = {"noise_std": 0.5, "hard_probability": 0.25, "threshold": 0.1}
    model = create_model(
        "resnet20_gated", extractor="resnet20_wider", bottleneck=5, batch_norm=False, initial_bias=2.0, **options
    )
    assert isinstance(model, GaterNet)
    gater = model.gater
    assert isinstance(gater, Gater)
    assert {name: getattr(gater, name) for name in options} == options
    assert gater.fc1.in_features == create_backbone("resnet20_wider").num_features
    assert gater.fc1.out_features == 5
    assert isinstance(gater.norm, nn.Identity)
    assert torch.all(gater.fc2.bias == 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet20_gatd", "unknown model 'resnet20_gatd': did you mean 'resnet20_gated'?"),
        ("vgg", "unknown model 'vgg': choose from resnet8, resnet18"),
    ],
)
def test_unknown_model_names_the_nearest(name, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        create_model(name)


def test_an_extractor_must_be_a_plain_network():
    with pytest.raises(ValueError, match="unknown model 'resnet20_gated'"):
        create_model("resnet20_gated", extractor="resnet20_gated")


@pytest.mark.parametrize("name", ["cifar10_resnet20_half", "cifar10_resnet56_half", "short_resnet20_half"])
def test_half_recipes_aim_at_half_of_the_macs_with_the_gater(name):
    recipe, images = RECIPES[name], torch.zeros(2, 3, 32, 32)
    backbone_name, gating = str(recipe.backbone), recipe.gating
    backbone = create_model(backbone_name)
    model = gate(
        backbone,
        images,
        gater=gating.extractor,
        shrink=gating.shrink,
        sites=gating.sites,
        bottleneck=gating.bottleneck,
    )
    macs = count_macs(model.eval(), images)
    assert gating.target_density is not None
    assert 0.49 < gating.target_density + macs.gater / macs.backbone <= 0.5
    narrow = RECIPES[name.replace("half", "narrow")]
    assert (narrow.epochs, narrow.optimizer, narrow.model) == (
        recipe.epochs,
        recipe.optimizer,
        f"{backbone_name}_narrow",
    )
    assert 0.49 < count_dense_macs(create_model(str(narrow.model)).eval(), images[:1]) / macs.backbone <= 0.5


# --- Table 2


def test_densenets_sites_are_those_of_any_densenet_but_one_a_block():
    net = DenseNet(22, 4)
    found = [site.conv for site in find_sites(net, torch.zeros(1, 3, 16, 16))]
    assert len(found) == 9
    assert [site.conv for site in dense_sites(net)] == [name for name in found if ".2." not in name]


def test_a_dense_layer_in_other_words():
    net = DenseNet(16, 4)
    shake_(net)
    sites = dense_sites(net)
    model = GaterNet(net, Gater(nn.Flatten(), 3 * 16 * 16, 12), sites).eval()
    images, gates = torch.randn(2, 3, 16, 16), torch.randint(2, (2, 12)).float()
    x, columns = net.conv1(images), iter(gates.view(2, 3, 4).unbind(1))
    with torch.no_grad():
        for number in (1, 2, 3):
            for index, layer in enumerate(net.get_submodule(f"block{number}").children()):
                parts = dict(layer.named_children())
                middle = parts["conv1"](F.relu(parts["bn1"](x)))
                new = parts["conv2"](F.relu(parts["bn2"](middle)))
                new = new * next(columns)[:, :, None, None] if index == 0 else new
                x = torch.cat([x, new], 1)
            if number < 3:
                parts = dict(net.get_submodule(f"transition{number}").named_children())
                x = F.avg_pool2d(parts["conv"](F.relu(parts["bn"](x))), 2)
        expected = net.fc(F.relu(net.bn(x)).mean((2, 3)))
        torch.testing.assert_close(model.forward_gated(images, gates), expected)


def test_shake_shakes_sites_are_those_of_any_network_of_two_branches():
    net = ShakeShake(4)
    assert find_sites(net, torch.zeros(1, 3, 16, 16)) == branch_sites(net)


def test_shake_shake_mixes_branches_evenly_in_evaluation_and_at_random_in_training():
    net = ShakeShake(4)
    shake_(net)
    unit = net.get_submodule("layer2.0")
    x = torch.randn(2, 4, 8, 8)
    parts = dict(unit.named_children())
    first, second, shortcut = (parts[name](x) for name in ("branch1", "branch2", "shortcut"))
    torch.testing.assert_close(unit(x), shortcut + 0.5 * first + 0.5 * second)
    unit.train()
    assert not torch.equal(unit(x), unit(x))
    even = parts["shortcut"].eval()
    moved = F.pad(F.relu(x), (0, 1, 0, 1))[:, :, 1:, 1:]
    halves = [
        even.get_submodule("conv1")(F.relu(x)[:, :, ::2, ::2]),
        even.get_submodule("conv2")(moved[:, :, ::2, ::2]),
    ]
    torch.testing.assert_close(even(x), even.get_submodule("bn")(torch.cat(halves, 1)))


def test_shaking_takes_other_shares_backwards():
    first, second = torch.randn(2, 2, 3, 4, 4).unbind()
    first.requires_grad_()
    second.requires_grad_()
    forward, backward = torch.tensor([0.25, 1.0]).view(2, 1, 1, 1), torch.tensor([0.75, 0.0]).view(2, 1, 1, 1)
    mixed = shake(first, second, forward, backward)
    torch.testing.assert_close(mixed, first * forward + second * (1 - forward))
    mixed.sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    torch.testing.assert_close(first.grad, backward.expand_as(first))
    torch.testing.assert_close(second.grad, (1 - backward).expand_as(second))


# --- Table 3


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_sites_of_imagenets_resnets_are_those_of_any_residual_network(name):
    net = create_backbone(name, 10).eval()
    assert imagenet_sites(net) == list(find_sites(net, torch.zeros(1, 3, 32, 32)))


def test_inceptions_sites_are_the_filters_that_are_read_within_their_branch():
    """Of all sites of the graph: not the first convolution, nor those whose output is concatenated with others."""
    net = create_backbone("inception_v4", 10).eval()
    concatenated = {"features.3.conv", "features.5.conv"}
    for name, module in net.named_modules():
        if re.fullmatch(r".*branch\d(_\d[ab])?", name):
            last = module[-1] if isinstance(module, nn.Sequential) else module
            concatenated |= {n for n, m in net.named_modules() if m is last and hasattr(m, "conv")}
    found = [site.conv for site in find_sites(net, torch.zeros(1, 3, 128, 128), sites="all")]
    expected = [conv for conv in found if conv.removesuffix(".conv") not in {"features.0", *concatenated}]
    assert len(expected) == 149 - 1 - len(concatenated)
    assert sorted(site.conv for site in imagenet_sites(net)) == sorted(expected)


def test_wider_resnets_are_wider_everywhere():
    net = create_model("resnet34_wider", 10)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    plain = create_model("resnet34", 10).state_dict()
    for name, value in net.state_dict().items():
        if value.ndim == 4:
            before = plain[name].shape
            assert value.shape == (before[0] * 5 // 4, before[1] * 5 // 4 if before[1] > 3 else 3, *before[2:])
    last = net.get_submodule("layer1.0.bn2").weight
    assert not isinstance(last, nn.Module)
    assert not last.any()  # as timm begins, in the stage that is made anew too


def test_a_gated_imagenet_model_learns_in_all_its_parts():
    model = create_model("resnet34_gated", 7, 1, batch_norm=False)
    for module in model.modules():  # timm closes each unit at the start
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    F.cross_entropy(model(torch.rand(4, 1, 64, 64)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_imagenets_models_get_the_papers_gater_by_default():
    with torch.device("meta"):
        model = create_model("resnet34_gated", 1000)
    assert isinstance(model, GaterNet)
    gater = model.gater
    assert isinstance(gater, Gater)
    assert (gater.fc1.in_features, gater.fc1.out_features) == (512, 256)
