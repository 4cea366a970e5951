"""Decode PNG files that may be damaged or forged, in bounded time and memory.

The general decoders do not suffice: torchvision's ends the process on a wrong filter byte or missing rows, and Pillow's
PNG reader returns black rows where the data ends early. Here only the filters of complete rows are left to Pillow.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = ">8sI4sIIBBBBB"  # signature; length and name of the chunk IHDR, and its contents
COLOR_TYPES = {0: "gray", 2: "RGB", 3: "palette", 4: "gray and alpha", 6: "RGBA"}
CHANNELS = {"gray": 1, "palette": 1, "RGB": 3}
KINDS = {"RGB": ("RGB",), "gray": ("gray",), "index": ("gray", "palette")}  # kind of pixels -> colors
ADAM7 = (  # first column, first row and steps of both, of each pass through an interlaced image
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
MAX_PIXELS = 2**26  # 32 times those of a Cityscapes image
MAX_OTHER_BYTES = 2**24  # size of the chunks beside the pixels, such as color profiles


@dataclass(frozen=True)
class PngHeader:
    """Size and format of a PNG file."""

    width: int
    height: int
    color: str  # a key of CHANNELS
    interlaced: bool
    depth: int = 8  # bits per channel; fewer than 8 in files of small palettes

    @property
    def row_bytes(self) -> int:
        """Number of bytes of all rows when decompressed: one byte that names the filter, then the pixels."""
        total = 0
        for x, y, x_step, y_step in ADAM7 if self.interlaced else ((0, 0, 1, 1),):
            columns, rows = len(range(x, self.width, x_step)), len(range(y, self.height, y_step))
            total += rows * (1 + -(-columns * CHANNELS[self.color] * self.depth // 8)) if columns else 0
        return total


def read_header(path: Path | str, kind: str) -> PngHeader:
    """Return the header of a PNG file whose pixels must be of a kind in KINDS.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is another kind of file, or too large for the size that its header names.
    """
    with Path(path).open("rb") as file:
        head = file.read(struct.calcsize(HEADER))
        file_bytes = file.seek(0, 2)
    if len(head) < struct.calcsize(HEADER) or not head.startswith(SIGNATURE):
        raise ValueError("this is not a PNG file")
    _, length, chunk, width, height, depth, color_type, *methods = struct.unpack(HEADER, head)
    if (length, chunk) != (13, b"IHDR") or methods not in ([0, 0, 0], [0, 0, 1]) or not width or not height:
        raise ValueError("the header of this PNG file is damaged")
    color = COLOR_TYPES.get(color_type, "of an unknown color type")
    if color not in KINDS[kind] or depth not in ((1, 2, 4, 8) if color == "palette" else (8,)):
        raise ValueError(f"this PNG file is {depth}-bit {color}")
    header = PngHeader(width, height, color, bool(methods[2]), depth)
    check_limits(width, height, header.row_bytes, file_bytes)
    return header


def check_limits(width: int, height: int, pixel_bytes: int, file_bytes: int) -> None:
    """Raise ValueError if an image is too large, or if its file is for the bytes that its pixels take."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"this file has {width}x{height} pixels, and at most {MAX_PIXELS} are read")
    if file_bytes > 2 * pixel_bytes + MAX_OTHER_BYTES:
        raise ValueError(f"this file has {file_bytes} bytes, which does not fit the {width}x{height} pixels it names")


def decode(data: bytes, header: PngHeader) -> np.ndarray:
    """Return the pixels (H, W) or (H, W, 3) uint8 of a file's bytes.

    Raises:
        ValueError: If a chunk is damaged, or if the rows are not complete.
    """
    inflate = zlib.decompressobj()
    try:
        rows = inflate.decompress(_image_data(data), header.row_bytes + 1)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"this PNG file is truncated or damaged ({error})") from error
    if len(rows) < header.row_bytes or (len(rows) == header.row_bytes and not inflate.eof):
        raise ValueError("this PNG file is truncated: it lacks rows or their checksum")
    mode = {"RGB": "RGB", "gray": "L", "palette": "P"}[header.color]
    stored_mode = mode if header.depth == 8 else f"{mode};{header.depth}"
    stored = zlib.compress(rows, 0)  # Pillow's decoder takes nothing but a zlib stream
    size = header.width, header.height
    return np.array(Image.frombytes(mode, size, stored, "zip", stored_mode, header.interlaced))


def _image_data(data: bytes) -> bytes:
    """Return the joined contents of all chunks IDAT, after checking the checksum of every chunk."""
    view, position, kind = memoryview(data), len(SIGNATURE), b""
    parts = []
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if struct.unpack_from(">I", data, end)[0] != zlib.crc32(view[position + 4 : end]):
            raise ValueError("this PNG file is damaged: the checksum of a chunk is wrong")
        if kind == b"IDAT":
            parts.append(view[position + 8 : end])
        position = end + 4
    return b"".join(parts)
