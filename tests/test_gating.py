"""`gate`: any CNN in one call, and back again."""

import copy
import math

import pytest
import torch
from gated_models import gater_of, shrink_of
from small_networks import IMAGES, PIXELS, Net, conv, custom, features, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gaternet import GaterNet, count_macs, create_model, gate, load_pretrained, skip
from gaternet.cost import CostModel, count_dense_macs
from gaternet.graph import read_graph
from gaternet.method import Gater
from gaternet.models.create import create_backbone

SMALL = torch.zeros(2, 3, 32, 32)


# --- The model as it begins


@pytest.mark.parametrize("batch_norm", [True, False])
def test_open_begins_as_the_plain_backbone_for_any_image(batch_norm):
    backbone = custom()
    plain = copy.deepcopy(backbone)
    model = gate(backbone, IMAGES, open=True, batch_norm=batch_norm)
    for scale in (0.0, 1.0, -100.0):
        images = scale * torch.randn(4, 3, 8, 8, generator=seeded(2))
        logits, gates = model(images, return_gates=True)
        assert torch.equal(gates, torch.ones(4, 16))
        assert torch.equal(logits, plain(images))


def test_gates_start_as_open_as_asked():
    assert gater_of(gate(custom(), IMAGES, initial_bias=1.5)).fc2.bias.eq(1.5).all()
    with pytest.raises(ValueError, match="leave it out where open is set"):
        gate(custom(), IMAGES, open=True, initial_bias=1.5)


def test_open_gates_are_open_in_training_too():
    model = gate(custom().train(), IMAGES, open=True, hard_probability=1.0)
    plain = copy.deepcopy(model).ungate()
    images = torch.randn(4, 3, 8, 8, generator=seeded(3)) * 5
    for _ in range(3):  # the gater's BatchNorms learn, and change nothing
        assert torch.equal(gater_of(model).logits(images), torch.full((4, 16), 2.0))
    gater_of(model).noise_std = 0.0
    assert torch.equal(model(images), plain(images))  # with the statistics of the batch
    gater_of(model).noise_std = 1.0
    share = torch.cat([model.gates(images) for _ in range(50)]).mean()
    assert 0.96 < share < 0.99  # with the paper's noise


def test_default_begins_with_about_half_of_the_gates_open_and_they_depend_on_the_image():
    model = gate(custom(), IMAGES)
    gates = model.gates(torch.randn(64, 3, 8, 8, generator=seeded(4)) * 2)
    assert 0.2 < gates.mean() < 0.8
    assert len(gates.unique(dim=0)) > 1


def test_an_open_model_learns_to_close_gates():
    model = gate(custom().train(), IMAGES, open=True)
    images = torch.randn(8, 3, 8, 8, generator=seeded(5))
    optimizer = torch.optim.SGD(model.gater.parameters(), 1.0)
    for step in range(30):
        optimizer.zero_grad()
        model(images, return_gates=True)[1].sum(1).mean().backward()
        if step == 1:  # one step behind the start, where FC2's weights are zeros
            for name, parameter in model.gater.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.any() or name == "fc1.bias", name  # BatchNorm takes any shift away again
        optimizer.step()
    assert model.eval().gates(images).mean() < 0.1


# --- The gater


def test_default_gater_costs_at_most_5_percent_of_a_large_backbone():
    images = torch.zeros(1, 3, 224, 224)
    model = gate(create_backbone("torchvision:resnet18"), images)
    macs = count_macs(model.eval(), images)
    assert macs.backbone > 1.8e9
    assert 0.02 * macs.backbone < macs.gater <= 0.05 * macs.backbone  # neither more than it may, nor blind
    assert shrink_of(model) > 1
    assert gater_of(model).fc1.out_features == 256


def test_default_gater_sees_small_images_as_they_are():
    model = gate(create_backbone("resnet20"), torch.zeros(1, 3, 8, 8))
    assert shrink_of(model) == 1
    assert gater_of(model).fc1.in_features == 64  # ResNet-20's
    assert gater_of(model).fc1.out_features == 8


@pytest.mark.parametrize(("pixels", "bottleneck"), [((64, 64), 8), ((64, 65), 256), ((72, 20), 256)])
def test_default_bottleneck_is_the_papers(pixels, bottleneck):
    model = gate(custom(), torch.zeros(1, 3, *pixels), gater=features())
    assert gater_of(model).fc1.out_features == bottleneck
    assert gater_of(gate(custom(), torch.zeros(1, 3, *pixels), gater=features(), bottleneck=7)).fc1.out_features == 7


@pytest.mark.parametrize(
    ("name", "width"), [("resnet20", 64), ("resnet20_se", 64), ("test_resnet", 96), ("timm:test_efficientnet", 256)]
)
def test_gater_by_name(name, width):
    model = gate(custom(), IMAGES, gater=name)
    assert gater_of(model).fc1.in_features == width
    assert model.metadata is not None
    assert model.metadata["extractor"] == {"name": name, "in_chans": 3}
    assert set(model.gates(PIXELS).unique().tolist()) <= {0.0, 1.0}


def test_gater_of_a_timm_model_with_another_number_of_channels():
    backbone = Net(lambda net, x: net.conv(x), conv=conv(5, 8))
    model = gate(backbone, torch.zeros(1, 5, 32, 32), gater="mobilenetv3_small_050")
    assert model.eval().gates(torch.zeros(3, 5, 32, 32)).shape == (3, 8)


def test_gater_by_module_is_that_module():
    extractor = features()
    model = gate(custom(), IMAGES, gater=extractor, noise_std=0.3, hard_probability=0.2, batch_norm=False)
    gater = gater_of(model)
    assert gater.extractor is extractor
    assert gater.fc1.in_features == 5
    assert (gater.noise_std, gater.hard_probability) == (0.3, 0.2)
    assert isinstance(gater.norm, nn.Identity)
    assert model.metadata is not None
    assert model.metadata["extractor"] is None


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parts_of_an_extractor_stay_in_their_mode(training):
    extractor = nn.Sequential(features(), nn.BatchNorm1d(5)).train(training)
    extractor[1].training = not training
    before = [module.training for module in extractor.modules()]
    model = gate(custom().train(training), IMAGES, gater=extractor)
    assert [module.training for module in extractor.modules()] == before
    other = gate(custom().train(not training), IMAGES, gater=extractor)
    assert {module.training for module in other.modules()} == {not training}
    assert model.gater.training == training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gater": "resnet8", "shrink": 16}, r"extractor, a Sequential, cannot take images \(2, 3, 8, 8\)"),
        ({"gater": "vit_tiny_patch16_224"}, r"extractor, a VisionTransformer, cannot take images \(2, 3, 8, 8\)"),
        ({"gater": "torchvision:resnet18"}, "gives no features without its classifier"),
    ],
)
def test_an_extractor_that_cannot_take_the_images_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        gate(custom(), IMAGES, **options)


class Maps(nn.Sequential):
    """Gives what no extractor may."""


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), images


@pytest.mark.parametrize(
    ("extractor", "given"),
    [
        (Maps(nn.Conv2d(3, 5, 3)), r"a Maps, must return features \(B, h\), but returns \(2, 5, 6, 6\)"),
        (Maps(nn.Conv2d(3, 5, 3), nn.Flatten(0)), r"a Maps, .* but returns \(360,\)"),
        (Maps(nn.Flatten(0, 1)), r"a Maps, .* but returns \(6, 8, 8\)"),
        (Maps(nn.Flatten(2), nn.Flatten(0, 1)), r"a Maps, .* but returns \(6, 64\)"),
        (Pair(), r"a Pair, .* but returns tuple"),
    ],
)
def test_an_extractor_that_gives_no_features_is_named_with_what_it_gives(extractor, given):
    backbone = custom()
    with pytest.raises(ValueError, match=given + ": remove its output layer and pool over the image"):
        gate(backbone, IMAGES, gater=extractor)
    assert not any(module._forward_hooks for module in backbone.modules())


def test_unknown_gater_is_refused_with_a_near_name():
    with pytest.raises(ValueError, match="unknown model of timm 'resnt18': did you mean 'resnet18'"):
        gate(custom(), IMAGES, gater="resnt18")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extractor", [None, features()])
def test_gater_has_the_dtype_of_the_example(dtype, extractor):
    images = IMAGES.to(dtype)
    model = gate(custom().to(dtype), images, gater=extractor)
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    logits, gates = model(images, return_gates=True)
    assert (logits.dtype, gates.dtype) == (dtype, dtype)


# --- The backbone


def test_backbone_stays_as_it_was_and_comes_back():
    backbone = custom()
    plain = copy.deepcopy(backbone)
    model = gate(backbone, IMAGES)
    assert model.backbone is backbone
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(backbone.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(backbone(IMAGES), plain(IMAGES))
    assert not torch.equal(model(IMAGES), plain(IMAGES))
    assert model.ungate() is backbone
    assert torch.equal(backbone(IMAGES), plain(IMAGES))
    again = gate(backbone, IMAGES, open=True)
    assert torch.equal(again(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("training", [True, False])
def test_model_is_in_its_backbones_mode(training):
    backbone = custom().train(training)
    statistics = copy.deepcopy(backbone.state_dict())
    model = gate(backbone, IMAGES)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in backbone.state_dict().items())


def test_sites_are_those_that_were_asked_for():
    assert gate(custom(), IMAGES, gater=features()).num_gates == 16
    assert gate(custom(), IMAGES, gater=features(), sites="all").num_gates == 8 + 6 + 8 + 8
    model = gate(custom(), IMAGES, sites=lambda name, module: name.startswith("two"))
    assert [site.conv for site in model.sites] == ["two.layers.0"]


def test_a_gated_backbone_is_refused():
    model = gate(custom(), IMAGES, gater=features())
    before = model(IMAGES)
    for gated in (model.backbone, model, copy.deepcopy(model.backbone)):
        with pytest.raises(ValueError, match="gated already: call ungate"):
            gate(gated, IMAGES, gater=features())
    assert torch.equal(model(IMAGES), before)


def test_gated_timm_model_compiles_in_one_graph(unchecked_types):
    model = gate(create_backbone("timm:test_efficientnet").eval(), PIXELS, gater=features(), sites="all")
    assert {"inner", "depthwise"} == {site.role for site in model.sites}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(PIXELS), model(PIXELS))


def test_gated_timm_model_in_distributed_data_parallel(tmp_path):
    model = gate(create_backbone("timm:test_resnet").eval(), PIXELS, gater="test_resnet")
    expected = model(PIXELS)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert torch.equal(wrapped(PIXELS), expected)
        wrapped.train()(PIXELS).sum().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
    finally:
        torch.distributed.destroy_process_group()


def test_a_named_gater_can_see_a_smaller_image():
    model = gate(create_model("resnet20"), SMALL, gater="resnet8", shrink=2)
    assert isinstance(model.gater, Gater)
    macs = count_macs(model.eval(), SMALL)
    dense = count_macs(gate(create_model("resnet20"), SMALL, gater="resnet8").eval(), SMALL)
    assert macs.gater < 0.3 * dense.gater
    built = create_model("resnet20_gated", extractor="resnet8", shrink=2)
    assert isinstance(built, GaterNet)
    assert count_dense_macs(built.gater, SMALL) == macs.gater
    with pytest.raises(ValueError, match="shrink goes with a gater that is given by name"):
        gate(create_model("resnet20"), SMALL, gater=nn.Flatten(), shrink=2)
    with pytest.raises(ValueError, match="shrink must be at least 1, not 0"):
        create_model("resnet20_gated", shrink=0)


def test_frozen_parts_of_the_backbone_stay_in_their_mode():
    backbone = custom().train()
    backbone.stem.eval()
    before = [module.training for module in backbone.modules()]
    gate(backbone, IMAGES)
    assert [module.training for module in backbone.modules()] == before


@pytest.mark.parametrize(("name", "size"), [("resnet50", (168, 168)), ("resnet18", (64, 512))])
def test_default_gater_keeps_within_its_budget_as_a_whole(name, size):
    images = torch.zeros(1, 3, *size)
    macs = count_macs(gate(create_backbone(f"torchvision:{name}").eval(), images), images)
    assert macs.backbone > 0.5e9
    assert macs.gater <= 0.05 * macs.backbone


class Merged(nn.Conv2d):
    """Its weights are merged in evaluation and apart in training, as those of low-rank adapters are."""

    merged = False

    def train(self, mode: bool = True) -> "Merged":
        self.merged = not mode
        return super().train(mode)


def test_a_network_that_trains_otherwise_is_put_back_to_training():
    net = nn.Sequential(Merged(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).train()
    net[2].eval()
    gate(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), IMAGES, sites="all")
    assert not net[0].merged
    assert [module.training for module in net] == [True, True, False]


@pytest.mark.parametrize(
    ("images", "given"), [((IMAGES,), "tuple"), (IMAGES.numpy(), "ndarray"), (IMAGES[0], r"\(3, 8, 8\)")]
)
@pytest.mark.usefixtures("unchecked_types")
def test_an_example_that_is_no_batch_of_images_is_refused(images, given):
    with pytest.raises(ValueError, match=rf"the example must be one tensor of images \(B, .*, not {given}"):
        gate(custom(), images)


@pytest.mark.parametrize("gater", [nn.Flatten, 5])
@pytest.mark.usefixtures("unchecked_types")
def test_a_gater_is_a_network_or_a_name(gater):
    with pytest.raises(TypeError, match="gater must be a network or the name of one, not"):
        gate(custom(), IMAGES, gater=gater)


def test_a_whole_gater_is_not_taken_for_what_features_come_from():
    model = gate(custom(), IMAGES)
    for gater in (model.gater, model):
        with pytest.raises(TypeError, match="pass the extractor of your Gater"):
            gate(custom(), IMAGES, gater=gater)


def test_a_bottleneck_of_0_is_refused():
    with pytest.raises(ValueError, match="bottleneck must be at least 1"):
        gate(custom(), IMAGES, bottleneck=0)


# --- Neighbours that share a gate


@pytest.mark.parametrize("size", [4, 5])
def test_a_group_shares_a_gate(size, tmp_path):
    """Each gate opens its group's filters: the same as single gates that agree within the groups."""
    backbone = create_backbone("timm:mobilenetv3_small_050", 10).eval()
    single = gate(copy.deepcopy(backbone), PIXELS, gater=features(), sites="all").eval()
    model = gate(backbone, PIXELS, gater=features(), sites="all", group_size=size).eval()
    gates = torch.randint(2, (2, model.num_gates), generator=seeded(2)).float()
    repeated = torch.zeros(2, single.num_gates)
    for site, alone in zip(model.sites, single.sites, strict=True):
        assert site.channels == alone.channels
        assert site.group_size == math.gcd(size, alone.channels)
        repeated[:, alone.columns] = gates[:, site.columns]
    with torch.no_grad():
        expected = single.forward_gated(PIXELS, repeated)
        assert torch.equal(model.forward_gated(PIXELS, gates), expected)
        skipped = skip(model, PIXELS, "slice").forward_gated(PIXELS, gates)
        torch.testing.assert_close(skipped, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    costs = [CostModel(read_graph(backbone, PIXELS[:1]), m.sites)(g) for m, g in ((model, gates), (single, repeated))]
    assert torch.equal(*costs)
    model.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, extractor=features()).sites == model.sites


def test_a_group_has_at_least_one_filter():
    with pytest.raises(ValueError, match="group_size must be a whole number, at least 1, but is 0"):
        gate(custom(), IMAGES, group_size=0)


def test_pixels_are_to_be_normalised_outside():
    with pytest.raises(ValueError, match=r"images must be normalised, but are torch\.uint8: do that outside of the"):
        gate(custom(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_a_model_that_is_made_without_gradients_learns():
    backbone = custom()
    with torch.inference_mode():
        model = gate(backbone, torch.zeros(2, 3, 8, 8), gater="resnet8")
    logits, gates = model.train()(IMAGES, return_gates=True)
    (logits.sum() + gates.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.gater.parameters())
