"""Reading a network's graph leaves the network as it was."""

import copy
import logging
import pickle
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_networks import IMAGES, Net, conv
from torch import Tensor, nn

import gaternet
from gaternet.graph import read_graph
from gaternet.modes import quiet


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


def test_networks_can_be_read_by_several_threads():
    networks = [nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)) for _ in range(4)]
    together = threading.Barrier(len(networks))  # torch.export takes one at a time

    def read(network: nn.Module) -> int:
        together.wait()
        return len(read_graph(network, IMAGES).convs)

    with ThreadPoolExecutor(len(networks)) as pool:
        assert list(pool.map(read, networks)) == [2] * len(networks)


def test_a_network_may_run_while_another_thread_reads_it():
    """Exporting puts tensors without numbers in the place of weights."""
    network = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen: list[bool] = []

    class Watches(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(network.training and all(type(part) is nn.Parameter for part in network.parameters()))
            return images

    network.append(Watches())
    graph = read_graph(network, IMAGES)
    assert seen
    assert all(seen)
    assert graph.modules["0"] is network[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class Uncopied(nn.Module):
    """Has what no copy can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lock = conv(3, 8), threading.Lock()

    def forward(self, images: Tensor) -> Tensor:
        with self.lock:
            self.seen = self.conv(images)
        return self.seen


def test_a_network_that_cannot_be_copied_is_read_all_the_same():
    network = Uncopied()
    assert len(read_graph(network, IMAGES).convs) == 1
    assert not hasattr(network, "seen")
    assert network.training


class Loud(nn.Module):
    """Says much, and then decides by the numbers, which cannot be exported."""

    def forward(self, images: Tensor) -> Tensor:
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("torch").error("an error")
        print("a graph", file=sys.stderr)
        return images if images.sum() > 0 else -images


def test_a_network_that_cannot_be_exported_is_one_sentence(capsys, recwarn, caplog):
    with pytest.raises(ValueError, match="Loud cannot be exported"):
        read_graph(Loud(), IMAGES)
    assert capsys.readouterr() == ("", "")
    assert not recwarn
    assert "an error" not in caplog.text


def test_threads_that_export_at_once_leave_logs_and_stderr_as_they_were():
    """One that leaves before the other would else give it the other's silence back."""
    before, inside, left = (sys.stderr, logging.root.manager.disable), threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            inside.set()
            time.sleep(0.2)
        left.set()

    def second() -> None:
        inside.wait()
        with quiet():
            left.wait(1)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(first), pool.submit(second)]:
            each.result()
    assert (sys.stderr, logging.root.manager.disable) == before


def test_images_of_another_precision_than_the_weights_are_refused():
    for images in (IMAGES.double(), IMAGES.half()):
        with pytest.raises(
            ValueError, match=r"conv takes torch\.float\d\d with weights of torch\.float32: give images"
        ):
            read_graph(Net(lambda net, x: net.conv(x), conv=conv(3, 8, bias=False)), images)


def test_a_scripted_module_is_named():
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        scripted: Any = torch.jit.script(nn.ReLU())
    net = Net(lambda net, x: net.act(net.conv(x)), conv=conv(3, 8), act=scripted)
    with pytest.raises(ValueError, match="act is a ScriptModule: pass the module that it was made from"):
        read_graph(net, IMAGES)


class Unsized(Net):
    """Has no length to tell, as what torch.compile makes of a network has none."""

    def __len__(self) -> int:
        raise TypeError("no length")


def test_a_network_is_not_asked_for_its_length():
    graph = read_graph(Unsized(convolved, conv=conv(3, 8)), IMAGES)
    assert [found.name for found in graph.convs.values()] == ["conv"]


def test_a_backbone_that_was_compiled_by_itself_is_refused():
    model: Any = gaternet.gate(Net(convolved, conv=conv(3, 8)), IMAGES).eval()
    model.backbone = torch.compile(model.backbone, backend="eager")
    for read in (gaternet.count_macs, gaternet.skip):
        with pytest.raises(ValueError, match=r"compiled by itself: let torch.compile take the GaterNet around it"):
            read(model, IMAGES)


def test_networks_without_numbers_are_read():
    graph = read_graph(Net(convolved, conv=conv(3, 8)).to("meta"), IMAGES.to("meta"))
    assert [found.name for found in graph.convs.values()] == ["conv"]


def convolved(parts: Any, x: Tensor) -> Tensor:
    return parts.conv(x).relu()
