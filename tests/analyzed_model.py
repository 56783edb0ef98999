"""A gated model, and images with labels, of which tests read the gates."""

import torch
from small_networks import seeded
from torch import nn

from gaternet import Gater, GaterNet, create_model
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
    return model.eval()


MODEL = make_model()
