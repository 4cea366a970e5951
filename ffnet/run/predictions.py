"""The predictions that --save-predictions writes, image by image."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import Split
from ffnet.config import Config
from ffnet.system.files import write_atomically

Writer = Callable[[int, Mapping[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}

PREDICTION_FOLDERS = ("simulated", "ONNX_file")  # without and with --onnx
BYTES_PER_PIXEL = 1 / 8  # upper bound of a PNG file of predictions


def predictions_folder(folder: Path, config: Config) -> Path:
    """Return the folder in that of --save-predictions that gets the predictions of the one backend that is saved."""
    return folder / PREDICTION_FOLDERS[config.model.onnx is not None]


def predictions_megabytes(sizes: Iterable[tuple[int, int]]) -> float:
    """Return an upper bound of the disk space that the predictions of images of these sizes (H, W) take, in MB."""
    return sum(height * width for height, width in sizes) * BYTES_PER_PIXEL / 1e6


def prediction_writer(folder: Path, images: Split, backend: str) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `images` and its train ids.

    They are written as ids of the label set, in files named `<name>_pred_labelIds.png`. Those of Cityscapes are what
    the official script takes as CITYSCAPES_RESULTS.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        file = io.BytesIO()
        Image.fromarray(images.label_set.label_ids[predictions[backend]]).save(file, "PNG")
        write_atomically(_prediction_file(folder, images.names[index]), file.getvalue())

    return write


def missing_predictions(folder: Path, names: Sequence[str], indices: Iterable[int]) -> list[int]:
    """Return the `indices` of the images whose predictions are not in the folder."""
    return [index for index in indices if not _prediction_file(folder, names[index]).is_file()]


def _prediction_file(folder: Path, name: str) -> Path:
    return folder / f"{name}_pred_labelIds.png"
