"""The predictions that --save-predictions writes, image by image."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ffnet.config import Config
from ffnet.evaluation.scores import INT8_SIMULATED, ONNX_FILE, short_name
from ffnet.labels import LABEL_IDS
from ffnet.system.files import write_atomically

Writer = Callable[[int, Mapping[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}

BYTES_PER_PIXEL = 1 / 8  # upper bound of a PNG file of predictions


def saved_backend(config: Config) -> str:
    """Return the backend whose predictions --save-predictions writes."""
    return ONNX_FILE if config.model.onnx else INT8_SIMULATED


def predictions_megabytes(images: int, size: tuple[int, int]) -> float:
    """Return an upper bound of the disk space that the predictions of images of `size` (H, W) take, in MB."""
    return images * size[0] * size[1] * BYTES_PER_PIXEL / 1e6


def prediction_writer(folder: Path, names: Sequence[str], backend: str) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `names` and its train ids.

    The official script takes the folder of the backend as CITYSCAPES_RESULTS.
    """
    (folder / short_name(backend)).mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        file = io.BytesIO()
        Image.fromarray(LABEL_IDS[predictions[backend]]).save(file, "PNG")
        write_atomically(prediction_file(folder, names[index], backend), file.getvalue())

    return write


def prediction_file(folder: Path, name: str, backend: str) -> Path:
    """Return the path of the predictions for the image `<city>_<sequence>_<frame>`."""
    return folder / short_name(backend) / f"{name}_pred_labelIds.png"
