"""Gate somebody else's trained network: the CIFAR-10 ResNets of Y. Idelbayev's pytorch_resnet_cifar10.

python examples/pretrained_cifar_resnet.py resnet20-12fca82f.th

Their architecture is not ours (shortcuts subsample and pad with zeros) and nothing in it knows of gates. One call of
`gaternet.gate` with `open=True`, and it computes the very same logits, with a gate behind every filter.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gaternet
from gaternet.files import load_tensors


class Unit(nn.Module):
    """Two convolutions, and a shortcut without weights."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pad = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Images (B, 3, 32, 32) to logits (B, 10)."""

    # What the weights were trained with, under the name that timm has for it
    pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # noqa: RUF012

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, channels) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            units = [
                Unit(before if i == 0 else channels, channels, 2 if stage > 1 and i == 0 else 1) for i in range(depth)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.get_submodule("layer3")(self.get_submodule("layer2")(self.get_submodule("layer1")(x)))
        return self.linear(x.mean((2, 3)))


def load(path: Path) -> ResNet:
    """The network in one of their files, in evaluation mode; its depth is read from the file."""
    state = {name.removeprefix("module."): value for name, value in load_tensors(path)["state_dict"].items()}
    units = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layer1."))
    network = ResNet(units)
    network.load_state_dict(state)
    return network.eval()


def main() -> None:
    """Gate the network that the command line names, and compare."""
    network = load(Path(sys.argv[1]))
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        model = gaternet.gate(network, images, sites="all", open=True)
        logits, gates = model(images, return_gates=True)
    print(f"{gates.shape[1]:,} gates, {gates.mean():.0%} open; same logits: {torch.equal(logits, before)}")
    print(gaternet.count_macs(model, images[:1]))


if __name__ == "__main__":
    main()
