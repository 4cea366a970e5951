"""PNG files that are valid are decoded as other decoders do; no other file ends the process or takes long."""

import json
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets import png
from tests.helpers.png_files import END, header, png_file, rows_of

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
SMOOTH = np.linspace(PIXELS[0], PIXELS[1], 64).astype(np.uint8)  # Pillow chooses all filters for it
ROWS = rows_of(PIXELS)
STREAM = zlib.compress(ROWS)


def decode(path, color="RGB"):
    return png.decode(path.read_bytes(), png.read_header(path, color))


@pytest.mark.parametrize("size", ((64, 128), (1, 1), (5, 3)))
@pytest.mark.parametrize("passes", (((0, 0, 1, 1),), png.ADAM7))
def test_every_size_is_decoded_with_and_without_interlacing(tmp_path, size, passes):
    path = tmp_path / "a.png"
    for color, pixels in (("RGB", PIXELS[: size[0], : size[1]]), ("gray", PIXELS[: size[0], : size[1], 0])):
        start = header(size[1], size[0], color, methods=(0, 0, passes is png.ADAM7))
        path.write_bytes(png_file(start, (b"IDAT", zlib.compress(rows_of(pixels, passes))), END))
        assert np.array_equal(decode(path, color), pixels) and np.array_equal(np.asarray(Image.open(path)), pixels)


def test_filters_animations_and_other_chunks_change_nothing(tmp_path):
    more = {"save_all": True, "append_images": [Image.fromarray(PIXELS)], "transparency": (0, 0, 0), "dpi": (9, 9)}
    for options in ({}, more):
        Image.fromarray(SMOOTH).save(tmp_path / "a.png", **options)
        assert np.array_equal(decode(tmp_path / "a.png"), SMOOTH)


@pytest.mark.parametrize("depth", (1, 2, 4, 8))
@pytest.mark.parametrize("width", (1, 5, 16))
def test_palette_indices_of_every_depth_are_read_as_labels(tmp_path, depth, width):
    ids = np.random.default_rng(0).integers(0, 2**depth, (7, width), np.uint8)
    image = Image.fromarray(ids)
    image.putpalette(PIXELS.tobytes()[: 3 * 2**depth])
    image.save(tmp_path / "a.png", bits=depth)
    assert np.array_equal(decode(tmp_path / "a.png", "index"), ids)


FAULTS = {  # chunks after the header
    "an unknown filter": [(b"IDAT", zlib.compress(b"\x09" * 385 * 64)), END],
    "no data": [END],
    "missing rows": [(b"IDAT", zlib.compress(ROWS[: 385 * 30])), END],
    "a stream cut off": [(b"IDAT", STREAM[:9000]), END],
    "a stream without checksum": [(b"IDAT", STREAM[:-4]), END],
    "a stream with a wrong checksum": [(b"IDAT", STREAM[:-4] + b"abcd"), END],
    "no end": [(b"IDAT", STREAM)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_incomplete_and_wrong_image_data_is_refused(tmp_path, fault):
    (tmp_path / "a.png").write_bytes(png_file(header(128, 64), *FAULTS[fault]))
    with pytest.raises(ValueError):
        decode(tmp_path / "a.png")


HEADERS = {
    "this PNG file is 16-bit RGB": header(128, 64, depth=16),
    "this PNG file is 8-bit palette": header(128, 64, color=3),
    "this PNG file is 8-bit RGBA": header(128, 64, color=6),
    "the header of this PNG file is damaged": header(128, 64, methods=(0, 0, 2)),
    "this file has 9000x9000 pixels, and at most": header(9000, 9000),
}


@pytest.mark.parametrize("message", HEADERS)
def test_formats_and_sizes_are_refused_by_the_header(tmp_path, message):
    (tmp_path / "a.png").write_bytes(png_file(HEADERS[message], (b"IDAT", STREAM), END))
    with pytest.raises(ValueError, match=message):
        png.read_header(tmp_path / "a.png", "RGB")


def test_data_of_four_gibibytes_and_a_file_of_sixty_take_no_time(tmp_path):
    """The zeros are compressed in blocks of 16 MiB, as one would take long."""
    path, block, rows = tmp_path / "a.png", zlib.compressobj(wbits=-15), zlib.compressobj()
    zeros = block.compress(bytes(2**24)) + block.flush(zlib.Z_FULL_FLUSH)
    stream = rows.compress(ROWS) + rows.flush(zlib.Z_FULL_FLUSH) + zeros * 256
    path.write_bytes(png_file(header(128, 64), (b"IDAT", stream), END))
    start = time.monotonic()
    assert np.array_equal(decode(path), PIXELS)  # what follows the last row is ignored, as libpng does
    with path.open("r+b") as file:
        file.truncate(60 * 2**30)
    with pytest.raises(ValueError, match="has 64424509440 bytes, which does not fit the 128x64 pixels"):
        png.read_header(path, "RGB")
    assert time.monotonic() - start < 2


def test_no_mutated_file_ends_the_process(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.png_files", tmp_path, "5000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == 5000 and min(counts.values()) > 100
