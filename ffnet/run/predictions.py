"""The predictions that --save-predictions writes, image by image."""

import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ffnet.config import Config
from ffnet.evaluation.scores import INT8_SIMULATED, ONNX_FILE, short_name
from ffnet.labels import LABEL_IDS
from ffnet.system.files import write_atomically

Writer = Callable[[int, Mapping[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}

BYTES_PER_PIXEL = 1 / 8  # upper bound of a PNG file of predictions


def saved_backends(config: Config) -> tuple[str, ...]:
    """Return the backends whose predictions --save-predictions writes."""
    return (ONNX_FILE,) if config.model.onnx else (INT8_SIMULATED,)


def predictions_megabytes(images: int, size: tuple[int, int], backends: Collection[str]) -> float:
    """Return an upper bound of the disk space that the predictions of images of `size` (H, W) take, in MB."""
    return len(backends) * images * size[0] * size[1] * BYTES_PER_PIXEL / 1e6


def prediction_writer(folder: Path, names: Sequence[str], backends: Collection[str]) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `names` and its train ids.

    The official script takes the folder of a backend as CITYSCAPES_RESULTS. The files are
    `<folder>/<backend>/<city>_<sequence>_<frame>_pred_labelIds.png`.
    """
    for backend in backends:
        (folder / short_name(backend)).mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        for backend, path in _prediction_files(folder, names[index], backends).items():
            file = io.BytesIO()
            Image.fromarray(LABEL_IDS[predictions[backend]]).save(file, "PNG")
            write_atomically(path, file.getvalue())

    return write


def missing_predictions(
    folder: Path, names: Sequence[str], backends: Collection[str], indices: Iterable[int]
) -> list[int]:
    """Return the `indices` of the images whose predictions are not all in the folder."""
    return [
        index
        for index in indices
        if not all(path.is_file() for path in _prediction_files(folder, names[index], backends).values())
    ]


def _prediction_files(folder: Path, name: str, backends: Collection[str]) -> dict[str, Path]:
    """Return the file of each backend with the predictions of an image."""
    return {backend: folder / short_name(backend) / f"{name}_pred_labelIds.png" for backend in backends}
