"""A gated model, and images with labels, of which tests read the gates."""

from typing import Any

import numpy as np
import torch
from small_networks import seeded
from torch import nn

from gaternet import Gater, GaterNet, count_macs, create_model
from gaternet.data import Preprocessing

PIXELS = Preprocessing(16, 16, (0.5,) * 3, (0.25,) * 3)


IMAGES = torch.randint(0, 256, (90, 3, 16, 16), generator=seeded(0), dtype=torch.uint8)


LABELS = torch.randint(0, 5, (90,), generator=seeded(1))  # of 7 classes, two have no images


def make_model(classes: int = 7) -> GaterNet:
    torch.manual_seed(0)
    model = create_model("resnet20_gated", classes)
    assert isinstance(model, GaterNet)
    assert isinstance(model.gater, Gater)
    nn.init.normal_(model.gater.fc2.weight, 0, 2, generator=seeded(3))
    nn.init.normal_(model.gater.fc2.bias, 0, 4, generator=seeded(4))
    for module in model.modules():  # statistics of the images, so that gates and logits depend on them
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(PIXELS.normalize(IMAGES))
        model.eval()
        model.backbone.get_parameter("fc.bias").sub_(model(PIXELS.normalize(IMAGES)).mean(0))  # so that classes differ
    return model


MODEL = make_model()


def batches(size: int = 32, labels: bool = True) -> list[Any]:
    parts = list(zip(IMAGES.split(size), LABELS.split(size), strict=True))
    return parts if labels else [images for images, _ in parts]


@torch.no_grad()
def recount() -> dict[str, np.ndarray]:
    """What the model does with each image, all at once."""
    inputs = PIXELS.normalize(IMAGES)
    logits, gates = MODEL(inputs, return_gates=True)
    assert isinstance(MODEL.gater, Gater)
    found = {"gates": gates.bool(), "predictions": logits.argmax(1), "scores": MODEL.gater.logits(inputs)}
    return {name: value.numpy() for name, value in found.items()} | {"macs": count_macs(MODEL, inputs).gated.numpy()}
