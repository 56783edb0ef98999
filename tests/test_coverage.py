"""Every family of CNNs of timm and torchvision keeps gating's promises: benchmarks/families.py, as tests.

The fastest of thirty families run with the others; `make sweep` runs all.
"""

import json
from typing import Any

import families
import pytest
import torch
import torchvision
from torch import nn

import gaternet
from gaternet.models.create import create_backbone

ROWS = json.loads(families.MODELS.read_text())


def _family(model: str) -> str:
    """timm has one network of each in the list, torchvision all of them."""
    library, name = model.split(":")
    return model if library == "timm" else torchvision.models.get_model_builder(name).__module__


_FASTEST: dict[str, str] = {}  # of each family
for _row in sorted(ROWS, key=lambda row: row["seconds"]):
    _FASTEST.setdefault(_family(_row["model"]), _row["model"])
FAST = list(_FASTEST.values())[:30]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row["model"], marks=[] if row["model"] in FAST else [pytest.mark.slow]) for row in ROWS],
)
def test_gating_keeps_its_promises(row: dict[str, Any], unchecked_types):
    found = families.check(row["model"])
    for volatile in ("seconds", "pixels", "macs"):
        found.pop(volatile)
    assert found == {name: row[name] for name in found}  # as docs/coverage.md says


def test_the_page_is_that_of_the_recorded_rows():
    words, recorded = (text.split("\n\n") for text in (families.page(ROWS), families.PAGE.read_text()))
    assert words[0] == recorded[0]
    assert words[2:] == recorded[2:]  # between them are the versions


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:mobilenetv3_small_050", "timm:regnetx_002"])
def test_compiled_families_compute_the_same(name, unchecked_types):
    backbone, images = create_backbone(name, 10), torch.randn(2, 3, 64, 64)
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = gaternet.gate(backbone, images, gater=extractor, sites="all").eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(images), model(images))
        assert not torch.equal(model(images), backbone(images))
