"""The dataset against Cityscapes' own label table, and every kind of broken folder that it must refuse."""

import errno
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label
from cityscapesscripts.helpers.labels import trainId2label as official
from skimage.io import imread, imsave

from datasets import DatasetError, cityscapes
from datasets.cityscapes import CityscapesSplit, image_name
from ffnet.labels import CLASSES, COLORS, LABEL_IDS, TRAIN_IDS
from tests.helpers.cityscapes_tree import write_tree


def first(root, kind):
    return sorted((root / kind / "val").glob("*/*.png"))[0]


def test_the_class_tables_equal_the_official_ones():
    assert list(CLASSES) == [official[i].name for i in range(19)]
    assert LABEL_IDS.tolist() == [official[i].id for i in range(19)]
    assert COLORS.tolist() == [list(official[i].color) for i in range(19)]
    assert TRAIN_IDS.tolist() == [id2label[i].trainId for i in range(34)]


def test_items_are_sorted_pairs_of_an_image_and_its_train_ids(tree):
    split = CityscapesSplit(tree, "val")
    assert split.images == sorted(split.images) and len(split) == 4
    for path, target, (image, labels) in zip(split.images, split.targets, split, strict=True):
        assert Path(path).name.replace("leftImg8bit", "gtFine_labelIds") == Path(target).name
        assert np.array_equal(image.numpy(), imread(path).transpose(2, 0, 1))
        expected = np.vectorize(lambda i: id2label[i].trainId)(imread(target))
        assert np.array_equal(labels.numpy(), expected)


def test_limit_keeps_the_first_images(tree):
    split = CityscapesSplit(tree, "val", limit=2)
    assert split.images == CityscapesSplit(tree, "val").images[:2]
    assert split.total_pixels == 2 * 64 * 128


def test_an_image_is_named_by_city_sequence_and_frame():
    assert image_name("/data/val/aachen/aachen_000000_000019_leftImg8bit.png") == "aachen_000000_000019"


def no_root(root):
    shutil.rmtree(root)
    return root


def no_split(root):
    shutil.rmtree(root / "gtFine" / "val")
    return "gtFine/val"


def empty_split(root):
    for path in (root / "leftImg8bit" / "val").glob("*/*"):
        path.unlink()
    return "leftImg8bit/val"


def image_without_label(root):
    first(root, "gtFine").unlink()
    return "gtFine_labelIds.png"


def label_without_image(root):
    path = first(root, "leftImg8bit")
    path.unlink()
    return path.name.replace("leftImg8bit", "gtFine_labelIds")


def file_between_cities(root):
    (root / "leftImg8bit" / "val" / "notes.txt").touch()
    return "notes.txt"


def file_with_another_name(root):
    (first(root, "leftImg8bit").parent / "cat.jpg").touch()
    return "cat.jpg"


def label_of_another_size(root):
    path = first(root, "gtFine")
    imsave(path, imread(path)[:32], check_contrast=False)
    return path


def image_of_another_size(root):
    write_tree(root, count=2, size=(64, 64))
    return f"but {first(root, 'leftImg8bit')} has"


def grey_image(root):
    path = first(root, "leftImg8bit")
    imsave(path, imread(path)[..., 0], check_contrast=False)
    return path


def transparent_image(root):
    path = first(root, "leftImg8bit")
    imsave(path, np.dstack([imread(path), imread(path)[..., 0]]), check_contrast=False)
    return path


def color_label(root):
    path = first(root, "gtFine")
    imsave(path, np.dstack([imread(path)] * 3), check_contrast=False)
    return path


def empty_file(root):
    path = first(root, "leftImg8bit")
    path.write_bytes(b"")
    return path


BROKEN_FOLDERS = (
    no_root, no_split, empty_split, image_without_label, label_without_image, file_between_cities,
    file_with_another_name, label_of_another_size, image_of_another_size, grey_image, transparent_image, color_label,
    empty_file,
)  # fmt: skip


@pytest.mark.parametrize("break_it", BROKEN_FOLDERS, ids=lambda f: f.__name__)
def test_broken_folders_are_refused_before_any_pixel_is_read(tree, break_it):
    named = break_it(tree)
    with pytest.raises(DatasetError) as error:
        CityscapesSplit(tree, "val")
    assert str(named) in str(error.value) and str(tree) in str(error.value)


def truncated_image(root):
    path = first(root, "leftImg8bit")
    path.write_bytes(path.read_bytes()[:2000])
    return path


def flipped_bytes(root):
    path = first(root, "leftImg8bit")
    data = bytearray(path.read_bytes())
    data[1000:1010] = b"0123456789"
    path.write_bytes(data)
    return path


def sixteen_bits(root):
    path = first(root, "leftImg8bit")
    height, width = imread(path).shape[:2]
    rows = b"".join(b"\0" + bytes(6 * width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def train_ids_with_void(root):
    path = first(root, "gtFine")
    imsave(path, np.append(TRAIN_IDS, np.zeros(221, np.uint8))[imread(path)], check_contrast=False)
    return path


def train_ids_without_void(root):
    path = first(root, "gtFine")
    imsave(path, (imread(path) % 19).astype(np.uint8), check_contrast=False)
    return path


@pytest.mark.parametrize(
    "break_it",
    (truncated_image, flipped_bytes, sixteen_bits, train_ids_with_void, train_ids_without_void),
    ids=lambda f: f.__name__,
)
def test_errors_in_pixels_name_the_file_in_one_line(tree, break_it):
    path = break_it(tree)
    with pytest.raises(DatasetError) as error:
        list(CityscapesSplit(tree, "val"))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_any_more_is_not_called_damaged(tree):
    split = CityscapesSplit(tree, "val")
    Path(split.targets[1]).unlink()
    with pytest.raises(DatasetError, match=rf"^{split.targets[1]}: this file can't be read \(No such file"):
        split[1]


@pytest.mark.parametrize(
    "error",
    (OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")),
)
def test_a_lack_of_memory_is_not_blamed_on_the_file(tree, monkeypatch, error):
    def fail(*_):
        raise error

    split = CityscapesSplit(tree, "val")
    monkeypatch.setattr(cityscapes, "decode_image", fail)
    with pytest.raises(MemoryError):
        split[0]


LEFT_BEHIND = (
    ".DS_Store", "._aachen", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "Icon\r", "__MACOSX", "@eaDir",
    ".Spotlight-V100", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".ipynb_checkpoints", ".hidden",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BEHIND)
@pytest.mark.parametrize("is_folder", (False, True))
def test_hidden_and_operating_system_files_are_ignored_and_counted_at_every_level(tree, name, is_folder):
    clean = CityscapesSplit(tree, "val")
    assert not clean.ignored
    levels = [tree / kind / below for kind in ("leftImg8bit", "gtFine") for below in ("", "val", "val/aachen")]
    for path in (folder / name for folder in (tree, *levels)):
        path.mkdir() if is_folder else path.touch()
        if is_folder:  # as in folders of thumbnails, whose files have the images' own names
            (path / Path(clean.images[0]).name).touch()
            (path / Path(clean.targets[0]).name).touch()
    split = CityscapesSplit(tree, "val")
    assert (split.images, split.targets) == (clean.images, clean.targets)
    assert split.ignored == {folder / name for folder in levels}


def test_resource_forks_beside_images_and_labels_are_ignored(tree):
    clean = CityscapesSplit(tree, "val")
    for path in map(Path, (*clean.images, *clean.targets)):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    split = CityscapesSplit(tree, "val")
    assert split.images == clean.images and split.targets == clean.targets and len(split.ignored) == 8


def test_a_split_of_nothing_but_resource_forks_has_no_images(tree):
    for path in map(Path, CityscapesSplit(tree, "val").images):
        path.rename(path.with_name(f"._{path.name}"))
    with pytest.raises(DatasetError, match="this folder has no"):
        CityscapesSplit(tree, "val")


@pytest.mark.parametrize(("fitting", "decoded"), ((0, 8), (1, 7), (3, 5), (4, 4), (9, 4)))
def test_samples_that_fit_into_memory_are_decoded_once(tree, monkeypatch, fitting, decoded):
    """Four images are read twice; an image and its label have four bytes a pixel."""
    images, paths = CityscapesSplit(tree, "val"), []
    expected = [images[index] for index in range(4)]
    original = cityscapes._decode
    monkeypatch.setattr(cityscapes, "_decode", lambda path: paths.append(path) or original(path))
    images.keep_decoded(fitting * 4 * images.height * images.width + 3)
    for _ in range(2):
        for index, sample in enumerate(expected):
            assert all(torch.equal(*pair) for pair in zip(images[index], sample, strict=True))
    assert len(paths) == 2 * decoded
