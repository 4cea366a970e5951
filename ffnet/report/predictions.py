"""Predictions as PNG files of label ids, for Cityscapes' evaluation server and its official scripts."""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.cityscapes import LABEL_IDS, CityscapesSplit, image_name
from ffnet.backends import short_name
from ffnet.files import write_atomically

BYTES_PER_PIXEL = 1 / 8  # upper bound for such a PNG file


def predictions_folder(folder: Path, backend: str) -> Path:
    """Return where a backend's predictions are, which the official script takes as CITYSCAPES_RESULTS."""
    return folder / short_name(backend)


def predictions_megabytes(images: CityscapesSplit, backends: Collection[str]) -> float:
    """Return an upper bound of the disk space that the predictions of these backends take, in MB."""
    return len(backends) * images.total_pixels * BYTES_PER_PIXEL / 1e6


def prediction_writer(
    folder: Path, paths: Sequence[str], backends: Collection[str]
) -> Callable[[int, Mapping[str, np.ndarray]], None]:
    """Return a function that writes the predictions of one image, given its index and its train ids per backend.

    The files are `<folder>/<backend>/<city>_<sequence>_<frame>_pred_labelIds.png`.

    Args:
        folder: is created, with a folder per backend.
        paths: of the images, in the order of their indices.
        backends: whose predictions are written; those of others are ignored.
    """
    for backend in backends:
        predictions_folder(folder, backend).mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        for backend in backends:
            file = io.BytesIO()
            Image.fromarray(LABEL_IDS[predictions[backend]]).save(file, "PNG")
            path = predictions_folder(folder, backend) / f"{image_name(paths[index])}_pred_labelIds.png"
            write_atomically(path, file.getvalue())

    return write
