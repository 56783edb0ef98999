"""Costs that are counted in any mode, and leave the model as it was."""

import copy
from typing import Any

import pytest
import torch
from random_networks import chain_of
from small_networks import IMAGES, Net, conv, norm, seeded
from torch import Tensor, nn

import gaternet
from gaternet.cost import CostModel, count_dense_macs


def model_of(extractor: nn.Module) -> gaternet.GaterNet:
    gater = nn.Sequential(extractor, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return gaternet.gate(chain_of(["residual"]), IMAGES, gater=gater)


def test_a_cost_that_is_made_or_first_asked_without_gradients_has_some_later():
    model = model_of(conv(3, 6)).eval()
    with torch.inference_mode():
        cost = CostModel.of(model, IMAGES)
        assert cost(model.gates(IMAGES)).shape == (2,)
    gates = torch.ones(2, model.num_gates, requires_grad=True)
    cost(gates).sum().backward()
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad[0].double(), cost.savings())


def test_constants_that_were_moved_without_gradients_have_some_later():
    """As to a GPU; here to another precision."""
    cost = CostModel.of(model := model_of(conv(3, 6)).eval(), IMAGES)
    gates = torch.ones(1, model.num_gates + 1)
    with torch.inference_mode():
        cost._terms(gates)
    cost._terms(gates.requires_grad_()).sum().backward()
    assert gates.grad is not None


def test_statistics_are_as_before_where_counting_fails():
    model = model_of(nn.Sequential(conv(3, 6), norm(6))).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # BatchNorm's, of one image
        gaternet.count_macs(model, IMAGES[:1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_transposed_convolution_by_its_general_name_is_none():
    """It reads by filters and writes by channels: counted as a convolution it made negative costs."""

    def body(net: Any, x: Tensor) -> Tensor:
        x = net.conv(x).relu()
        return torch.convolution(x, net.up, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)

    net = Net(body, conv=conv(3, 8), up=nn.Parameter(torch.randn(8, 8, 2, 2, generator=seeded(0)))).eval()
    model = gaternet.gate(net, IMAGES, gater=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), sites="all").eval()
    assert [site.conv for site in model.sites] == ["conv"]
    cost = CostModel.of(model, IMAGES)
    assert cost(torch.ones(1, 8)).item() == cost.dense == count_dense_macs(net, IMAGES)
    assert cost(torch.zeros(1, 8)).item() == cost.dense - 8 * 8 * 27 * 8
    found = gaternet.skip(model, IMAGES, "slice")(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(found, model(IMAGES))


def test_a_hook_that_undoes_what_gates_closed_is_refused_and_one_that_looks_is_not():
    model = model_of(conv(3, 6)).eval()
    plain = gaternet.count_macs(model, IMAGES)
    module = model.backbone.get_submodule(model.sites[0].name)
    seen = []
    module.register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    torch.testing.assert_close(gaternet.count_macs(model, IMAGES).gated, plain.gated)
    assert seen

    def lift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 1

    handle = module.register_forward_hook(lift)
    for count in (gaternet.count_macs, lambda model, images: gaternet.analyze(model, [images])):
        with pytest.raises(ValueError, match=f"a hook on {model.sites[0].name} acts behind its gates"):
            count(model, IMAGES)
    handle.remove()
    torch.testing.assert_close(gaternet.count_macs(model, IMAGES).gated, plain.gated)


class Attending(nn.Module):
    """Pools by a learned query, of which a layer is given a view; and counts its calls, as observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU())
        self.query, self.look, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        found = self.stem(x).flatten(2)
        shares = (self.look(self.query.expand(len(x), -1, -1)) @ found).softmax(-1)
        return self.fc((shares @ found.transpose(1, 2))[:, 0])


def test_views_of_parameters_and_images_with_gradients_are_counted_and_buffers_stay():
    network = Attending().eval()
    model = gaternet.gate(network, IMAGES, sites="all").eval()
    counted = gaternet.count_macs(model, IMAGES.clone().requires_grad_())
    assert counted.backbone == 8 * 8 * 9 * (3 * 8 + 8 * 8) + 8 * 8 + 2 * 8 * 64 + 8 * 4  # convolutions, query, pooling
    assert network.get_buffer("calls") == 0
    normed = torch.nn.utils.parametrizations.weight_norm(conv(3, 8))
    with torch.inference_mode():
        assert count_dense_macs(normed, IMAGES) == 8 * 8 * 9 * 3 * 8


@pytest.mark.parametrize(
    "use",
    [
        lambda model: gaternet.count_macs(model, IMAGES),
        lambda model: gaternet.skip(model, IMAGES),
        lambda model: model.save_pretrained("never"),
    ],
)
def test_what_was_wrapped_after_gating_is_named(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = gaternet.gate(Net(lambda net, x: net.b(net.a(x)), a=conv(3, 8), b=conv(8, 8)), IMAGES, sites="all").eval()
    use(copy.deepcopy(model))
    wrapped: Any = model.backbone
    wrapped.b = nn.Sequential(wrapped.b, nn.Sigmoid())
    with pytest.raises(ValueError, match=r"^b was replaced or wrapped after gating.*change the backbone first"):
        use(model)
