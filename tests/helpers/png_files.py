"""PNG files built chunk by chunk, good ones and ones with something changed at random.

`python -m tests.helpers.png_files FOLDER NUMBER` decodes mutated files in a process of its own, which they could end.
"""

import json
import random
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from datasets import png
from tests.helpers.mutations import changed, random_changes

END = (b"IEND", b"")
COLORS = {"RGB": 2, "gray": 0}
KINDS = b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP tEXt zTXt iTXt bKGD sBIT hIST eXIf acTL fcTL fdAT ABCD".split()


def header(width, height, color="RGB", depth=8, methods=(0, 0, 0)):
    """The chunk IHDR; `methods` are those of compression, filters and interlacing."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, COLORS.get(color, color), *methods)


def png_file(*chunks):
    """The bytes of a file of chunks (name, contents), with the right checksums."""
    return png.SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def rows_of(pixels, passes=((0, 0, 1, 1),)):
    """The rows of pixels (H, W) or (H, W, 3), not filtered."""
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in passes]
    return b"".join(b"\0" + row.tobytes() for part in parts if part.shape[1] for row in part)


def mutated_png(rng, color):
    """A small file of any filters with one or two parts changed; the checksums are right after most changes."""
    width, height = rng.randint(1, 20), rng.randint(1, 12)
    parts = rng.sample(("header", "rows", "stream", "chunks", "file"), rng.randint(1, 2))

    def mutate(part, data):
        return changed(data, random_changes(rng)) if part in parts else data

    rows = b"".join(bytes([rng.randrange(5)]) + rng.randbytes(width * png.CHANNELS[color]) for _ in range(height))
    rows = mutate("rows", rows).ljust(rng.choice((0, len(rows))), b"\0")
    stream = mutate("stream", zlib.compress(rows, rng.randrange(10)))
    kind, body = header(width, height, color, methods=(0, 0, rng.random() < 0.2))
    at = rng.randrange(len(stream) + 1)
    chunks = [(kind, mutate("header", body)), (b"IDAT", stream[:at]), (b"IDAT", stream[at:]), END]
    if "chunks" in parts:
        chunks.insert(rng.randrange(5), rng.choice((*chunks, (rng.choice(KINDS), rng.randbytes(8)))))
        chunks.append(chunks.pop(rng.randrange(5)))
    return mutate("file", png_file(*chunks))


def decode_mutated_files(folder, number):
    """Decode `number` mutated files of both colors; print how many were accepted and how many refused."""
    rng, counts, path = random.Random(0), Counter(), folder / "a.png"
    for index in range(number):
        color = ("RGB", "gray")[index % 2]
        path.write_bytes(mutated_png(rng, color))
        try:
            found = png.read_header(path, color)
            pixels = png.decode(path.read_bytes(), found)
        except ValueError:
            counts["refused"] += 1
        else:
            counts["accepted"] += 1
            assert pixels.dtype == np.uint8 and pixels.shape[:2] == (found.height, found.width)
    print(json.dumps(counts))


if __name__ == "__main__":
    decode_mutated_files(Path(sys.argv[1]), int(sys.argv[2]))
