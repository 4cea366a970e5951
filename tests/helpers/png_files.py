"""PNG files built chunk by chunk, good ones and ones with something changed at random.

`python -m tests.helpers.png_files FOLDER NUMBER` reads mutated files in a process of its own, which they could end.
"""

import json
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from datasets import DatasetError
from datasets.cityscapes import CityscapesSplit
from tests.helpers.cityscapes_tree import write_tree

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = (b"IEND", b"")
RGB, GRAY = 2, 0
KINDS = (
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP tEXt zTXt iTXt bKGD pHYs sBIT hIST eXIf acTL fcTL fdAT ABCD".split()
)


def header(width, height, color=RGB, depth=8, methods=(0, 0, 0)):
    """The chunk IHDR; `methods` are those of compression, filters and interlacing."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, *methods)


def png_file(*chunks):
    """The bytes of a file of chunks (name, contents), with the right checksums."""
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def rows_of(pixels):
    """The rows of pixels (H, W) or (H, W, 3), not filtered."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced_rows(pixels):
    """The rows of the seven passes of Adam7."""
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in starts]
    return b"".join(rows_of(part) for part in passes if part.shape[1])


def zeros_stream(first, gibibytes):
    """A zlib stream of `first` and then of so many GiB of zeros, which is not compressed as a whole."""
    one = zlib.compressobj(9, wbits=-15)
    block = one.compress(bytes(2**24)) + one.flush(zlib.Z_FULL_FLUSH)
    start = zlib.compressobj(9)
    return start.compress(first) + start.flush(zlib.Z_FULL_FLUSH) + block * 64 * gibibytes


def mutated_png(rng, color):
    """A small file of any filters with one or two changes; the checksums are right after most of them."""
    width, height = rng.randint(1, 20), rng.randint(1, 12)
    fields = [width, height, 8, color, 0, 0, rng.random() < 0.2]
    stride = 1 + width * (3 if color == RGB else 1)
    pixels = rng.randbytes if color == RGB else bytes  # most other bytes are no label ids
    rows = bytearray(b"".join(bytes([rng.randrange(5)]) + pixels(stride - 1) for _ in range(height)))
    changes = rng.sample(("field", "filter", "rows", "length", "stream", "chunks", "bytes", "cut"), rng.randint(1, 2))
    if "field" in changes:
        index = rng.randrange(7)
        fields[index] = rng.choice((0, 1, 2, 3, 4, 16, 255, fields[index] + 1, 2**31 if index < 2 else 6))
    if "filter" in changes:
        rows[rng.randrange(height) * stride] = rng.randrange(256)
    if "rows" in changes:
        rows[rng.randrange(len(rows))] ^= 1 << rng.randrange(8)
    if "length" in changes:
        rows = (rows + rng.randbytes(3 * stride))[
            : rng.choice((stride * rng.randint(0, height + 2), rng.randrange(999)))
        ]
    stream = bytearray(zlib.compress(rows, rng.randrange(10)))
    if "stream" in changes:
        stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
        stream = stream[: rng.choice((len(stream), rng.randrange(len(stream))))]
    at = rng.randrange(len(stream) + 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *fields)), (b"IDAT", stream[:at]), (b"IDAT", stream[at:]), END]
    if "chunks" in changes:
        new = (rng.choice(KINDS), rng.choice((rng.randbytes(rng.choice((0, 6, 8, 26))), chunks[0][1], stream)))
        chunks.insert(rng.randrange(5), rng.choice((new, rng.choice(chunks))))
        if rng.random() < 0.5:
            first, second = rng.randrange(5), rng.randrange(5)
            chunks[first], chunks[second] = chunks[second], chunks[first]
    data = bytearray(png_file(*chunks))
    if "bytes" in changes:
        at = rng.randrange(len(data))
        data[at : at + 4] = rng.choice((rng.randbytes(4), b"\xff\xff\xff\xff", b"\0\0\0\0"))
    return bytes(data[: rng.randrange(len(data))] if "cut" in changes else data)


def read_mutated_files(folder, number, seed=0):
    """Read `number` mutated files, as images and as labels; print how many were accepted and how many refused."""
    rng, counts = random.Random(seed), {"accepted": 0, "refused": 0}
    write_tree(folder, count=1)
    paths = {RGB: next(folder.glob("leftImg8bit/val/*/*")), GRAY: next(folder.glob("gtFine/val/*/*"))}
    for color, other, shape in [(RGB, GRAY, ()), (GRAY, RGB, (3,))] * (number // 2):
        data = mutated_png(rng, color)
        width, height = (1 + (int.from_bytes(data[at : at + 4]) - 1) % 256 for at in (16, 20))
        pixels = np.zeros((height, width, *shape), np.uint8)
        paths[color].write_bytes(data)
        paths[other].write_bytes(png_file(header(width, height, other), (b"IDAT", zlib.compress(rows_of(pixels))), END))
        try:
            image, labels = CityscapesSplit(folder, "val")[0]
        except DatasetError as error:
            counts["refused"] += 1
            assert str(paths[color]) in str(error) and "\n" not in str(error)
        else:
            counts["accepted"] += 1
            assert image.shape == (3, height, width) and labels.shape == (height, width)
            assert image.dtype == labels.dtype == torch.uint8
    print(json.dumps(counts))


if __name__ == "__main__":
    read_mutated_files(Path(sys.argv[1]), int(sys.argv[2]))
