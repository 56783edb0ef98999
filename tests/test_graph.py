"""Reading a network's graph leaves the network as it was."""

import copy
import pickle

import pytest
import torch
from small_networks import IMAGES, conv
from torch import Tensor, nn

import gaternet


class Keeps(nn.Module):
    """What it computed last can be looked at, say for a map of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), nn.Linear(8, 4)
        self.before = None

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.before = self.conv(images)
        return self.head(self.seen.relu().mean((2, 3)))


def test_what_a_network_keeps_of_a_run_is_of_no_run_without_numbers(tmp_path):
    network = Keeps().eval()
    gaternet.find_sites(network, IMAGES)
    assert not hasattr(network, "seen")
    assert network.before is None
    pickle.dumps(copy.deepcopy(network))
    gater = nn.Sequential(conv(3, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = gaternet.gate(network, IMAGES, gater=gater).eval()
    with torch.no_grad():
        assert torch.equal(gaternet.skip(model, IMAGES, "mask")(IMAGES), model(IMAGES))
    gaternet.export_onnx(model, IMAGES, tmp_path / "model.onnx")
    gaternet.count_macs(model, IMAGES)
    assert network.seen.isfinite().all()  # of a real run
    pickle.dumps(copy.deepcopy(model))


def test_pixels_are_to_be_normalised_outside():
    with pytest.raises(ValueError, match=r"images must be normalised, but are torch\.uint8: do that outside of the"):
        gaternet.gate(Keeps(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
