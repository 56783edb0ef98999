"""Batches: from memory and from files, augmented, in an order that seed and epoch decide."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from gaternet.augment import DRAWS, GREY, augment_batch, file_transform
from gaternet.data import DataError, ImageSet, load_data
from gaternet.loader import _cores, make_batches
from gaternet.machine import make_accelerator
from gaternet.recipe import Augmentation, Runtime

CPU = Runtime(cpu=True, precision="no", workers=0)


@pytest.fixture
def accelerator() -> Accelerator:
    return make_accelerator(CPU)


def numbered(count: int, augmentation: Augmentation | None = None) -> ImageSet:
    """Images whose labels are their numbers."""
    images = torch.randint(0, 256, (count, 3, 16, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, list(range(count)), augmentation)


def labels_of(batches: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


# --- Images in memory


def test_without_a_seed_all_images_come_as_they_are_and_in_order(accelerator):
    images = numbered(10, Augmentation())
    batches = make_batches(images, 4, CPU, accelerator)
    found = list(batches.epoch())
    assert len(batches) == 3
    assert labels_of(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert isinstance(images.images, Tensor)
    assert torch.equal(torch.cat([pixels for pixels, _ in found]), images.images)


def test_with_a_seed_order_and_pixels_are_a_function_of_seed_epoch_and_index(accelerator):
    augmentation = Augmentation(cutout=4, policy="autoaugment")
    batches = make_batches(numbered(10, augmentation), 4, CPU, accelerator, seed=1)
    state = torch.get_rng_state()
    found = list(batches.epoch(2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are disturbed
    assert len(batches) == len(found) == 2
    assert len({label for labels in labels_of(found) for label in labels}) == 8  # whole batches, no image twice
    torch.manual_seed(99)
    assert same(found, list(batches.epoch(2)))
    assert same(found[1:], list(batches.epoch(2, skip=1)))
    assert labels_of(found) != labels_of(list(batches.epoch(3)))
    other = make_batches(numbered(10, augmentation), 4, CPU, accelerator, seed=2)
    assert labels_of(found) != labels_of(list(other.epoch(2)))


def test_an_image_is_treated_differently_each_epoch(accelerator):
    images = numbered(1, Augmentation())
    batches = make_batches(images, 1, CPU, accelerator, seed=0)
    seen = {next(iter(batches.epoch(epoch)))[0].numpy().tobytes() for epoch in range(20)}
    assert len(seen) > 10


def test_processes_share_each_batch(accelerator, monkeypatch):
    images = numbered(13, Augmentation())
    whole = list(make_batches(images, 6, CPU, accelerator, seed=1).epoch(1))
    parts = []
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    for rank in range(3):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        parts.append(list(make_batches(images, 6, CPU, accelerator, seed=1).epoch(1)))
    for step, (pixels, labels) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert torch.equal(part[step][0], pixels[rank::3])
            assert torch.equal(part[step][1], labels[rank::3])


def test_a_process_without_an_image_of_the_last_batch_gets_none(accelerator, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    sizes = []
    for rank in range(2):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        sizes.append(
            [len(labels) for _, labels in make_batches(numbered(5, Augmentation()), 4, CPU, accelerator).epoch()]
        )
    assert sizes == [[2, 1], [2]]


def slowly(image: Tensor, options: Augmentation, draws: list[float]) -> Tensor:
    """One image's crop, flip and cutout, the obvious way."""
    height, width = image.shape[1:]
    if options.crop:
        down, right = round(height / 8), round(width / 8)
        top, left = int(draws[0] * (2 * down + 1)), int(draws[1] * (2 * right + 1))
        image = F.pad(image, (right, right, down, down))[:, top : top + height, left : left + width]
    if options.flip and draws[2] < 0.5:
        image = image.flip(2)
    if options.cutout:
        y, x = int(draws[3] * height) - options.cutout // 2, int(draws[4] * width) - options.cutout // 2
        image = image.clone()
        image[:, max(0, y) : max(0, y + options.cutout), max(0, x) : max(0, x + options.cutout)] = GREY
    return image


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 6])
def test_batches_are_augmented_as_single_images_would_be(crop, flip, cutout):
    options = Augmentation(crop, flip, cutout)
    images, draws = numbered(64).images, torch.rand(64, DRAWS, generator=torch.Generator().manual_seed(1))
    assert isinstance(images, Tensor)
    expected = torch.stack([slowly(images[i], options, draws[i].tolist()) for i in range(64)])
    assert torch.equal(augment_batch(images, options, draws, seed=0), expected)


def test_draws_reach_every_place():
    """Crops lie evenly over all their places: the corner pixel of a moved image comes from each."""
    images = torch.arange(16 * 8, dtype=torch.uint8).view(1, 1, 16, 8).repeat(3000, 1, 1, 1) + 1
    draws = torch.rand(3000, DRAWS, generator=torch.Generator().manual_seed(1))
    found = augment_batch(images, Augmentation(crop=True, flip=False), draws, seed=0)[:, 0, 2, 1]
    counts = found.bincount()
    assert (counts > 0).sum() == 5 * 3
    assert 120 < counts[counts > 0].min() <= counts.max() < 280  # 200 each


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_change_pixels_as_their_seed_says(policy, channels):
    images = torch.randint(0, 256, (20, channels, 16, 16), dtype=torch.uint8)
    options, draws = Augmentation(crop=False, flip=False, policy=policy), torch.rand(20, DRAWS)
    found = [augment_batch(images, options, draws, seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], images)
    assert (found[0].dtype, found[0].shape) == (torch.uint8, images.shape)


# --- Images in files


@pytest.fixture
def folder(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                pixels = torch.randint(0, 256, (20, 12, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_all_processes_leave_those_that_read_files_alone(folder, accelerator, signum):
    batches = make_batches(load_data(str(folder), Augmentation(), 8).train, 1, replace(CPU, workers=1), accelerator, 0)
    epoch = batches.epoch()
    first = [next(epoch)]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signum)
    assert len([*first, *epoch]) == 10


def test_processes_that_read_files_end_with_the_error_of_one_of_them(folder, accelerator):
    """Also while somebody holds the error, as Python's prompt and notebooks do."""
    data = load_data(str(folder), Augmentation(), 8)
    os.truncate(folder / "train" / "dog" / "4.png", 40)
    for workers in (0, 2):
        batches = make_batches(data.train, 1, replace(CPU, workers=workers), accelerator, seed=0)
        with pytest.raises(DataError, match=r"^cannot read image \S+4.png") as held:
            list(batches.epoch())
        assert multiprocessing.active_children() == []
        assert (len(held.traceback) > 3) == (workers == 0)  # where it arose, if that was here


def test_files_are_augmented_as_seed_epoch_and_index_say(folder, accelerator):
    augmentation = Augmentation(cutout=3, policy="randaugment")
    batches = make_batches(load_data(str(folder), augmentation, 8).train, 4, CPU, accelerator, seed=0)
    state = torch.get_rng_state()
    first = list(batches.epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(batches) == len(first) == 2
    assert first[0][0].shape == (4, 3, 8, 8)
    second = list(batches.epoch(1))
    assert not same(first, second)
    assert same(second[1:], list(batches.epoch(1, skip=1)))
    assert same(first, list(batches.epoch(0)))


def test_a_process_of_several_goes_on_with_the_files_of_the_epoch(folder, accelerator, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        images = load_data(str(folder), Augmentation(), 8).train
        whole = list(make_batches(images, 4, CPU, accelerator, seed=0).epoch(3))
        resumed = make_batches(images, 4, CPU, accelerator, seed=0)  # as in a new process
        assert same(whole[1:], list(resumed.epoch(3, skip=1)))
        seen += [pixels for batch, _ in whole for pixels in batch]
    assert len({pixels.numpy().tobytes() for pixels in seen}) == 8  # no image twice


def test_files_to_test_on_are_fitted_and_nothing_else(folder, accelerator):
    images = load_data(str(folder), Augmentation(), 8).test
    found = torch.cat([pixels for pixels, _ in make_batches(images, 4, CPU, accelerator).epoch()])
    assert torch.equal(found, torch.stack([images[i][0] for i in range(10)]))
    resized = v2.functional.resize(v2.functional.pil_to_tensor(Image.open(folder / "test" / "cat" / "0.png")), [15, 9])
    assert torch.equal(found[0], v2.functional.center_crop(resized, [8, 8]))


def test_files_are_mirrored_without_crops_too(folder):
    images = load_data(str(folder), Augmentation(crop=False, flip=True), 8).train
    assert isinstance(images.images, np.ndarray)
    mirrored = []
    for name in images.images:
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(os.fsdecode(name))  # no resizing is needed
    for i, path in enumerate(images.images):
        pixels, straight = images[i][0], v2.functional.pil_to_tensor(Image.open(os.fsdecode(path)))
        mirrored.append(torch.equal(pixels, straight.flip(2)))
        assert mirrored[-1] or torch.equal(pixels, straight)
    assert 0 < sum(mirrored) < len(mirrored)


@pytest.mark.parametrize(
    ("policy", "of_batches", "of_files"),
    [
        ("autoaugment", v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)),
        ("randaugment", v2.RandAugment(), v2.RandAugment()),
        ("trivialaugment", v2.TrivialAugmentWide(), v2.TrivialAugmentWide()),
    ],
)
def test_policies_are_torchvisions(policy, of_batches, of_files):
    options = Augmentation(crop=False, flip=False, policy=policy)
    images, draws = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), torch.rand(16, DRAWS)
    of_file = file_transform(options, 16)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torch.cat([of_batches(part) for part in images.split(8)])  # eight neighbours are treated alike
        assert torch.equal(augment_batch(images, options, draws, seed), expected)
        torch.manual_seed(seed)
        expected = of_files(images[0])
        torch.manual_seed(seed)
        assert torch.equal(of_file(images[0]), expected)


def test_an_image_is_treated_differently_by_each_seed(accelerator):
    images = ImageSet(torch.randint(0, 256, (1, 3, 16, 8), dtype=torch.uint8), [0], Augmentation())
    batches = [make_batches(images, 1, CPU, accelerator, seed=seed) for seed in range(20)]
    assert len({next(iter(each.epoch()))[0].numpy().tobytes() for each in batches}) > 10


def test_a_policy_does_something_else_in_each_epoch_and_step(accelerator):
    pixels = torch.randint(0, 256, (1, 3, 16, 8), dtype=torch.uint8).repeat(10, 1, 1, 1)
    images = ImageSet(pixels, [0] * 10, Augmentation(crop=False, flip=False, policy="trivialaugment"))
    batches = make_batches(images, 1, CPU, accelerator, seed=0)
    seen = [[batch.numpy().tobytes() for batch, _ in batches.epoch(epoch)] for epoch in range(10)]
    assert len(set(seen[0])) > 5
    assert len({steps[0] for steps in seen}) > 5


def test_processes_that_read_files_share_the_cores_that_are_allowed(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)), raising=False)
    for local, each in ((None, 12), ("2", 6), ("16", 1)):
        if local is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert _cores() == each
