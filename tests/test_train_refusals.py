"""What cannot be trained is refused in a sentence, before anything is written."""

from typing import Any

import pytest
import torch
from torch import nn
from training_runs import CPU, small

from gaternet.models import create_model
from gaternet.train import TrainingError, train


def deep() -> nn.Module:
    """Whose last maps have one pixel."""
    network: Any = create_model("resnet8", 10, 1)
    network.conv1 = nn.Sequential(nn.AvgPool2d(4), network.conv1)
    return network


def test_one_image_a_step_is_too_few_for_batchnorm_of_vectors_and_of_single_pixels(tmp_path):
    said = "one image a step, in a process, is too few for BatchNorm, .*: raise batch_size"
    with pytest.raises(ValueError, match=said):
        train(small("resnet8_gated", batch_size=1), tmp_path / "run", CPU)
    with pytest.raises(ValueError, match=said):
        train(small("resnet8", batch_size=1), tmp_path / "run", CPU, network=deep())
    assert not (tmp_path / "run").exists()


def test_one_image_a_step_is_enough_where_batchnorm_sees_more_pixels_or_does_not_learn(tmp_path, monkeypatch):
    def begun(*args: Any) -> None:
        raise FileExistsError("begun")

    monkeypatch.setattr("gaternet.train._open_run", begun)
    network = create_model("resnet8", 10, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(FileExistsError, match="begun"):
        train(small("resnet8", batch_size=1), tmp_path / "run", CPU, network=network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(FileExistsError, match="begun"):
        train(small("resnet8_gated", batch_size=1, freeze="gater"), tmp_path / "run", CPU)


@pytest.mark.parametrize("width", [10**14, 10**18, 10**20])
def test_a_network_that_no_memory_holds_is_refused(tmp_path, width):
    with pytest.raises(TrainingError, match=r"the network does not fit into memory \(.+\): name a smaller one"):
        train(small("resnet8_gated", bottleneck=width), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_squares_that_cover_every_image_whole_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cutout 15 covers images of 8 x 8 pixels whole: lower it"):
        train(small("resnet8", cutout=15), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()
    assert train(small("resnet8", cutout=14, epochs=1), tmp_path / "run", CPU)["epoch"] == 1


def test_a_recipe_for_gates_takes_no_plain_network(tmp_path):
    with pytest.raises(ValueError, match="resnet20_gated trains gates, and the network has none: gate it with"):
        train(small("resnet20_gated"), tmp_path / "run", CPU, network=create_model("resnet8", 10, 1))
    assert not (tmp_path / "run").exists()


def test_what_was_frozen_for_a_training_learns_again_afterwards(tmp_path):
    network: Any = create_model("resnet8_gated", 10, 1, extractor="resnet8")
    network.gater.fc1.bias.requires_grad_(False)  # the caller's own wish
    train(small("resnet8_gated", epochs=1, freeze="backbone"), tmp_path / "run", CPU, network=network)
    assert [name for name, tensor in network.named_parameters() if not tensor.requires_grad] == ["gater.fc1.bias"]


@pytest.mark.parametrize(("resume", "said"), [(False, "holds a run already"), (True, "holds no run to resume")])
def test_a_folder_that_will_not_do_is_told_before_images_are_read(tmp_path, monkeypatch, resume, said):
    if not resume:
        (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("gaternet.train.load_data", lambda *args: pytest.fail("it read images"))
    with pytest.raises(ValueError, match=said):
        train(small("resnet8"), tmp_path, CPU, resume=resume)
