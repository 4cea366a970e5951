"""Read the image and label files of a data set, PNG and JPEG; every error names the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datasets import jpeg, png
from ffnet.system.errors import UserError
from ffnet.system.files import check_plain_file
from ffnet.system.memory import is_out_of_memory

_REMEDIES = {  # required kind of pixels -> remedy
    "RGB": "Images are 8-bit RGB files.",
    "gray": "Labels are 8-bit gray PNG files of ids, not of colors.",
    "index": "Labels are 8-bit gray PNG files of ids, or PNG files whose palette indices are the ids.",
}


class DatasetError(UserError):
    """An error in a file of a data set."""


def read_size(path: str, kind: str) -> tuple[int, int]:
    """Return the height and width of an image ("RGB") or a label ("gray" or "index") from its header.

    Raises:
        DatasetError: If it is not such a file.
    """
    with _errors_named(path, _REMEDIES[kind]):
        check_plain_file(path)
        if path.lower().endswith(jpeg.SUFFIXES):
            return jpeg.read_size(path)
        header = png.read_header(path, kind)
        return header.height, header.width


def decode(path: str, kind: str) -> np.ndarray:
    """Return the pixels of an image (H, W, 3) uint8 or of a label (H, W) uint8; raise DatasetError if it is damaged."""
    read_size(path, kind)
    with _errors_named(path, "Copy or unpack it again."):
        data = Path(path).read_bytes()
        if path.lower().endswith(jpeg.SUFFIXES):
            return jpeg.decode(data)
        return png.decode(data, png.read_header(path, kind))


@contextlib.contextmanager
def _errors_named(path: str, remedy: str) -> Iterator[None]:
    """Turn an error while a file is read into a DatasetError that names it, unless the memory does not suffice."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise DatasetError(
            f"{path}: this file can't be read ({error.strerror}). Check the file, its disk and its permissions."
        ) from error
    except ValueError as error:
        raise DatasetError(f"{path}: {error}. {remedy}") from error
