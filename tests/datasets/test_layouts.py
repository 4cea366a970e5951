"""Data sets in other layouts than Cityscapes': their items against Pillow, and what each layout refuses."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets import DatasetError, Split
from ffnet.labels import CITYSCAPES, read_label_set
from ffnet.system.errors import UserError
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.own_data import IDS, LABEL_SET, NAMES, write_bdd100k, write_folders, write_kitti

WRITERS = {"folders": write_folders, "kitti": write_kitti, "bdd100k": write_bdd100k}
TRAIN_IDS = {  # id in a label file -> train id
    "folders": {0: 255} | {label_id: index for index, label_id in enumerate(IDS)},
    "kitti": dict(enumerate(CITYSCAPES.train_ids[:34].tolist())),
    "bdd100k": {255: 255} | {index: index for index in range(19)},
}


@pytest.fixture(params=WRITERS)
def layout(request, tmp_path):
    """The name of a layout, with a data set in `tmp_path`."""
    WRITERS[request.param](tmp_path)
    return request.param


def test_items_are_what_pillow_reads(layout, tmp_path):
    split = Split(layout, tmp_path, "val")
    assert len(split) == (6 if layout == "folders" else 4) and len(set(split.names)) == len(split)
    for path, target, size, (image, labels) in zip(split.images, split.targets, split.sizes, split, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(path)))
        ids = np.array(Image.open(target))
        assert np.array_equal(labels.numpy(), np.vectorize(TRAIN_IDS[layout].get)(ids)) and ids.shape == size


def test_names_are_those_of_the_files_and_sizes_may_differ(tmp_path):
    write_folders(tmp_path)
    split = Split("folders", tmp_path, "val")
    assert split.names == ["north_001", "north_002", "north_004", "north_005", "south_000", "south_003"]
    assert split.size is None and set(split.sizes) == {(64, 128), (96, 128)}
    assert split.label_set.names == NAMES and split.select([0]).size == (64, 128)
    assert Split("folders", tmp_path, "val", 1).names == ["north_001"]


def test_kitti_has_one_part_whatever_the_split(tmp_path):
    write_kitti(tmp_path)
    assert Split("kitti", tmp_path, "train").names == Split("kitti", tmp_path, "val").names


def test_images_are_resized_as_pillow_does_and_labels_keep_their_size(layout, tmp_path):
    split = Split(layout, tmp_path, "val", input_size=(40, 72))
    assert split.size == (40, 72)
    for path, size, (image, labels) in zip(split.images, split.sizes, split, strict=True):
        expected = np.array(Image.open(path).convert("RGB").resize((72, 40)))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected) and tuple(labels.shape) == size


@pytest.mark.parametrize("variant", ("foggy_beta_0.02", "rain_alpha_0.01_beta_0.005_dropsize_0.01_pattern_1"))
def test_a_variant_of_cityscapes_is_read_and_others_are_left_out(tmp_path, variant):
    stems = write_tree(tmp_path)
    clear = tmp_path / "leftImg8bit"
    changed = tmp_path / f"leftImg8bit_{variant.partition('_')[0]}"
    for path in clear.glob("val/*/*"):
        folder = changed / path.parent.relative_to(clear)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in (variant, "foggy_beta_0.01"):
            shutil.copy(path, folder / path.name.replace("_leftImg8bit", f"_leftImg8bit_{suffix}"))
    assert sorted(Split(f"cityscapes:{variant}", tmp_path, "val").names) == sorted(stems)
    word = variant.partition("_")[0]
    there = ", ".join(sorted({variant, "foggy_beta_0.01"}))
    with pytest.raises(DatasetError, match=re.escape(f"has no such variant. It has {there}.")):
        Split(f"cityscapes:{word}_9", tmp_path, "val")


def first(root, side):
    return sorted((root / side).glob("val/*/*"))[0]


def unknown_id(root):
    path = first(root, "labels")
    Image.fromarray(np.full((64, 128), 200, np.uint8)).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-400])


FAULTS = {  # what is done to a data set in the layout `folders`, and what the error says
    "no label": (lambda root: first(root, "labels").unlink(), "the label of an image is missing. Add it"),
    "no image": (lambda root: first(root, "images").unlink(), "the image of this label is missing. Add it"),
    "two images of one name": (
        lambda root: Image.new("RGB", (128, 64)).save(first(root, "images").with_suffix(".png")),
        "another image has this name",
    ),
    "one name in two folders": (
        lambda root: [Image.new("RGB", (128, 64)).save(root / "images/val/north_001.png"),
                      Image.new("L", (128, 64)).save(root / "labels/val/north_001.png")],
        "another image has this name",
    ),
    "another file": (lambda root: (root / "images/val/a.txt").touch(), "does not end in .png or .jpg or .jpeg"),
    "no files": (lambda root: shutil.rmtree(root / "images/val/north"), "the image of this label is missing"),
    "a label of another size": (
        lambda root: Image.new("L", (64, 64)).save(first(root, "labels")), "An image and its label must have the same"
    ),
    "a gray image": (lambda root: Image.new("L", (128, 64)).save(first(root, "images")), "this JPEG file is gray"),
    "a color label": (lambda root: Image.new("RGB", (128, 64)).save(first(root, "labels")), "PNG file is 8-bit RGB"),
    "no JPEG": (lambda root: first(root, "images").write_bytes(b"\xff\xd8\xff"), "this is not a JPEG file"),
    "no classes": (lambda root: (root / "classes.json").unlink(), "classes.json: this label set can't be read"),
    "an unknown id": (unknown_id, "200 is not an id of the label set 'off-road'. Use another label file"),
    "a truncated JPEG": (lambda root: truncate(first(root, "images")), "this JPEG file is truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_the_file(tmp_path, fault):
    write_folders(tmp_path)
    break_it, message = FAULTS[fault]
    break_it(tmp_path)
    with pytest.raises(UserError) as error:
        list(Split("folders", tmp_path, "val"))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="--dataset ade20k: there is no such layout. Give one of cityscapes, kitti"):
        Split("ade20k", tmp_path, "val")


def test_train_ids_in_place_of_label_ids_are_refused_in_kitti(tmp_path):
    write_kitti(tmp_path)
    path = next((tmp_path / "training/semantic").iterdir())
    Image.fromarray(CITYSCAPES.train_ids[np.array(Image.open(path))] % 19).save(path)
    with pytest.raises(DatasetError, match="holds train ids, not label ids"):
        list(Split("kitti", tmp_path, "val"))


def test_another_label_set_may_be_given(tmp_path):
    write_folders(tmp_path)
    merged = LABEL_SET | {
        "name": "merged",
        "classes": [LABEL_SET["classes"][0] | {"ids": list(IDS[:6])}, LABEL_SET["classes"][6]],
    }
    (tmp_path / "merged.json").write_text(json.dumps(merged))
    split = Split("folders", tmp_path, "val", label_set=read_label_set(tmp_path / "merged.json"))
    assert set(np.unique(np.concatenate([labels.numpy().ravel() for _, labels in split]))) == {0, 1, 255}
