"""Cityscapes' fine labels on torchvision's dataset: pairs of image and label, sorted, complete and checked."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image

from datasets import DatasetError

IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"
IGNORED = 255  # train id of everything that is not scored

_SCORED = sorted((c for c in torchvision.datasets.Cityscapes.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
CLASSES = tuple(c.name for c in _SCORED)  # position is the train id
COLORS = np.array([c.color for c in _SCORED], np.uint8)  # (19, 3) RGB
LABEL_IDS = np.array([c.id for c in _SCORED], np.uint8)  # train id -> label id

_LAST_ID = max(c.id for c in torchvision.datasets.Cityscapes.classes)
TRAIN_IDS = np.full(_LAST_ID + 1, IGNORED, np.uint8)  # label id -> train id
TRAIN_IDS[LABEL_IDS] = np.arange(len(CLASSES))

# Train ids that, read as label ids, hardly ever stand in a Cityscapes image (parking, tunnel, static things ...).
_TELLTALE_IDS = sorted(set(range(5, len(CLASSES))) - set(LABEL_IDS.tolist()))


class CityscapesSplit(torchvision.datasets.Cityscapes):
    """Item: (image (3, H, W) uint8 RGB, train ids (H, W) uint8, 255 where not scored).

    `root` holds `leftImg8bit` and `gtFine`; `limit` keeps the first so many pairs. Names and headers of all files are
    checked here, their pixels when they are read. Raises DatasetError.
    """

    def __init__(self, root, split, limit=None):
        check_folders(Path(root), split)
        super().__init__(str(root), split=split, mode="fine", target_type="semantic")
        labels = [target[0] for target in self.targets]
        check_pairs(self.images, labels, Path(self.targets_dir))
        pairs = sorted(zip(self.images, labels, strict=True))[:limit]
        self.images, self.targets = map(list, zip(*pairs, strict=True))
        self.height, self.width = check_headers(self.images, self.targets)

    def pixels(self):
        """Of all images together."""
        return len(self) * self.height * self.width

    def __getitem__(self, index):
        image = _decode(self.images[index])
        labels = _decode(self.targets[index])[0]
        return image, torch.from_numpy(train_ids(labels.numpy(), self.targets[index]))


def check_folders(root, split):
    """DatasetError unless `root` has Cityscapes' folders of this split and images in them."""
    remedy = "--dataset-path takes the folder that holds leftImg8bit and gtFine"
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; {remedy}")
    for kind in ("leftImg8bit", "gtFine"):
        folder = root / kind / split
        if not folder.is_dir():
            raise DatasetError(f"{folder}: no such folder; {remedy}, each with a folder {split}")
        for city in folder.iterdir():
            if not city.is_dir():
                raise DatasetError(f"{city}: not the folder of a city; move it out of {folder}")
    if not any((root / "leftImg8bit" / split).glob(f"*/*{IMAGE_SUFFIX}")):
        raise DatasetError(f"{root / 'leftImg8bit' / split}: no *{IMAGE_SUFFIX} in it; unpack Cityscapes' images there")


def check_pairs(images, labels, labels_dir):
    """DatasetError unless each image has its label and each label its image."""
    strangers = [path for path in images if not path.endswith(IMAGE_SUFFIX)]
    _refuse(strangers, f"not named like an image, *{IMAGE_SUFFIX}; move it elsewhere")
    missing = [label for label in labels if not Path(label).is_file()]
    _refuse(missing, "missing, the label of an image; unpack gtFine_trainvaltest.zip, or take the image out")
    known = set(labels)
    orphans = sorted(str(path) for path in labels_dir.glob(f"*/*{LABEL_SUFFIX}") if str(path) not in known)
    _refuse(orphans, "a label without its image; unpack leftImg8bit_trainvaltest.zip, or take the label out")


def _refuse(paths, reason):
    if paths:
        others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        raise DatasetError(f"{sorted(paths)[0]}: {reason}{others}")


def check_headers(images, labels):
    """Height and width that all files share; DatasetError names the first that differs or is of another kind."""
    size = _header(images[0], "RGB")
    for image, label in zip(images, labels, strict=True):
        for path, mode in ((image, "RGB"), (label, "L")):
            if _header(path, mode) != size:
                raise DatasetError(
                    f"{path}: {_shape(_header(path, mode))} pixels where {images[0]} has {_shape(size)}; all images "
                    "and labels of a split must have one size"
                )
    return size[1], size[0]


def _shape(size):
    return f"{size[0]}x{size[1]}"


def _header(path, mode):
    """(width, height) from the file's header."""
    remedies = {
        "RGB": "images are 8-bit RGB PNGs, as in leftImg8bit_trainvaltest.zip",
        "L": "labels are 8-bit grey PNGs of label ids, no colours: gtFine_trainvaltest.zip has them",
    }
    try:
        with Image.open(path) as file:
            if file.format == "PNG" and file.mode == mode:
                return file.size
            found = f"{file.format} of mode {file.mode}"
    except UnidentifiedImageError:
        found = "not an image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        found = f"unreadable ({error})"
    raise DatasetError(f"{path}: {found}; {remedies[mode]}")


def _decode(path):
    """Pixels (channels, H, W) uint8; DatasetError where the file's checksums do not hold."""
    try:
        with Image.open(path) as file:
            file.verify()  # torchvision's decoder does not survive a flipped byte
        pixels = decode_image(path, ImageReadMode.UNCHANGED)
    except (RuntimeError, OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path}: truncated or broken PNG; copy or unpack the file again") from error
    if pixels.dtype != torch.uint8:  # Pillow tells no 16-bit RGB from 8-bit
        raise DatasetError(f"{path}: {pixels.dtype}, not 8 bits a channel; take the original file")
    return pixels


def train_ids(label_ids, path):
    """Label ids (H, W) uint8 -> train ids (H, W) uint8; DatasetError where the file holds something else."""
    largest = label_ids.max()
    if largest > _LAST_ID:
        raise DatasetError(f"{path}: holds {largest}, which is no label id; {_TRAIN_ID_REMEDY}")
    if largest < len(CLASSES):
        telltale = np.intersect1d(label_ids, _TELLTALE_IDS)
        if telltale.size:
            raise DatasetError(
                f"{path}: ids 0 to {largest}, {telltale[0]} among them, are train ids; {_TRAIN_ID_REMEDY}"
            )
    return np.take(TRAIN_IDS, label_ids)  # half the time of TRAIN_IDS[label_ids]


_TRAIN_ID_REMEDY = "take the original *_gtFine_labelIds.png, not a file that createTrainIdLabelImgs.py made"
