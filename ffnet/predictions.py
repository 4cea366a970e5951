"""Predictions as PNGs of label ids, for Cityscapes' evaluation server and its official scripts."""

import io
from pathlib import Path

from PIL import Image

from datasets.cityscapes import LABEL_IDS
from ffnet.output import write_whole
from ffnet.tables import image_name

BYTES_A_PIXEL = 1 / 8  # of such a PNG, generously


def pass_folder(folder, name):
    """Where the predictions of the named pass lie: what the official script takes as CITYSCAPES_RESULTS."""
    return Path(folder) / name.replace(" ", "_")


def megabytes(images, names):
    """Bound of the disk space, in MB, that the predictions of the named passes take; for output.check_folder."""
    return len(names) * len(images) * images.height * images.width * BYTES_A_PIXEL / 1e6


def prediction_writer(folder, paths, names=("INT8",)):
    """A function (index, predictions) that writes the PNGs of one image.

    `paths`: of the images. `predictions`: {pass: train ids (H, W) uint8}, from which those of `names` are written as
    `<folder>/<pass>/<city>_<sequence>_<frame>_pred_labelIds.png`. KeyError where a pass is missing.
    """
    for name in names:
        pass_folder(folder, name).mkdir(parents=True, exist_ok=True)

    def write(index, predictions):
        for name in names:
            file = io.BytesIO()
            Image.fromarray(LABEL_IDS[predictions[name]]).save(file, "PNG")
            path = pass_folder(folder, name) / f"{image_name(paths[index])}_pred_labelIds.png"
            write_whole(path, file.getvalue())

    return write
