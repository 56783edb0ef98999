"""Reading a network's graph leaves the network as it was."""

import copy
import pickle

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


class Grows(Keeps):
    """A table that is made in the first run, as positions often are; and a part, and an attribute behind a property."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None
        self.register_buffer("table", None)

    @property
    def cache(self) -> Tensor:
        return self.__dict__["cache"]

    def forward(self, images: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8)[:, None, None]
            self.part = nn.Conv2d(3, 8, 1)
        self.__dict__["cache"] = self.conv(images) + self.part(images) + self.table
        return self.head(self.cache.mean((2, 3)))


def test_what_a_network_makes_in_its_first_run_is_made_in_a_real_one():
    network = Grows().eval()
    gaternet.find_sites(network, IMAGES)
    assert network.table is None
    assert list(network.state_dict()) == list(Grows().state_dict())
    assert "cache" not in vars(network)
    model = gaternet.gate(network, IMAGES, gater=nn.Sequential(conv(3, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert copy.deepcopy(model)(IMAGES).isfinite().all()
