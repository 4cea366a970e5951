"""The layouts of data sets: where their images and labels are, and which ids the labels hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from datasets.files import DatasetError
from ffnet.labels import CITYSCAPES, CITYSCAPES_TRAIN_IDS, LabelSet, read_label_set
from ffnet.system.files import is_ignored
from ffnet.system.text import count

CLASSES_FILE = "classes.json"  # label set in the root of a layout that has none of its own


@dataclass(frozen=True)
class Side:
    """Where the images or the labels of a layout are."""

    folder: str  # below the root; {split} stands for the name of the split
    suffixes: tuple[str, ...]  # ends of file names; what is before them is the same for an image and its label
    archive: str = ""  # file that is unpacked there
    example: str = "*"  # name of a file, without its suffix

    def path(self, root: Path, split: str) -> Path:
        """Return the folder of a split."""
        return root / self.folder.format(split=split)

    def suffix_of(self, path: Path) -> str | None:
        """Return the end of a file's name that is a suffix in upper or lower case; None if there is none."""
        ends = (path.name[-len(suffix) :] for suffix in self.suffixes if path.name.lower().endswith(suffix.lower()))
        return next(ends, None)


@dataclass(frozen=True)
class Layout:
    """A layout of data sets; docs/data.md describes each."""

    title: str  # in reports; "": the name of the folder
    images: Side
    labels: Side
    label_set: LabelSet | None  # None: that in CLASSES_FILE
    label_kind: str = "gray"  # kind of pixels of labels, see datasets.png.KINDS
    cities: bool = False  # whether the files are in folders of cities, which their names begin with
    one_size: bool = False  # whether all images must have the same size
    variant: str = ""  # variant of the images, which may lack some; others in the folder are left out


LAYOUTS = {
    "cityscapes": Layout(  # https://github.com/mcordts/cityscapesScripts
        "Cityscapes",
        Side("leftImg8bit/{split}", ("_leftImg8bit.png",), "leftImg8bit_trainvaltest.zip", "<city>_<sequence>_<frame>"),
        Side("gtFine/{split}", ("_gtFine_labelIds.png",), "gtFine_trainvaltest.zip", "<city>_<sequence>_<frame>"),
        CITYSCAPES,
        cities=True,
        one_size=True,
    ),
    "kitti": Layout(  # https://www.cvlibs.net/datasets/kitti/eval_semantics.php; data_semantics.zip
        "KITTI",
        Side("training/image_2", (".png",), "data_semantics.zip"),
        Side("training/semantic", (".png",), "data_semantics.zip"),
        CITYSCAPES,
    ),
    "bdd100k": Layout(  # https://doc.bdd100k.com/download.html
        "BDD100K",
        Side("images/10k/{split}", (".jpg",), "bdd100k_images_10k.zip"),
        Side("labels/sem_seg/masks/{split}", (".png",), "bdd100k_sem_seg_labels_trainval.zip"),
        CITYSCAPES_TRAIN_IDS,
    ),
    "folders": Layout(
        "", Side("images/{split}", (".png", ".jpg", ".jpeg")), Side("labels/{split}", (".png",)), None, "index"
    ),
}


def find_layout(text: str) -> Layout:
    """Return the layout of a name, or that of a variant of Cityscapes such as "cityscapes:foggy_beta_0.02".

    Raises:
        DatasetError: If there is no such layout.
    """
    name, _, variant = text.partition(":")
    if name not in LAYOUTS or (variant and name != "cityscapes"):
        names = ", ".join([*LAYOUTS, "or cityscapes:VARIANT"])
        raise DatasetError(f"--dataset {text}: there is no such layout. Give one of {names}.")
    layout = LAYOUTS[name]
    if not variant:
        return layout
    weather = variant.partition("_")[0]
    archive = f"leftImg8bit_{'trainval' if weather == 'rain' else 'trainvaltest'}_{weather}.zip"
    folder, suffixes = f"leftImg8bit_{weather}/{{split}}", (f"_leftImg8bit_{variant}.png",)
    return replace(
        layout, images=replace(layout.images, folder=folder, suffixes=suffixes, archive=archive), variant=variant
    )


def find_label_set(layout: Layout, root: Path, given: Path | None = None) -> LabelSet:
    """Return the label set in a given file, or that of a data set; raise a UserError if its file is wrong."""
    if given is None and layout.label_set:
        return layout.label_set
    return read_label_set(given or root / CLASSES_FILE)


def check_folders(text: str, root: Path, split: str) -> None:
    """Raise DatasetError unless `root` has the folders of this split in the layout of this name, and files in them."""
    layout = find_layout(text)
    sides = {side: side.path(root, split) for side in (layout.images, layout.labels)}
    for folder in (root, *sides.values()):
        if not folder.is_dir():
            held = " and ".join(str(path.relative_to(root)) for path in sides.values())
            raise DatasetError(f"{folder}: this folder does not exist. --dataset-path takes the folder with {held}.")
    for side, folder in sides.items():
        files = sorted(visible_files(folder))
        misplaced = [path for path in files if layout.cities and path.parent == folder]
        if misplaced:
            raise DatasetError(f"{misplaced[0]}: this is not the folder of a city. Move it out of {folder}.")
        if not any(side.suffix_of(path) for path in files):
            variants = sorted({path.stem.partition("_leftImg8bit_")[2] for path in files} - {""})
            if layout.variant and variants:
                raise DatasetError(f"--dataset {text}: {folder} has no such variant. It has {', '.join(variants)}.")
            example = f", but {count(len(files), 'other file')} such as {files[0].name}" if files else ""
            unpack = f" Unpack {side.archive} there, or give the files of other data such names." * bool(side.archive)
            raise DatasetError(
                f"{folder}: this folder has no {' or '.join(side.example + end for end in side.suffixes)}{example}."
                f"{unpack or ' Put them there.'}"
            )


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in those below it, without hidden ones and those of operating systems."""
    for path in folder.iterdir():
        if not is_ignored(path.name):
            yield from visible_files(path) if path.is_dir() else (path,)


def ignored_files(folder: Path) -> Iterator[Path]:
    """Yield the files and folders in a folder and in those below it that `visible_files` leaves out."""
    for path in folder.iterdir():
        if is_ignored(path.name):
            yield path
        elif path.is_dir():
            yield from ignored_files(path)
