"""Predictions as PNG files of label ids, for Cityscapes' evaluation server and its official scripts."""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.cityscapes import CityscapesSplit, image_name
from ffnet.evaluation.backends import short_name
from ffnet.labels import LABEL_IDS
from ffnet.run.records import Writer
from ffnet.system.files import write_atomically

BYTES_PER_PIXEL = 1 / 8  # upper bound for such a PNG file


def predictions_megabytes(images: CityscapesSplit, backends: Collection[str]) -> float:
    """Return an upper bound of the disk space that the predictions of these backends take, in MB."""
    return len(backends) * images.total_pixels * BYTES_PER_PIXEL / 1e6


def prediction_writer(folder: Path, paths: Sequence[str], backends: Collection[str]) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `paths` and its train ids.

    Predictions of backends that are not in `backends` are ignored. The official script takes the folder of a backend as
    CITYSCAPES_RESULTS. The files are `<folder>/<backend>/<city>_<sequence>_<frame>_pred_labelIds.png`.
    """
    for backend in backends:
        (folder / short_name(backend)).mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        for backend, path in _prediction_files(folder, paths[index], backends).items():
            file = io.BytesIO()
            Image.fromarray(LABEL_IDS[predictions[backend]]).save(file, "PNG")
            write_atomically(path, file.getvalue())

    return write


def missing_predictions(
    folder: Path, paths: Sequence[str], backends: Collection[str], indices: Iterable[int]
) -> list[int]:
    """Return those of the images, by their indices in `paths`, whose predictions are not all in the folder."""
    return [
        index
        for index in indices
        if not all(path.exists() for path in _prediction_files(folder, paths[index], backends).values())
    ]


def _prediction_files(folder: Path, path: str, backends: Collection[str]) -> dict[str, Path]:
    """Return the file of each backend with the predictions of an image."""
    return {backend: folder / short_name(backend) / f"{image_name(path)}_pred_labelIds.png" for backend in backends}
