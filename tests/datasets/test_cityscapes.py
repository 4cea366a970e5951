"""The dataset against Cityscapes' own label table, and every kind of broken folder that it must refuse."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label
from skimage.io import imread, imsave

from datasets import DatasetError
from datasets.cityscapes import CityscapesSplit
from ffnet.labels import CITYSCAPES
from tests.helpers.cityscapes_tree import write_tree


def test_items_are_sorted_pairs_of_an_image_and_its_train_ids(tree):
    split = CityscapesSplit(tree, "val")
    assert split.images == sorted(split.images) and len(split) == 4
    for path, target, (image, labels) in zip(split.images, split.targets, split, strict=True):
        assert Path(path).name.replace("leftImg8bit", "gtFine_labelIds") == Path(target).name
        assert np.array_equal(image.numpy(), imread(path).transpose(2, 0, 1))
        expected = np.vectorize(lambda i: id2label[i].trainId)(imread(target))
        assert np.array_equal(labels.numpy(), expected)


def test_a_limit_and_a_selection_are_smaller_splits(tree):
    split = CityscapesSplit(tree, "val")
    names = ["aachen_000000_000019", "aachen_000002_000019", "zurich_000001_000019", "zurich_000003_000019"]
    assert split.names == names and split.size == (64, 128)
    assert CityscapesSplit(tree, "val", limit=2).names == names[:2]
    selection = split.select([3, 1])
    assert selection.names == [names[3], names[1]] and len(selection) == 2 and len(split) == 4
    for index, chosen in enumerate((3, 1)):
        assert all(torch.equal(*pair) for pair in zip(selection[index], split[chosen], strict=True))


def rewrite(path, change):
    imsave(path, change(imread(path)), check_contrast=False)


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


BROKEN_FOLDERS = {  # what is done to the folder, given its first image and label, and what the error names
    "no folder": (lambda root, image, label: shutil.rmtree(root), "{root}: "),
    "no labels": (lambda root, image, label: shutil.rmtree(root / "gtFine" / "val"), "{root}/gtFine/val: "),
    "image without label": (lambda root, image, label: label.unlink(), "{label}: "),
    "label without image": (lambda root, image, label: image.unlink(), "{label}: "),
    "file between cities": (lambda root, image, label: (image.parents[1] / "notes").touch(), "/val/notes: "),
    "file with another name": (lambda root, image, label: (image.parent / "a.jpg").touch(), "/a.jpg: "),
    "label of another size": (lambda root, image, label: rewrite(label, lambda pixels: pixels[:32]), "{label}: "),
    "image of another size": (lambda root, image, label: write_tree(root, count=2, size=(64, 64)), "but {image} has"),
    "grey image": (lambda root, image, label: rewrite(image, lambda pixels: pixels[..., 0]), "{image}: "),
    "color label": (lambda root, image, label: rewrite(label, lambda pixels: np.dstack(3 * [pixels])), "{label}: "),
    "pipe": (lambda root, image, label: to_pipe(image), "{image}: this file can't be read (it is a pipe, not"),
    "the same name twice": (lambda root, image, label: shutil.copy(image, image.with_suffix(".PNG")), "another image"),
    "empty file": (lambda root, image, label: image.write_bytes(b""), "{image}: "),
}


@pytest.fixture
def first(tree):
    """The paths of the first image and of its label."""
    return [sorted((tree / kind / "val").glob("*/*.png"))[0] for kind in ("leftImg8bit", "gtFine")]


@pytest.mark.parametrize("fault", BROKEN_FOLDERS)
def test_broken_folders_are_refused_before_any_pixel_is_read(tree, first, fault):
    image, label = first
    break_it, named = BROKEN_FOLDERS[fault]
    break_it(tree, image, label)
    with pytest.raises(DatasetError) as error:
        CityscapesSplit(tree, "val")
    assert named.format(root=tree, image=image, label=label) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "usual", "suffix"),
    (
        ("leftImg8bit", "_leftImg8bit.png", "_leftImg8bit_foggy_beta_0.02.png"),
        ("gtFine", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"),
    ),
)
def test_a_folder_with_other_names_is_described(tree, kind, usual, suffix):
    for path in (tree / kind / "val").glob("*/*"):
        path.rename(path.with_name(path.name.replace(usual, suffix)))
    found = f"{usual}, but 4 other files such as aachen_000000_000019{suffix}. Unpack {kind}_trainvaltest.zip"
    with pytest.raises(DatasetError, match=re.escape(found)):
        CityscapesSplit(tree, "val")


@pytest.mark.parametrize("changed", ((0, 0), (0, 1), (1, 0), (1, 1)))
def test_suffixes_may_be_in_upper_case(tree, first, changed):
    expected = CityscapesSplit(tree, "val").names
    for path, change in zip(first, changed, strict=True):
        path.rename(path.with_name(path.name.replace(".png", ".PNG")) if change else path)
    split = CityscapesSplit(tree, "val")
    assert split.names == expected and len(list(split)) == 4


IMAGE_FAULTS = {
    "truncated": lambda data: data[:2000],
    "flipped bytes": lambda data: data[:1000] + b"0123456789" + data[1010:],
}
LABEL_FAULTS = {
    "train ids with void": lambda pixels: CITYSCAPES.train_ids[pixels],
    "train ids without void": lambda pixels: (pixels % 19).astype(np.uint8),
}


@pytest.mark.parametrize("fault", (*IMAGE_FAULTS, *LABEL_FAULTS))
def test_errors_in_pixels_name_the_file_in_one_line(tree, first, fault):
    image, label = first
    if fault in IMAGE_FAULTS:
        image.write_bytes(IMAGE_FAULTS[fault](image.read_bytes()))
    else:
        rewrite(label, LABEL_FAULTS[fault])
    with pytest.raises(DatasetError) as error:
        list(CityscapesSplit(tree, "val"))
    assert str(error.value).startswith(f"{image if fault in IMAGE_FAULTS else label}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_any_more_is_not_called_damaged(tree):
    split = CityscapesSplit(tree, "val")
    Path(split.targets[1]).unlink()
    with pytest.raises(DatasetError, match=rf"^{split.targets[1]}: this file can't be read \(No such file"):
        split[1]


@pytest.mark.parametrize("error", (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()))
def test_a_lack_of_memory_is_not_blamed_on_the_file(tree, monkeypatch, error):
    def fail(*_):
        raise error

    split = CityscapesSplit(tree, "val")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(type(error)):
        split[0]


@pytest.mark.parametrize("name", ("._aachen", "Desktop.ini", "@eaDir", ".hidden"))
@pytest.mark.parametrize("is_folder", (False, True))
def test_hidden_and_operating_system_files_are_ignored_and_counted_at_every_level(tree, name, is_folder):
    clean = CityscapesSplit(tree, "val")
    assert not clean.ignored
    levels = [tree / kind / below for kind in ("leftImg8bit", "gtFine") for below in ("", "val", "val/aachen")]
    write_tree(tree, "train")
    for path in (folder / name for folder in (tree, tree / "gtFine" / "train", *levels)):
        path.mkdir() if is_folder else path.touch()
        if is_folder:  # as in folders of thumbnails, whose files have the images' own names
            (path / Path(clean.images[0]).name).touch()
            (path / Path(clean.targets[0]).name).touch()
    split = CityscapesSplit(tree, "val")
    assert (split.images, split.targets) == (clean.images, clean.targets)
    assert split.ignored == {folder / name for folder in levels}


@pytest.mark.parametrize("fitting", (0, 3, 9))
def test_samples_that_fit_into_memory_are_decoded_once(tree, fitting):
    """An image and its label have four bytes per pixel; selections share what was decoded."""
    split = CityscapesSplit(tree, "val")
    expected = [split[index] for index in range(4)]
    split.keep_decoded(fitting * 4 * 64 * 128 + 3)
    first = [split[index] for index in range(4)]
    second = list(split.select(range(4)))
    assert [one[0] is two[0] for one, two in zip(first, second, strict=True)] == [n < fitting for n in range(4)]
    for samples in (first, second):
        for sample, reference in zip(samples, expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip(sample, reference, strict=True))
