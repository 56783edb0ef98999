"""The examples run, and somebody else's trained networks keep their accuracy when they are gated."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from pretrained_cifar_resnet import ResNet, load
from torch import nn

import gaternet

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_save_digits(monkeypatch, tmp_path):
    run(monkeypatch, "save_digits.py", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{digit}.png" for digit in range(10)]
    with Image.open(tmp_path / "3.png") as image:
        assert image.size == (8, 8)


def test_pretrained_cifar_resnet(monkeypatch, tmp_path, capsys):
    state = {f"module.{name}": value for name, value in ResNet(3).state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "net.th")
    run(monkeypatch, "pretrained_cifar_resnet.py", tmp_path / "net.th")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "688 gates, 100% open; same logits: True"
    assert second.startswith("Macs(backbone=40551040, gater=")


@pytest.mark.parametrize(
    "file", ["resnet20-12fca82f.th", "resnet32-d509ac18.th", "resnet44-014dd654.th", "resnet56-4bfd9763.th"]
)
def test_trained_networks_of_others_start_as_they_were(shared, file):
    network = load(shared / "data" / "cifar_resnets" / file)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = network(images)
        model = gaternet.gate(network, images, sites="all", open=True)
        logits, gates = model(images, return_gates=True)
        assert torch.equal(logits, plain)
        assert gates.all()
    convs = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert [site.conv for site in model.sites] == convs  # every filter of the network
