"""The model card says what was saved with the model, and nothing else."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from training_runs import CPU, small

import gaternet
from gaternet.card import UNKNOWN, make_card
from gaternet.checkpoint import fingerprint
from gaternet.cost import count_dense_macs
from gaternet.data import Preprocessing
from gaternet.errors import some
from gaternet.method import GaterNet
from gaternet.train import train

TRAINED = {"recipe": "short_resnet8_gated", "data": "/home/somebody/cifar10.npz", "seed": 3, "epochs": 16}
METADATA = {
    "backbone": {"name": "resnet8", "num_classes": 3, "in_chans": 3},
    "extractor": {"name": "resnet20", "in_chans": 3},
    "classes": ["cat", "dog", "a|b"],
    "preprocessing": {"height": 32, "width": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop": 1.0},
    "trained": TRAINED | {"test_accuracy": 0.875, "density": 0.55},
}


@pytest.fixture
def model() -> GaterNet:
    torch.manual_seed(0)
    model = gaternet.create_model("resnet8_gated", 3).eval()
    assert isinstance(model, GaterNet)
    model.metadata = METADATA
    return model


def cells(path: Path) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ", 1) for line in path.read_text().splitlines() if line.startswith("| ")]
    return dict(line for line in lines if len(line) == 2)


def test_the_card_has_data_recipe_accuracy_density_cost_and_limits(model, tmp_path):
    model.save_pretrained(tmp_path)
    found = cells(tmp_path / "README.md")
    assert found["trained on"] == "cifar10"  # without the folders of somebody's machine
    assert found["recipe"] == "`short_resnet8_gated`"
    assert found["epochs, seed"] == "16, 3"
    assert found["accuracy"].startswith("87.50 %")
    assert found["open gates"].startswith("55.0 %")
    assert found["classes"] == "3: cat, dog, a\\|b"
    assert found["images"] == "32 x 32 pixels, RGB, mean 0.5 0.5 0.5, deviation 0.25 0.25 0.25"
    assert found["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    images = torch.zeros(1, 3, 32, 32)
    macs = [f"{count_dense_macs(part, images) / 1e6:,.1f}M in the" for part in (model.backbone, model.gater)]
    assert all(text in found["MACs an image"] for text in macs)
    assert UNKNOWN not in (tmp_path / "README.md").read_text()
    assert "## Limits" in (tmp_path / "README.md").read_text()
    assert "somebody" not in (tmp_path / "README.md").read_text()
    index = metadata_load(tmp_path / "README.md")
    assert index is not None
    assert index["library_name"] == "gaternet"
    assert index["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.875
    assert str(ModelCard.load(tmp_path / "README.md")) == str(make_card(model))


def test_a_model_that_nobody_trained_says_so(tmp_path):
    gaternet.create_model("resnet8_gated", 3).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    found = cells(tmp_path / "README.md")
    for name in ("trained on", "recipe", "epochs, seed", "accuracy", "open gates", "classes", "images"):
        assert found[name] == UNKNOWN
    assert "model-index" not in (metadata_load(tmp_path / "README.md") or {})


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"classes": list(range(12))}, "classes", "12: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ..."),
        ({"classes": 10}, "classes", UNKNOWN),
        ({"trained": {"epochs": 3}}, "epochs, seed", f"3, {UNKNOWN}"),
        ({"preprocessing": {"height": 8, "width": 8, "mean": 0.5, "std": 0.5}}, "images", UNKNOWN),
        ({"preprocessing": {"height": 8, "width": 8, "mean": ["a"], "std": [1]}}, "images", UNKNOWN),
        ({"preprocessing": "imagenet"}, "images", UNKNOWN),
        ({"trained": "cifar10"}, "trained on", UNKNOWN),
        ({"trained": {"data": 3}}, "trained on", UNKNOWN),
        ({"trained": {"data": "digits", "test_accuracy": "0.9", "density": "low"}}, "accuracy", UNKNOWN),
    ],
)
def test_metadata_that_somebody_wrote_by_hand_does_not_keep_a_model_from_being_saved(
    model, tmp_path, changes, name, found
):
    model.metadata = METADATA | changes
    model.save_pretrained(tmp_path)
    assert cells(tmp_path / "README.md")[name] == found


def test_metadata_that_is_no_plain_data_is_refused(model, tmp_path):
    model.metadata = METADATA | {"accuracy": torch.tensor(0.9)}
    with pytest.raises(TypeError, match="metadata must be plain data, as JSON has it: Object of type Tensor"):
        model.save_pretrained(tmp_path)


def test_a_card_of_ours_is_written_anew_and_one_of_yours_stays(model, tmp_path):
    card = tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    model.metadata = METADATA | {"trained": METADATA["trained"] | {"test_accuracy": 0.9}}
    model.save_pretrained(tmp_path)
    assert cells(card)["accuracy"].startswith("90.00 %")
    card.write_text("mine")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "mine"


def test_the_code_on_the_card_runs(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("this repository, or this folder", str(tmp_path))
    images = Preprocessing.from_metadata(METADATA).normalize(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    names: dict = {"images": images}
    exec(code, names)
    torch.testing.assert_close(names["fast"](images), names["logits"])
    assert names["gates"].shape == (2, model.num_gates)


def test_a_part_that_does_not_run_on_such_images_costs_an_unknown_number(model):
    class Particular(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("only on Sundays")

    other = GaterNet(model.ungate(), Particular(), model.sites, METADATA)
    card = str(make_card(other))
    assert f"open, {UNKNOWN} in the gater" in card
    assert "| gater | Particular |" in card
    assert "from_pretrained(" not in card


def test_what_must_be_given_to_load_the_model_stands_in_its_code(model):
    del cast(Any, model.backbone).gaternet_source  # by which it would be described anew
    model.metadata = {**METADATA, "backbone": None}
    assert 'or this folder", backbone=backbone)' in str(make_card(model))


def test_the_card_claims_nothing_of_weights_that_learned_on(model, tmp_path):
    model.metadata = METADATA | {"trained": METADATA["trained"] | {"weights": fingerprint(model)}}
    model.save_pretrained(tmp_path)
    assert cells(tmp_path / "README.md")["accuracy"].startswith("87.50 %")
    with torch.no_grad():
        model.gater.fc2.bias[0] += 1
    model.save_pretrained(tmp_path)
    found = cells(tmp_path / "README.md")
    assert {found[name] for name in ("trained on", "recipe", "accuracy", "open gates")} == {UNKNOWN}
    assert "model-index" not in (metadata_load(tmp_path / "README.md") or {})


def test_a_network_that_does_not_run_on_its_own_size_is_saved(tmp_path):
    class Picky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch._assert(images.shape[2] == 8, "wrong size")
            return self.fc(self.conv(images).mean((2, 3)))

    model = gaternet.gate(Picky(), torch.zeros(2, 3, 8, 8), gater="resnet8")
    model.metadata |= {"classes": ["a\nb"], "preprocessing": METADATA["preprocessing"]}
    model.save_pretrained(tmp_path)
    found = cells(tmp_path / "README.md")
    assert found["MACs an image"].startswith(UNKNOWN)
    assert found["classes"] == "1: a b"


def test_the_card_of_a_run_claims_what_was_measured_of_its_weights(tmp_path):
    """With averaged weights, too: those are what is judged, and saved."""
    record = train(small(epochs=1, ema_decay=0.5), tmp_path / "run", CPU)
    gaternet.load_pretrained(tmp_path / "run" / "last").save_pretrained(tmp_path / "again")
    assert cells(tmp_path / "again" / "README.md")["accuracy"].startswith(f"{100 * record['test_accuracy']:.2f} %")


def test_a_class_whose_name_is_no_utf_8_is_told_in_ascii():
    assert some(["caf\udce9", "two  words"]) == "caf\\udce9, two words"


def test_a_card_without_an_accuracy_says_nothing_of_it():
    text = str(make_card(cast(GaterNet, gaternet.create_model("resnet8_gated"))))
    assert "- No accuracy is recorded." in text
    assert "test images of that data set" not in text
