"""Records of scores on disk: what is read is what was appended, and damage costs no more than the damaged records."""

import os
import time

import numpy as np
import pytest
import torch

from ffnet.evaluation.loop import ScoredBatch
from ffnet.evaluation.scores import Scores
from ffnet.run import records as recording
from ffnet.run.storage import RecordFile, ScoreCollector, read_records

PAIR = ("FP32", "INT8 simulated")


def random_scores(images, seed=0):
    rng = np.random.default_rng(seed)
    matrices = {name: rng.integers(0, 2**40, (images, 19, 19)) for name in PAIR}
    return Scores(matrices, {PAIR: rng.integers(0, 99, images)}, 99, dict.fromkeys(PAIR, images * 0.25), images * 0.5)


def batch_of(scores, positions=None):
    predictions = {name: torch.full((scores.images, 2, 3), i, dtype=torch.uint8) for i, name in enumerate(PAIR)}
    return ScoredBatch(0, np.arange(scores.images) if positions is None else positions, scores, predictions)


def assert_equal(found, expected):
    assert list(found.confusion_matrices) == list(expected.confusion_matrices)
    for name, matrices in expected.confusion_matrices.items():
        assert found.confusion_matrices[name].dtype == np.int64
        assert np.array_equal(found.confusion_matrices[name], matrices)
    assert np.array_equal(found.agreeing_pixels[PAIR], expected.agreeing_pixels[PAIR])
    assert found.pixels_per_image == expected.pixels_per_image and found.seconds == expected.seconds
    assert found.scoring_seconds == expected.scoring_seconds


@pytest.fixture
def file_of_five(tmp_path):
    """A file of the records of five images, in two appends."""
    path, scores = tmp_path / "images-0.jsonl", random_scores(5)
    records = RecordFile(path)
    for chosen in (slice(0, 2), slice(2, 5)):
        part = Scores(
            {name: matrices[chosen] for name, matrices in scores.confusion_matrices.items()},
            {PAIR: scores.agreeing_pixels[PAIR][chosen]},
            99,
            dict.fromkeys(PAIR, 0.25 * (chosen.stop - chosen.start)),
            0.5 * (chosen.stop - chosen.start),
        )
        records.append(np.array([7, 3, 4, 11, 0])[chosen], part)
    records.close()
    return path, scores


def test_what_is_read_is_what_was_appended(file_of_five):
    path, scores = file_of_five
    shard, damaged = read_records(path)
    assert damaged == 0 and shard.indices.tolist() == [7, 3, 4, 11, 0]
    assert_equal(shard.scores, scores)


def test_a_record_that_is_torn_anywhere_is_dropped_and_the_file_can_be_appended_to(file_of_five):
    path, _ = file_of_five
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in (1, 2, last // 2, last - 9, last - 1):
        path.write_bytes(whole[:-cut])
        shard, damaged = read_records(path)
        assert damaged == 1 and shard.indices.tolist() == [7, 3, 4, 11]
        records = RecordFile(path)
        records.append([5], random_scores(1))
        records.close()
        shard, damaged = read_records(path)
        assert damaged == 0 and shard.indices.tolist() == [7, 3, 4, 11, 5]


@pytest.mark.parametrize("damage", (lambda line: b"\0" * len(line), lambda line: line.replace(b"image", b"imagf"),
                                    lambda line: line[:30] + b"\n", lambda line: b"\n"))  # fmt: skip
def test_a_damaged_record_in_the_middle_costs_its_image_only(file_of_five, damage):
    path, _ = file_of_five
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = damage(lines[1])
    path.write_bytes(b"".join(lines))
    shard, damaged = read_records(path)
    assert damaged >= 1 and set(shard.indices.tolist()) >= {7, 11, 0} and 3 not in shard.indices
    assert read_records(path)[1] == 0


def test_a_file_without_a_whole_record_holds_no_scores(tmp_path):
    path = tmp_path / "images-0.jsonl"
    for content, damaged in ((b"", 0), (b"1234", 1)):
        path.write_bytes(content)
        assert read_records(path) == (None, damaged)


def test_an_image_that_was_recorded_twice_counts_once(tmp_path):
    records = RecordFile(tmp_path / "x")
    for _ in range(2):
        records.append([4], random_scores(1))
    records.close()
    shard, _ = read_records(tmp_path / "x")
    assert shard.indices.tolist() == [4] and shard.scores.images == 1


def test_records_are_written_through_to_the_disk_at_intervals_and_in_the_end(tmp_path, monkeypatch):
    synced, now = [], [100.0]
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(now[0]))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    records = RecordFile(tmp_path / "x")
    for seconds in (1, 1, 4, 1, 30):
        now[0] += seconds
        records.append([0], random_scores(1))
    records.close()
    assert synced == [106.0, 137.0, 137.0] and recording.SYNC_SECONDS <= 30


def test_a_collector_returns_all_scores_and_passes_predictions_on(tmp_path):
    written, scores = {}, random_scores(3)
    records = RecordFile(tmp_path / "x")
    collector = ScoreCollector(PAIR, records, lambda index, ids: written.update({index: ids}))
    assert collector.shard().scores.images == 0
    collector.add(np.array([8, 2, 5]), batch_of(scores))
    records.close()
    shard = collector.shard()
    assert shard.indices.tolist() == [2, 5, 8] and shard.scores.unsaved is None
    assert np.array_equal(shard.scores.confusion_matrices["FP32"], scores.confusion_matrices["FP32"][[1, 2, 0]])
    assert list(written) == [8, 2, 5] and written[2]["INT8 simulated"].tolist() == [[1] * 3] * 2
    assert read_records(tmp_path / "x")[0].indices.tolist() == [8, 2, 5]


@pytest.mark.parametrize("failing", ("writer", "records"))
def test_a_full_disk_costs_no_scores_and_no_image_is_recorded_without_its_predictions(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device", "a.png")

    records = RecordFile(tmp_path / "x")
    if failing == "records":
        monkeypatch.setattr(records, "append", fail)
    written = []
    collector = ScoreCollector(PAIR, records, fail if failing == "writer" else lambda index, _: written.append(index))
    for index in range(3):
        collector.add(np.array([index]), batch_of(random_scores(1)))
    records.close()
    shard = collector.shard()
    assert shard.indices.tolist() == [0, 1, 2] and shard.scores.unsaved == "a.png: No space left on device"
    assert read_records(tmp_path / "x")[0] is None and written == ([] if failing == "writer" else [0])
