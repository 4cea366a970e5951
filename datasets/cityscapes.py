"""Cityscapes with fine labels: sorted, complete and checked pairs of image and label."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets import DatasetError, png
from ffnet.labels import CITYSCAPES
LABEL_IDS, LABELS, NUM_CLASSES, TRAIN_IDS = CITYSCAPES.label_ids, range(34), 19, CITYSCAPES.train_ids
from ffnet.system.files import check_plain_file, ignored_files, visible_files
from ffnet.system.memory import is_out_of_memory
from ffnet.system.text import count

if TYPE_CHECKING:
    import torch

FOLDERS = ("leftImg8bit", "gtFine")  # folders of images and of labels
IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"

# Label ids of things that hardly ever occur (parking, tunnel ...). A file in which they do, but no id from 19 on, holds
# train ids.
_SUSPICIOUS_IDS = sorted(set(range(5, NUM_CLASSES)) - set(LABEL_IDS.tolist()))

_REMEDIES = {  # required color or content of a file -> remedy
    "RGB": "Images are 8-bit RGB PNG files, as in leftImg8bit_trainvaltest.zip.",
    "gray": "Labels are 8-bit gray PNG files of label ids, not of colors, as in gtFine_trainvaltest.zip.",
    "label ids": "Use the original *_gtFine_labelIds.png, not a file that createTrainIdLabelImgs.py wrote.",
}


class CityscapesSplit:
    """One split of Cityscapes, a map-style dataset for torch.

    Each item is (image (3, H, W) uint8 RGB, train ids (H, W) uint8, 255 if not scored). Names and headers of all files
    are checked at once, and pixels when they are read. Hidden files and those that operating systems leave behind are
    ignored.

    Args:
        root: Folder that holds `leftImg8bit` and `gtFine`.
        split: "train", "val" or "test".
        limit: Use only the first `limit` pairs; None: all.

    Raises:
        DatasetError: If a file or folder is missing or wrong.
    """

    label_set = CITYSCAPES
    input_size = None
    @property
    def sizes(self): return [self.size]*len(self.images)
    images: list[str]  # paths
    targets: list[str]  # paths of the labels
    ignored: set[Path]  # hidden and operating-system files and folders, from leftImg8bit and gtFine down

    def __init__(self, root: str | Path, split: str, limit: int | None = None) -> None:
        self.root = Path(root)
        check_folders(self.root, split)
        images_dir, labels_dir = (self.root / name / split for name in FOLDERS)
        images = sorted(str(path) for path in _files_of_cities(images_dir))
        labels = _labels_of(images, labels_dir)
        check_pairs(images, labels, labels_dir)
        self.images, self.targets = images[:limit], labels[:limit]
        self.ignored = _ignored_files(self.root, split)
        self.height, self.width = check_headers(self.images, self.targets)
        self._decoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by path; shared with selections
        self._most_decoded = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> list[str]:
        """The name of each image, `<city>_<sequence>_<frame>`."""
        return [image_name(path) for path in self.images]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image in pixels."""
        return self.height, self.width

    def select(self, indices: Sequence[int]) -> CityscapesSplit:
        """Return the images at `indices` as a dataset of their own."""
        selection = copy.copy(self)
        selection.images, selection.targets = ([paths[i] for i in indices] for paths in (self.images, self.targets))
        return selection

    def keep_decoded(self, most_bytes: int) -> None:
        """Cache decoded samples, up to `most_bytes`; these tensors must not be changed.

        The first samples that are read are cached; the others are decoded every time.
        """
        self._most_decoded = most_bytes // (4 * self.height * self.width)  # RGB and train ids, a byte each

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        path = self.images[index]
        if path in self._decoded:
            return self._decoded[path]
        labels = _decode(self.targets[index], "gray")
        image = torch.from_numpy(_decode(path, "RGB")).permute(2, 0, 1)
        sample = image, torch.from_numpy(train_ids(labels, self.targets[index]))
        if len(self._decoded) < self._most_decoded:
            self._decoded[path] = sample
        return sample


def image_name(path: str | Path) -> str:
    """Return `<city>_<sequence>_<frame>` of an image's path."""
    return Path(path).name[: -len(IMAGE_SUFFIX)]


def _ends_in(path: Path | str, suffix: str) -> bool:
    """Return whether a name ends in a suffix, in upper or lower case."""
    return str(path).lower().endswith(suffix.lower())


def check_folders(root: Path, split: str) -> None:
    """Raise DatasetError unless `root` has Cityscapes' folders of this split and images in them."""
    images, labels = (root / name / split for name in FOLDERS)
    for folder in (root, images, labels):
        if not folder.is_dir():
            raise DatasetError(
                f"{folder}: this folder does not exist. --dataset-path takes the folder that holds leftImg8bit and "
                f"gtFine, each with a folder {split}."
            )
    for city in (*visible_files(images), *visible_files(labels)):
        if not city.is_dir():
            raise DatasetError(f"{city}: this is not the folder of a city. Move it out of {city.parent}.")
    for folder, suffix in ((images, IMAGE_SUFFIX), (labels, LABEL_SUFFIX)):
        files = sorted(_files_of_cities(folder))
        if not any(_ends_in(path, suffix) for path in files):
            example = f", but {count(len(files), 'other file')} such as {files[0].name}" if files else ""
            raise DatasetError(
                f"{folder}: this folder has no <city>_<sequence>_<frame>{suffix}{example}. Unpack "
                f"{folder.parent.name}_trainvaltest.zip there, or give the PNG files of other data such names."
            )


def _files_of_cities(folder: Path) -> Iterator[Path]:
    """Yield the files of all cities of a split's folder, but not the ignored ones."""
    for city in visible_files(folder):
        yield from visible_files(city)


def _labels_of(images: Sequence[str], labels_dir: Path) -> list[str]:
    """Return the path of the label of each image, as Cityscapes names it if there is none."""
    usual = [labels_dir / Path(path).parent.name / f"{image_name(path)}{LABEL_SUFFIX}" for path in images]
    found = {str(path).lower(): path for path in _files_of_cities(labels_dir)}
    return [str(found.get(str(path).lower(), path)) for path in usual]


def _ignored_files(root: Path, split: str) -> set[Path]:
    """Return the ignored files and folders of a split, and those beside its folders."""
    splits = [root / name / split for name in FOLDERS]
    cities = [city for folder in splits for city in visible_files(folder)]
    folders = [*(folder.parent for folder in splits), *splits, *cities]
    return {path for folder in folders for path in ignored_files(folder)}


def check_pairs(images: Sequence[str], labels: Sequence[str], labels_dir: Path) -> None:
    """Raise DatasetError unless each image has its label and each label its image."""
    found = {str(path) for path in _files_of_cities(labels_dir) if _ends_in(path, LABEL_SUFFIX)}
    orphans = found - set(labels)
    names = Counter(path.lower() for path in images)
    problems = {
        f"the name of this file does not end in {IMAGE_SUFFIX}. Move it elsewhere.": [
            path for path in images if not _ends_in(path, IMAGE_SUFFIX)
        ],
        "another image has this name in upper or lower case. Remove one of them.": [
            path for path in images if names[path.lower()] > 1
        ],
        "the label of an image is missing. Unpack gtFine_trainvaltest.zip, or remove the image.": [
            path for path in labels if not Path(path).exists()
        ],
        "the image of this label is missing. Unpack leftImg8bit_trainvaltest.zip, or remove the label.": orphans,
    }
    for problem, paths in problems.items():
        if paths:
            others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
            raise DatasetError(f"{min(paths)}{others}: {problem}")


def check_headers(images: Sequence[str], labels: Sequence[str]) -> tuple[int, int]:
    """Return the height and width that all files share; raise DatasetError for the first with another size or color."""
    first = _read_header(images[0], "RGB")
    for pair in zip(images, labels, strict=True):
        for path, color in zip(pair, ("RGB", "gray"), strict=True):
            header = _read_header(path, color)
            if (header.width, header.height) != (first.width, first.height):
                raise DatasetError(
                    f"{path}: this file has {header.width}x{header.height} pixels, but {images[0]} has "
                    f"{first.width}x{first.height}. All images and labels of a split must have the same size."
                )
    return first.height, first.width


def _read_header(path: str, color: str) -> png.PngHeader:
    """Return the header of an image ("RGB") or a label ("gray"); raise DatasetError if it is no such file."""
    with _errors_named(path, _REMEDIES[color]):
        check_plain_file(path)
        return png.read_header(path, color)


def _decode(path: str, color: str) -> np.ndarray:
    """Return the pixels of an image (H, W, 3) uint8 or of a label (H, W) uint8; raise DatasetError if it is damaged."""
    header = _read_header(path, color)
    with _errors_named(path, "Copy or unpack it again."):
        return png.decode(Path(path).read_bytes(), header)


@contextlib.contextmanager
def _errors_named(path: str, remedy: str) -> Iterator[None]:
    """Turn an error while a file is read into a DatasetError that names it, unless the memory does not suffice."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise DatasetError(
            f"{path}: this file can't be read ({error.strerror}). Check the file, its disk and its permissions."
        ) from error
    except ValueError as error:
        raise DatasetError(f"{path}: {error}. {remedy}") from error


def train_ids(label_ids: np.ndarray, path: str) -> np.ndarray:
    """Return the train ids (H, W) uint8 of label ids (H, W) uint8; raise DatasetError if they are not label ids."""
    largest = label_ids.max()
    if largest >= len(LABELS):
        raise DatasetError(f"{path}: {largest} is not a label id. {_REMEDIES['label ids']}")
    if largest < NUM_CLASSES and np.isin(label_ids, _SUSPICIOUS_IDS).any():
        raise DatasetError(f"{path}: this file holds train ids, not label ids. {_REMEDIES['label ids']}")
    return np.take(TRAIN_IDS, label_ids)  # takes half the time of TRAIN_IDS[label_ids]
