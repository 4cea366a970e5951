"""Decode 8-bit RGB JPEG files that may be damaged, in bounded memory."""

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from datasets.png import check_limits

SUFFIXES = (".jpg", ".jpeg")
SCAN, END = b"\xff\xda", b"\xff\xd9"  # markers before pixels and after all


def read_size(path: Path | str) -> tuple[int, int]:
    """Return the height and width that the header of an RGB JPEG file names.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is another kind of file, or too large.
    """
    with Path(path).open("rb") as file:
        image = _open(file)
        if image.mode != "RGB":
            raise ValueError(f"this JPEG file is {'gray' if image.mode == 'L' else image.mode}")
        check_limits(image.width, image.height, 3 * image.width * image.height, file.seek(0, 2))
    return image.height, image.width


def decode(data: bytes) -> np.ndarray:
    """Return the pixels (H, W, 3) uint8 of a file's bytes.

    Raises:
        ValueError: If the data ends early or is damaged, as far as a format without checksums shows it.
    """
    if data.rfind(END) < data.rfind(SCAN):  # Pillow accepts zeros after most of the data, as interrupted copies have
        raise ValueError("this JPEG file is truncated or damaged (it has no end)")
    try:
        return np.array(_open(io.BytesIO(data)))
    except OSError as error:
        raise ValueError(f"this JPEG file is truncated or damaged ({error})") from error


def _open(file: IO[bytes]) -> JpegImageFile:
    """Read the header with Pillow's class for JPEG alone: other formats are not tried, and no warnings are printed."""
    try:
        return JpegImageFile(file)
    except (OSError, SyntaxError) as error:
        if getattr(error, "errno", None):  # not an error in the content
            raise
        raise ValueError("this is not a JPEG file, or its header is damaged") from error
