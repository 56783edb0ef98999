"""Costs that are counted in any mode, and leave the model as it was."""

import copy

import pytest
import torch
from random_networks import chain_of
from small_networks import IMAGES, conv, norm
from torch import nn

import gaternet
from gaternet.cost import CostModel


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
