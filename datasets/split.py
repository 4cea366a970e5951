"""One split of a data set: sorted, complete and checked pairs of image and label."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datasets.files import DatasetError, decode, read_size
from datasets.layouts import Layout, check_folders, find_label_set, find_layout, ignored_files, visible_files
from ffnet.labels import CITYSCAPES, UNKNOWN, LabelSet
from ffnet.system.files import is_ignored

if TYPE_CHECKING:
    import torch

# Label ids of Cityscapes that hardly ever occur (parking, tunnel ...). A file in which they do, but no id from 19 on,
# holds train ids.
_SUSPICIOUS_IDS = sorted(set(range(5, len(CITYSCAPES.classes))) - set(CITYSCAPES.label_ids.tolist()))


class Split:
    """One split of a data set, a map-style dataset for torch.

    Each item is (image (3, h, w) uint8 RGB, train ids (H, W) uint8, 255 if not scored); h and w are `input_size`, or H
    and W without one. Names and headers of all files are checked at once, and pixels when they are read. Hidden files
    and those that operating systems leave behind are ignored.

    Args:
        layout: A name in LAYOUTS, or cityscapes:VARIANT.
        root: Folder of the data set.
        split: "train", "val" or "test".
        limit: Use only the first `limit` pairs; None: all.
        label_set: None: that of the layout.
        input_size: Height and width to which the images are resized by Pillow's bicubic interpolation; labels keep
            their size. None: images keep theirs, too.

    Raises:
        DatasetError: If a file or folder is missing or wrong.
    """

    images: list[str]  # paths
    targets: list[str]  # paths of the labels
    names: list[str]  # unique names of the images
    sizes: list[tuple[int, int]]  # height and width of each label
    ignored: set[Path]  # hidden and operating-system files and folders in and beside the folders of the split

    def __init__(
        self,
        layout: str,
        root: str | Path,
        split: str,
        limit: int | None = None,
        label_set: LabelSet | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        self.root, self.input_size, self._layout = Path(root), input_size, find_layout(layout)
        check_folders(layout, self.root, split)
        self.label_set = label_set or find_label_set(self._layout, self.root)
        pairs = find_pairs(self._layout, self.root, split)
        self.names = list(pairs)[:limit]
        self.images, self.targets = ([str(pair[i]) for pair in pairs.values()][:limit] for i in (0, 1))
        folders = [side.path(self.root, split) for side in (self._layout.images, self._layout.labels)]
        beside = [path for folder in folders for path in folder.parent.iterdir() if is_ignored(path.name)]
        self.ignored = {path for folder in folders for path in ignored_files(folder)}.union(beside)
        self.sizes = check_headers(self.images, self.targets, self._layout)
        self._decoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by path; shared with selections
        self._most_decoded = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of every image in pixels, as networks get it; None if they differ."""
        if self.input_size:
            return self.input_size
        return self.sizes[0] if len(set(self.sizes)) == 1 else None

    def select(self, indices: Sequence[int]) -> Split:
        """Return the images at `indices` as a dataset of their own."""
        selection = copy.copy(self)
        for name in ("images", "targets", "names", "sizes"):
            setattr(selection, name, [getattr(self, name)[i] for i in indices])
        return selection

    def keep_decoded(self, most_bytes: int) -> None:
        """Cache decoded samples, up to `most_bytes`; these tensors must not be changed.

        The first samples that are read are cached; the others are decoded every time.
        """
        pixels = max(height * width for height, width in self.sizes)
        height, width = self.input_size or (pixels, 1)
        self._most_decoded = most_bytes // (3 * height * width + pixels)  # RGB and train ids, a byte each

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        path = self.images[index]
        if path in self._decoded:
            return self._decoded[path]
        labels, pixels = decode(self.targets[index], self._layout.label_kind), decode(path, "RGB")
        if self.input_size and pixels.shape[:2] != self.input_size:
            pixels = np.array(Image.fromarray(pixels).resize(self.input_size[::-1]))
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        sample = image, torch.from_numpy(train_ids(labels, self.label_set, self.targets[index]))
        if len(self._decoded) < self._most_decoded:
            self._decoded[path] = sample
        return sample


def find_pairs(layout: Layout, root: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """Return the paths of image and label by the name of the image, sorted by the paths of the images.

    Raises:
        DatasetError: If the label of an image or the image of a label is missing, or if two images have one name.
    """
    images_dir, labels_dir = layout.images.path(root, split), layout.labels.path(root, split)
    images = sorted(visible_files(images_dir), key=str)
    if layout.variant:
        images = [path for path in images if layout.images.suffix_of(path)]
    labels = {
        str(path.relative_to(labels_dir)).lower().removesuffix(end.lower()): path
        for path in visible_files(labels_dir)
        if (end := layout.labels.suffix_of(path))
    }
    keys = [str(path.relative_to(images_dir)).removesuffix(layout.images.suffix_of(path) or "") for path in images]
    targets = [labels.get(key.lower(), labels_dir / f"{key}{layout.labels.suffixes[0]}") for key in keys]
    names = [Path(key).name if layout.cities else "_".join(Path(key).parts) for key in keys]
    uses = Counter(name.lower() for name in names)
    problems = {
        f"the name of this file does not end in {' or '.join(layout.images.suffixes)}. Move it elsewhere.": [
            path for path in images if not layout.images.suffix_of(path)
        ],
        "another image has this name, apart from upper and lower case and suffix. Remove one of them.": [
            path for path, name in zip(images, names, strict=True) if uses[name.lower()] > 1
        ],
        f"the label of an image is missing. {_unpack(layout.labels.archive)}, or remove the image.": [
            path for path in targets if not path.exists()
        ],
        f"the image of this label is missing. {_unpack(layout.images.archive)}, or remove the label.": set()
        if layout.variant
        else set(labels.values()) - set(targets),
    }
    for problem, paths in problems.items():
        if paths:
            others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
            raise DatasetError(f"{min(paths, key=str)}{others}: {problem}")
    return dict(zip(names, zip(images, targets, strict=True), strict=True))


def _unpack(archive: str) -> str:
    return f"Unpack {archive}" if archive else "Add it"


def check_headers(images: Sequence[str], labels: Sequence[str], layout: Layout) -> list[tuple[int, int]]:
    """Return the height and width of each pair; raise DatasetError for the first file with another size or color."""
    sizes: list[tuple[int, int]] = []
    rule = "All images and labels of a split" if layout.one_size else "An image and its label"
    for image, label in zip(images, labels, strict=True):
        size = read_size(image, "RGB")
        other, expected = (images[0], sizes[0]) if layout.one_size and sizes else (image, size)
        for path, found in ((image, size), (label, read_size(label, layout.label_kind))):
            if found != expected:
                raise DatasetError(
                    f"{path}: this file has {found[1]}x{found[0]} pixels, but {other} has {expected[1]}x{expected[0]}. "
                    f"{rule} must have the same size."
                )
        sizes.append(size)
    return sizes


def train_ids(ids: np.ndarray, label_set: LabelSet, path: str) -> np.ndarray:
    """Return the train ids (H, W) uint8 of label ids (H, W) uint8.

    Raises:
        DatasetError: If the label set lacks an id, or if a file of Cityscapes' labels holds train ids.
    """
    found = np.take(label_set.train_ids, ids)  # takes half the time of train_ids[ids]
    if (found == UNKNOWN).any():
        unknown = ids[found == UNKNOWN].max()
        raise DatasetError(f"{path}: {unknown} is not an id of the label set {label_set.name!r}. {_remedy(label_set)}")
    if label_set is CITYSCAPES and ids.max() < len(CITYSCAPES.classes) and np.isin(ids, _SUSPICIOUS_IDS).any():
        raise DatasetError(f"{path}: this file holds train ids, not label ids. {_remedy(label_set)}")
    return found


def _remedy(label_set: LabelSet) -> str:
    """Return what to do about a label file with ids that the label set does not have."""
    if label_set is CITYSCAPES:
        return "Use the original *_gtFine_labelIds.png, not a file that createTrainIdLabelImgs.py wrote."
    return "Use another label file, or add the id to the label set, to a class or to `ignored`."
