"""Data sets: what is read, what is refused, and how pixels become inputs."""

import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from data_files import write_folder, write_npz
from PIL import Image
from small_networks import seeded
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

from gaternet.augment import GREY
from gaternet.data import TORCHVISION, DataError, Preprocessing, ToInput, load_data, mix_seed, read_image
from gaternet.recipe import Augmentation


def test_digits_are_embedded_and_split_by_class():
    data = load_data("digits")
    assert isinstance(data.train.images, Tensor)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.max() == 255
    assert set(np.bincount(data.test.labels)) <= {35, 36, 37}  # stratified
    assert data.classes == tuple("0123456789")


def test_npz_keeps_pixels_and_measures_statistics(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    data, arrays = load_data(path), np.load(path)
    image, label = data.train[7]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), arrays["x_train"][7])
    assert label == arrays["y_train"][7, 0]
    pixels = arrays["x_train"] / 255
    np.testing.assert_allclose(data.preprocessing.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.preprocessing.std, pixels.std((0, 1, 2)), rtol=1e-12)
    normal = data.preprocessing.normalize(data.train.take(range(20)))
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)


def test_grey_npz_without_a_channel_axis_has_one_channel(tmp_path):
    x = np.zeros((20, 6, 8), np.uint8)
    data = load_data(write_npz(tmp_path / "a.npz", x_train=x, x_test=x[:5]))
    assert data.preprocessing.channels == 1
    assert data.preprocessing.std == (1 / 255,)  # constant images do not divide by zero


BAD_ARRAYS = {
    "float images": ({"x_train": np.zeros((20, 6, 8, 3))}, "x_train .* must be uint8 images"),
    "two channels": ({"x_train": np.zeros((20, 6, 8, 2), np.uint8)}, "x_train .* must be uint8 images"),
    "other channels in test": ({"x_test": np.zeros((5, 6, 8, 1), np.uint8)}, "1 channels, x_train has 3"),
    "no images": ({"x_train": np.zeros((0, 6, 8, 3), np.uint8), "y_train": np.zeros(0, int)}, "must be uint8 images"),
    "too few labels": ({"y_train": np.arange(19)}, "y_train .* must be 20 integers"),
    "float labels": ({"y_train": np.zeros(20)}, "y_train .* must be 20 integers"),
    "labels that are no numbers of classes": ({"y_train": np.arange(20) * 10**8}, "go up to 1900000000, of 20 images"),
    "one class": ({"y_train": np.zeros(20, int), "y_test": np.zeros(8, int)}, "number two classes or more from 0 on"),
    "labels that begin with 1": ({"y_train": np.arange(20) % 4 + 1}, "begin with 1: number the classes from 0 on"),
    "negative label": ({"y_train": np.arange(20) - 1}, r"from -1 to 18, but must lie in \[0, 19\)"),
    "label beyond the classes": ({"y_test": np.array([0, 1, 2, 3, 4])}, r"from 0 to 4, but must lie in \[0, 4\)"),
    "missing array": ({"y_test": None}, "has no array y_test"),
    "pickled objects": ({"y_train": np.array([object()] * 20)}, "damaged or no .npz file of plain arrays"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_npz_is_refused_in_one_sentence(tmp_path, case):
    changes, message = BAD_ARRAYS[case]
    with pytest.raises(DataError, match=message) as error:
        load_data(write_npz(tmp_path / "a.npz", **changes))
    assert "\n" not in str(error.value)


def test_damaged_or_missing_npz_is_refused(tmp_path):
    path = Path(write_npz(tmp_path / "a.npz"))
    whole = path.read_bytes()
    np.savez_compressed(path, **np.load(path))
    packed = path.read_bytes()
    np.save(tmp_path / "a.npy", np.zeros((20, 6, 8, 3), np.uint8))
    single = (tmp_path / "a.npy").read_bytes()
    directory = packed.rindex(b"PK\1\2")  # says how the last array is packed: flags at 8, method at 10
    flipped = [packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :] for at in (100, directory + 8, directory + 10)]
    for damaged in (whole[:500], single, *flipped):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged or no"):
            load_data(str(path))
    with pytest.raises(DataError, match="no file"):
        load_data(str(tmp_path / "b.npz"))
    with pytest.raises(DataError, match="no data 'cifar11'"):
        load_data("cifar11")


def test_images_of_unlike_sizes_are_refused_or_brought_to_one(tmp_path):
    path = write_npz(tmp_path / "a.npz", x_test=np.zeros((5, 6, 6, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.npz are 6 x 8 and 6 x 6: bring both to one size with --image-size"):
        load_data(path)
    assert load_data(path, image_size=4).test[0][0].shape == (3, 4, 4)


def test_cutout_counts_the_pixels_that_are_seen(tmp_path):
    folder = tmp_path / "a"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (256, 256), "red").save(folder / name / f"{i}.png")
    for crop in (True, False):
        data = load_data(str(folder), Augmentation(crop=crop, flip=False, cutout=8), image_size=16, seed=1)
        for epoch in range(4):
            data.train.set_epoch(epoch)
            grey = (data.train[0][0] == GREY).all(0).sum()
            assert 16 <= grey <= 64


def test_corrupt_image_is_named_also_through_a_worker_process(tmp_path):
    data = load_data(write_folder(tmp_path / "a", "train", "test"), image_size=8)
    bad = tmp_path / "a" / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^cannot read image .*1\.png .*remove the file$"):
            list(DataLoader(data.train, num_workers=workers))


def test_a_command_ends_where_readers_meet_a_corrupt_image(tmp_path, gaternet_command):
    """An error's traceback keeps the readers alive, and at the end the process waits for them."""
    folder = write_folder(tmp_path / "a", "train", "test")
    (tmp_path / "a" / "train" / "cat" / "1.png").write_bytes(b"junk")
    words = ["train", "digits_resnet20", "--data", folder, "--image-size", "8", "--batch-size", "2", "--workers", "2"]
    ended = subprocess.run(
        [*gaternet_command, *words, "--cpu", "--out", tmp_path / "run"], timeout=120, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "1.png" in ended.stderr


def test_images_are_read_as_the_model_wants_them(tmp_path):
    Image.fromarray(np.full((5, 5, 4), 200, np.uint8)).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png", 3).shape == (3, 5, 5)
    assert read_image(tmp_path / "rgba.png", 1).shape == (1, 5, 5)
    with pytest.raises(DataError, match="no image"):
        read_image(tmp_path / "none.png", 3)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="cannot read image"):
        read_image(tmp_path / "text.png", 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.pgm"])
def test_grey_of_16_bits_keeps_the_higher_8(tmp_path, name):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values.astype(">u2") if "big" in name else values).save(tmp_path / name)
    for channels in (1, 3):
        assert np.array_equal(read_image(tmp_path / name, channels).numpy(), [values >> 8] * channels)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_that_cannot_be_brought_to_8_bits_are_refused(tmp_path, kind):
    Image.fromarray(np.full((5, 5), 200, kind)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"^image .*a\.tif holds signed, 32-bit or float pixels: convert it to 8 bits$"):
        read_image(tmp_path / "a.tif", 1)


@pytest.mark.parametrize("shape", [(3, 40, 20), (3, 20, 40), (3, 9, 9), (3, 16, 8)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_fit_gives_the_size_and_leaves_fitting_images_alone(shape, crop):
    preprocessing = Preprocessing(16, 8, (0.5,) * 3, (0.5,) * 3, crop)
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    fitted = preprocessing.fit(image)
    assert fitted.shape == (3, 16, 8)
    if shape == (3, 16, 8):
        assert torch.equal(fitted, image)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (7, 7)])
def test_arrays_are_brought_to_a_size_as_single_images_are(tmp_path, shape):
    """Else `predict` would show a network other images than it was trained on."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, *shape, 3), np.uint8)
    data = load_data(write_npz(tmp_path / "a.npz", x_train=pixels, x_test=pixels[:5]), image_size=4)
    for number in (0, 4):
        Image.fromarray(pixels[number]).save(tmp_path / "a.png")
        for images in (data.train, data.test):
            assert torch.equal(images[number][0], data.preprocessing.open(tmp_path / "a.png"))


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.2])
@pytest.mark.parametrize(
    ("size", "tolerance"), [((30, 40), 0), ((41, 30), 0), ((30, 90), 0), ((20, 200), 2), ((200, 20), 2)]
)
def test_long_images_are_fitted_as_others_are(size, tolerance, crop):
    """As by torchvision's Resize and CenterCrop of the whole; what is not long exactly so."""
    preprocessing = Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3, crop)
    image = torch.randint(0, 256, (3, *size), generator=seeded(0), dtype=torch.uint8)
    whole = tv.center_crop(tv.resize(image, [math.floor(16 / crop)]), [16, 16])
    assert (preprocessing.fit(image).int() - whole.int()).abs().max() <= tolerance


@pytest.mark.parametrize("axis", [1, 2])
def test_extremely_long_images_take_no_memory(monkeypatch, axis):
    """A file of a few bytes may hold one, and resized whole it would take gigabytes."""

    def refuse(image: Tensor, size: list[int]) -> Tensor:
        raise AssertionError(f"resized to {size}")

    preprocessing = Preprocessing(224, 224, (0.5,) * 3, (0.5,) * 3)
    strip = torch.randint(0, 256, (3, 1, 100_000), generator=seeded(0), dtype=torch.uint8)
    middle = strip[:, :, 49_998:50_002].transpose(2, axis)
    expected = preprocessing.fit(middle).int()  # not so long
    monkeypatch.setattr(tv, "resize", refuse)
    assert (preprocessing.fit(strip.transpose(2, axis)).int() - expected).abs().max() <= 2


def test_mixed_seeds_are_unlike():
    seeds = {mix_seed("step", a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    others = [mix_seed("step", 0, 1), mix_seed("step", 1, 0), mix_seed("order", 0, 1), mix_seed("step", 0, 1, 0)]
    others += [mix_seed("step", 3 + 7 * 2**32, 5), mix_seed("step", 3, 7, 5)]
    assert len({*others}) == len(others)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_cifar_is_found_where_it_lies_or_its_absence_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("GATERNET_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse_download)
    with pytest.raises(DataError, match=r"cifar10 is not in .* and cannot be downloaded"):
        load_data("cifar10")


def refuse_download(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_processes_that_need_the_same_set_download_it_one_at_a_time(tmp_path, monkeypatch):
    downloads = []

    class Slow:
        data, targets, classes = np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1], ["a", "b"]

        def __init__(self, root: Path, train: bool, download: bool = False) -> None:
            if not (root / "whole").exists():
                if not download:
                    raise RuntimeError("Dataset not found or corrupted")
                assert not (root / "half").exists()
                (root / "half").touch()
                time.sleep(0.2)
                downloads.append((root / "half").rename(root / "whole"))

    monkeypatch.setitem(TORCHVISION, "fashion_mnist", Slow)
    threads = [threading.Thread(target=load_data, args=("fashion_mnist",), kwargs={"root": tmp_path}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1


def test_a_gpu_need_not_wait_for_mean_and_deviation():
    """What `ToInput` keeps on the device gives the same, bit for bit."""
    known = Preprocessing(8, 8, (0.1, 0.4, 0.7), (0.2, 0.3, 0.25))
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=seeded(2), dtype=torch.uint8)
    to_input = ToInput(known)
    for _ in range(2):
        assert torch.equal(to_input(images), known.normalize(images))


def test_real_cifar10_unpacks_into_what_load_data_reads(tmp_path, shared):
    script = shared / "data" / "unpack.py"
    subprocess.run([sys.executable, script, "cifar10", "--out", tmp_path], check=True, stdout=subprocess.DEVNULL)
    data = load_data(str(tmp_path / "cifar10.npz"))
    assert (len(data.train), len(data.test), len(data.classes)) == (50000, 10000, 10)
    np.testing.assert_allclose(data.preprocessing.mean, (0.4914, 0.4822, 0.4465), atol=1e-4)  # as published
    np.testing.assert_allclose(data.preprocessing.std, (0.2470, 0.2435, 0.2616), atol=1e-4)


def test_torchvisions_arrays_keep_rows_columns_and_parts(tmp_path, monkeypatch):
    class Known:
        classes = ("cat", "dog")

        def __init__(self, root: Path, train: bool) -> None:
            self.data = np.random.default_rng(int(train)).integers(0, 256, (4 if train else 2, 6, 8, 3), np.uint8)
            self.targets = [i % 2 for i in range(len(self.data))]

    monkeypatch.setitem(TORCHVISION, "cifar10", Known)
    data = load_data("cifar10", root=tmp_path)
    for images, train in ((data.train, True), (data.test, False)):
        pixels = np.stack([images[i][0].permute(1, 2, 0).numpy() for i in range(len(images))])
        assert np.array_equal(pixels, Known(tmp_path, train).data)
        assert [images[i][1] for i in range(len(images))] == Known(tmp_path, train).targets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": "8"}, "height must be a whole number of pixels, but is '8'"),
        ({"width": 0}, "width must be a whole number of pixels, but is 0"),
        ({"mean": (0.5, 0.5)}, "mean and std must have 1 or 3 channels, but have 2 and 3"),
        ({"std": (0.25, 0.0, 0.25)}, "mean must be finite, and std above 0"),
        ({"crop": 1.5}, r"crop must be in \(0, 1\], but is 1.5"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(changes, message, unchecked_types):
    known = {"height": 8, "width": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**(known | changes))
    with pytest.raises(DataError, match=f"does not say how images become its input .*{message}"):
        Preprocessing.from_metadata({"preprocessing": known | changes})


def test_known_sets_have_their_published_statistics(tmp_path, monkeypatch):
    known = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "fashion_mnist": ((0.2860,), (0.3530,)),
    }
    for name, (mean, std) in known.items():
        images = np.zeros((2, 4, 4, 3) if len(mean) == 3 else (2, 4, 4), np.uint8)
        stub = Mock(return_value=Mock(data=images, targets=[0, 1], classes=("a", "b")))
        monkeypatch.setitem(TORCHVISION, name, stub)
        found = load_data(name, root=tmp_path).preprocessing
        assert (found.mean, found.std) == (mean, std)
