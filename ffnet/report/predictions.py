"""Predictions as PNG files of label ids, for Cityscapes' evaluation server and its official scripts."""

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.cityscapes import LABEL_IDS, CityscapesSplit, image_name
from ffnet.backends import short_name
from ffnet.evaluation.recording import Writer
from ffnet.files import write_atomically

BYTES_PER_PIXEL = 1 / 8  # upper bound for such a PNG file


def predictions_megabytes(images: CityscapesSplit, backends: Collection[str]) -> float:
    """Return an upper bound of the disk space that the predictions of these backends take, in MB."""
    return len(backends) * images.total_pixels * BYTES_PER_PIXEL / 1e6


def prediction_writer(folder: Path, paths: Sequence[str], backends: Collection[str]) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `paths` and its train ids.

    Predictions of backends that are not in `backends` are ignored. The official script takes the folder of a backend as
    CITYSCAPES_RESULTS. The files are `<folder>/<backend>/<city>_<sequence>_<frame>_pred_labelIds.png`.
    """
    folders = {backend: folder / short_name(backend) for backend in backends}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        for backend, path in folders.items():
            file = io.BytesIO()
            Image.fromarray(LABEL_IDS[predictions[backend]]).save(file, "PNG")
            write_atomically(path / f"{image_name(paths[index])}_pred_labelIds.png", file.getvalue())

    return write
