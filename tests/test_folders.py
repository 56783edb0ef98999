"""Folders of images: which files are of which class, and which are for testing."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_folder
from PIL import Image

from gaternet.data import DataError, load_data


def test_folder_with_and_without_a_test_part(tmp_path):
    split = load_data(write_folder(tmp_path / "a", "train", "val"), image_size=8)
    assert (len(split.train), len(split.test), split.classes) == (6, 6, ("cat", "dog"))
    whole = load_data(write_folder(tmp_path / "b", per_class=10), image_size=8)
    assert (len(whole.train), len(whole.test)) == (18, 2)
    assert isinstance(whole.train.images, np.ndarray)
    assert isinstance(whole.test.images, np.ndarray)
    assert not set(whole.train.images) & set(whole.test.images)
    assert split.train[0][0].shape == (3, 8, 8)
    assert torch.equal(split.test.take([4, 1]), torch.stack([split.test[4][0], split.test[1][0]]))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_a_folders_test_part_has_one_of_four_names(tmp_path, name):
    data = load_data(write_folder(tmp_path / "a", "train", name), image_size=8)
    assert (len(data.train), len(data.test), data.classes) == (6, 6, ("cat", "dog"))


def test_images_without_classes_are_no_test_part(tmp_path):
    """As ImageNet's, which are without labels and lie beside its val."""
    folder = Path(write_folder(tmp_path / "a", "train", "val"))
    for part in ("train", "test"):
        (folder / part / ".cache").mkdir(parents=True)
    shutil.copy(folder / "val" / "cat" / "0.png", folder / "test")
    (folder / "test" / "images").mkdir()  # as Tiny ImageNet has it
    shutil.copy(folder / "val" / "cat" / "0.png", folder / "test" / "images")
    data = load_data(str(folder), image_size=8)
    assert all("/val/" in str(path) for path in map(os.fsdecode, np.asarray(data.test.images)))
    shutil.rmtree(folder / "val")
    with pytest.raises(DataError, match="test has a class 'images' that the training folder has not"):
        load_data(str(folder))


def test_parts_of_a_folder_are_not_taken_for_classes(tmp_path):
    folder = write_folder(tmp_path / "a", "train", "testing", per_class=10)
    with pytest.raises(DataError, match="no folder named test, val, valid or validation: add one, or name"):
        load_data(folder)
    assert load_data(f"{folder}/train").classes == ("cat", "dog")
    (tmp_path / "b").mkdir()
    for name in ("car", "train"):  # a class of that name
        (tmp_path / "a" / "train" / ("cat" if name == "car" else "dog")).rename(tmp_path / "b" / name)
    assert load_data(str(tmp_path / "b")).classes == ("car", "train")


def test_what_editors_and_archives_leave_in_a_folder_is_no_class_and_no_image(tmp_path):
    folder = Path(write_folder(tmp_path / "a", per_class=10))
    images = len(load_data(str(folder)).train)
    for left in (".ipynb_checkpoints", "__MACOSX", ".git", "cat/.ipynb_checkpoints"):
        shutil.copytree(folder / "dog", folder / left)
    shutil.copy(folder / "dog" / "0.png", folder / "dog" / "._0.png")
    data = load_data(str(folder))
    assert data.classes == ("cat", "dog")
    assert len(data.train) == images
    for name in ("cat", "dog"):
        shutil.rmtree(folder / name)
    with pytest.raises(DataError, match="no folder of images"):
        load_data(str(folder))


def test_photographs_that_bear_a_rarer_ending_are_images_too(tmp_path):
    folder = Path(write_folder(tmp_path / "a", per_class=10))
    images = len(load_data(str(folder)).train)
    with Image.open(folder / "cat" / "0.png") as image:
        image.save(folder / "cat" / "z.GIF")
        image.save(folder / "dog" / "z.jfif", "jpeg")
    (folder / "dog" / "notes.txt").write_text("no image")
    assert len(load_data(str(folder)).train) == images + 2


def test_folder_problems_are_named(tmp_path):
    folder = tmp_path / "a"
    write_folder(folder, "train", "test")
    (folder / "test" / "emu").mkdir()
    (folder / "test" / "cat" / "0.png").rename(folder / "test" / "emu" / "0.png")
    with pytest.raises(DataError, match="class 'emu'"):
        load_data(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no folder of images"):
        load_data(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="has one image a class, too few to hold any out: add a test folder"):
        load_data(write_folder(tmp_path / "b", per_class=1))
    with pytest.raises(DataError, match=r"has one class, 'photos', and nothing to tell it from"):
        load_data(str(Path(write_folder(tmp_path / "c" / "photos")).parent))


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("Train", "Val")])
def test_parts_with_other_names_are_not_taken_for_classes(tmp_path, names):
    folder = write_folder(tmp_path / "a", *names)
    with pytest.raises(DataError, match=f"has parts {names[0]} and {names[1]}: call them train and test"):
        load_data(folder)


def test_a_tenth_of_each_class_is_held_out_and_one_at_least(tmp_path):
    folder = Path(write_folder(tmp_path / "a", per_class=25))
    for name, count in (("emu", 3), ("fox", 1)):
        (folder / name).mkdir()
        for i in range(count):
            shutil.copy(folder / "cat" / "0.png", folder / name / f"{i}.png")
    data = load_data(str(folder), image_size=8)
    assert np.bincount(data.test.labels, minlength=4).tolist() == [2, 2, 1, 0]
    assert np.bincount(data.train.labels).tolist() == [23, 23, 2, 1]
    assert not set(data.train.images) & set(data.test.images)


def test_names_that_look_alike_are_the_same_class(tmp_path):
    """As folders that came from a Mac, and others: an accent is a character of its own there."""
    folder = Path(write_folder(tmp_path / "a", "train", "test"))
    one, two = unicodedata.normalize("NFC", "été"), unicodedata.normalize("NFD", "été")
    for part, name in (("train", one), ("test", two)):
        (folder / part / "cat").rename(folder / part / name)
    assert load_data(str(folder)).classes == ("dog", one)


def test_a_link_to_a_folder_that_is_read_anyway_is_refused(tmp_path):
    """Else the images of all classes would be of this one, too."""
    folder = Path(write_folder(tmp_path / "a", per_class=10))
    (folder / "cat").rename(tmp_path / "cats")
    (folder / "cat").symlink_to(tmp_path / "cats")
    assert load_data(str(folder)).classes == ("cat", "dog")
    (folder / "dog" / "loop").symlink_to(folder)
    with pytest.raises(DataError, match=r"a/cat and .*a/dog/loop/cat are one folder"):
        load_data(str(folder))
