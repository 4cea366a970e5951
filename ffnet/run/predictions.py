"""The predictions that --save-predictions writes, image by image."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import Split
from ffnet.config import Config
from ffnet.system.files import write_atomically

Writer = Callable[[int, Mapping[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}

PREDICTION_FOLDERS = ("simulated", "ONNX_file")  # without and with --onnx


def predictions_folder(folder: Path, config: Config) -> Path:
    """Return the folder in that of --save-predictions that gets the predictions of the one backend that is saved."""
    return folder / PREDICTION_FOLDERS[config.model.onnx is not None]


def prediction_writer(folder: Path, images: Split, backend: str) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `images` and its train ids.

    They are written as ids of the label set, in files named `<name>_pred_labelIds.png`. Those of Cityscapes are what
    the official script takes as CITYSCAPES_RESULTS.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        file = io.BytesIO()
        Image.fromarray(images.label_set.label_ids[predictions[backend]]).save(file, "PNG")
        write_atomically(folder / f"{images.names[index]}_pred_labelIds.png", file.getvalue())

    return write
