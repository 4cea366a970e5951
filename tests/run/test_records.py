"""Records of scores on disk: what is read is what was appended, and damage costs no more than the damaged records."""

import numpy as np
import pytest

from ffnet.evaluation.scores import FP32, SIMULATED, Scores
from ffnet.run.records import RecordedImages, RecordFile, read_records

PAIR = (FP32, SIMULATED)


PIXELS = 64 * 128
RECORDED = RecordedImages(PAIR, (PIXELS,) * 12, 19)


def random_scores(images, seed=0):
    """Return scores of images with the same labels for every seed: 20 pixels of each class."""
    rng = np.random.default_rng(seed)
    matrices = {name: rng.multinomial(20, np.full(19, 1 / 19), (images, 19)) for name in PAIR}
    agreeing = {PAIR: rng.integers(0, PIXELS, images)}
    return Scores(matrices, agreeing, np.full(images, PIXELS), dict.fromkeys(PAIR, images * 0.25), images * 0.5)


def read(path):
    """Return the scores in a file, and the number of records that were dropped."""
    shard, dropped = read_records([path], RECORDED)
    return shard, dropped.get(path, 0)


def append(path, indices, scores):
    records = RecordFile(path)
    records.append(indices, scores)
    records.close()


@pytest.fixture
def file_of_five(tmp_path):
    """Return a file with the records of five images."""
    append(tmp_path / "images-0.jsonl", np.array([7, 3, 4, 11, 0]), random_scores(5))
    return tmp_path / "images-0.jsonl"


def test_what_is_read_is_what_was_appended(file_of_five):
    append(file_of_five, [4, 5], random_scores(2, seed=1))  # an image that is recorded twice counts once
    shard, damaged = read(file_of_five)
    assert damaged == 0 and shard.indices.tolist() == [0, 3, 4, 5, 7, 11]
    expected, later = random_scores(5), random_scores(2, seed=1)
    appended, positions = [4, 1, 0, 3], [0, 1, 4, 5]
    assert list(shard.scores.confusion_matrices) == list(PAIR)
    for name, matrices in shard.scores.confusion_matrices.items():
        assert matrices.dtype == np.int64
        assert np.array_equal(matrices[positions], expected.confusion_matrices[name][appended])
        assert np.array_equal(matrices[[2, 3]], later.confusion_matrices[name])
    assert shard.scores.agreeing_pixels[PAIR][positions].tolist() == expected.agreeing_pixels[PAIR][appended].tolist()
    assert set(shard.scores.pixels) == {PIXELS} and shard.scores.seconds == dict.fromkeys(PAIR, 6 * 0.25)
    assert shard.scores.scoring_seconds == 6 * 0.5


def test_a_record_that_is_torn_anywhere_is_dropped_and_the_file_can_be_appended_to(file_of_five):
    whole = file_of_five.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in (1, 2, last // 2, last - 9, last - 1):
        file_of_five.write_bytes(whole[:-cut])
        shard, damaged = read(file_of_five)
        assert damaged == 1 and shard.indices.tolist() == [3, 4, 7, 11]
        append(file_of_five, [5], random_scores(1))
        shard, damaged = read(file_of_five)
        assert damaged == 0 and shard.indices.tolist() == [3, 4, 5, 7, 11]


@pytest.mark.parametrize("damage", (lambda line: b"\0" * len(line), lambda line: line.replace(b"image", b"imagf"),
                                    lambda line: line[:30] + b"\n", lambda line: b"\n"))  # fmt: skip
def test_a_damaged_record_in_the_middle_costs_its_image_only(file_of_five, damage):
    lines = file_of_five.read_bytes().splitlines(keepends=True)
    lines[1] = damage(lines[1])
    file_of_five.write_bytes(b"".join(lines))
    shard, damaged = read(file_of_five)
    assert damaged >= 1 and set(shard.indices.tolist()) >= {7, 11, 0} and 3 not in shard.indices
    assert read(file_of_five)[1] == 0


def test_a_file_without_a_whole_record_holds_no_scores(tmp_path):
    for content, damaged in ((b"", 0), (b"1234", 1)):
        (tmp_path / "x").write_bytes(content)
        assert read(tmp_path / "x") == (None, damaged)
