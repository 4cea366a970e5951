"""JPEG files are decoded as Pillow does; those that end early, or are of another kind, are refused."""

import random

import numpy as np
import pytest
from PIL import Image

from datasets import jpeg
from tests.helpers.mutations import changed, random_changes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


@pytest.fixture
def path(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=90)
    return tmp_path / "a.jpg"


@pytest.mark.parametrize("options", ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}))
def test_every_form_is_decoded(path, options):
    Image.fromarray(PIXELS).save(path, **options)
    assert jpeg.read_size(path) == (48, 64)
    assert np.array_equal(jpeg.decode(path.read_bytes()), np.asarray(Image.open(path)))


@pytest.mark.parametrize("progressive", (False, True))
def test_a_file_that_ends_early_is_refused_at_every_length(path, progressive):
    Image.fromarray(PIXELS).save(path, progressive=progressive)
    data = path.read_bytes()
    for length in range(len(data)):
        for end in (b"", bytes(len(data) - length)):  # an interrupted copy may end in zeros
            with pytest.raises(ValueError, match="JPEG file"):
                jpeg.decode(data[:length] + end)


def test_other_kinds_and_too_large_files_are_refused_by_the_header(path):
    data = path.read_bytes()
    large = data.replace((48).to_bytes(2) + (64).to_bytes(2), (65500).to_bytes(2) * 2)
    refused = {"65500x65500 pixels, and at most": large, "not a JPEG file": b"\x89PNG", "header is damaged": data[:30]}
    for message, content in refused.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            jpeg.read_size(path)
    for mode, message in (("L", "JPEG file is gray"), ("CMYK", "JPEG file is CMYK")):
        Image.fromarray(PIXELS).convert(mode).save(path)
        with pytest.raises(ValueError, match=message):
            jpeg.read_size(path)
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match="has 17179869184 bytes, which does not fit the 64x48 pixels"):
        jpeg.read_size(path)


def test_mutated_files_are_decoded_or_refused(path):
    data, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(3000):
        path.write_bytes(changed(data, random_changes(generator)))
        try:
            jpeg.read_size(path)
            assert jpeg.decode(path.read_bytes()).dtype == np.uint8
        except ValueError:
            refused += 1
    assert 100 < refused < 2900
