"""Collect the scores of a model as the evaluation loop computes them, and keep them on disk image by image.

A run that is stopped loses no image that was scored more than SYNC_SECONDS before, even if the machine loses its power.
"""

import errno
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ffnet.evaluation.loop import ScoredBatch
from ffnet.evaluation.scores import Scores, Shard, concatenate, merge_shards, no_scores
from ffnet.labels import NUM_CLASSES
from ffnet.system.files import write_atomically

logger = logging.getLogger(__name__)

SYNC_SECONDS = 5.0  # after which records are written through to the disk; an image that takes longer is so at once

Writer = Callable[[int, dict[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}


class RecordFile:
    """A file to which the scores of images are appended: one line per image, a checksum and a JSON object."""

    def __init__(self, path: Path, key: int = 0) -> None:
        """Open or create a file; `key`: the checksums begin with it, so that records of other runs are found out."""
        self._file = path.open("ab", buffering=0)
        self._key = key
        self._synced = time.monotonic()

    def append(self, indices: Iterable[int], scores: Scores) -> None:
        """Append the scores of images with these indices; raise an OSError if the disk is full or fails."""
        try:
            for record in _records(indices, scores):
                line = _line(record, self._key)
                if self._file.write(line) != len(line):
                    raise OSError(errno.EIO, "a record was not written whole")
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:  # writing to an open file does not name it
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        """Write the file through to the disk and close it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # the scores themselves are not lost
            logger.warning(f"{self._file.name}: the last records may not be on the disk ({error.strerror}).")
        self._file.close()


def _records(indices: Iterable[int], scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield the record of each image; the times of a batch are divided among its images."""
    for position, index in enumerate(indices):
        yield {
            "image": int(index),
            "pixels": scores.pixels_per_image,
            "confusion": {name: m[position].ravel().tolist() for name, m in scores.confusion_matrices.items()},
            "agreeing": [[*pair, int(counts[position])] for pair, counts in scores.agreeing_pixels.items()],
            "seconds": {name: seconds / scores.images for name, seconds in scores.seconds.items()},
            "scoring_seconds": scores.scoring_seconds / scores.images,
        }


def _line(record: dict[str, Any], key: int) -> bytes:
    content = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(content, key), content)


def read_records(path: Path, key: int = 0) -> tuple[Shard | None, int]:
    """Return the scores that a RecordFile holds, and how many of its records are damaged.

    The last record is torn if the run was killed while it was written. Damaged records and those with another key are
    removed from the file, so that it can be appended to; their images have to be scored again.

    Returns:
        None instead of scores if the file holds no whole record.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [(line, record) for line in lines if (record := _parse(line, key))]
    damaged = len(lines) - len(whole)
    if damaged:
        write_atomically(path, b"".join(line for line, _ in whole))
    by_image = dict(record for _, record in whole)
    if not by_image:
        return None, damaged
    return Shard(np.array(list(by_image), np.int64), concatenate(list(by_image.values()))), damaged


def _parse(line: bytes, key: int) -> tuple[int, Scores] | None:
    """Return the index and the scores of the image in a line; None if the line is damaged or has another key."""
    checksum, _, content = line.partition(b" ")
    if not content.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content[:-1], key):
        return None
    record = json.loads(content)
    return record["image"], _scores(record)


def _scores(record: dict[str, Any]) -> Scores:
    shape = (1, NUM_CLASSES, NUM_CLASSES)
    return Scores(
        {name: np.array(counts, np.int64).reshape(shape) for name, counts in record["confusion"].items()},
        {(first, second): np.array([count], np.int64) for first, second, count in record["agreeing"]},
        record["pixels"],
        record["seconds"],
        record["scoring_seconds"],
    )


class ScoreCollector:
    """Collects the scores of one model on one rank; also records them and writes predictions, if requested.

    After an OSError of the record file or of the writer neither is used again, and `Scores.unsaved` says why; the
    evaluation goes on. A recorded image has its predictions written.
    """

    def __init__(self, backends: Iterable[str], records: RecordFile | None, writer: Writer | None = None) -> None:
        """Begin without scores; `records` and `writer` are None if nothing is recorded or written."""
        self._pieces = [Shard(np.empty(0, np.int64), no_scores(backends))]
        self._records, self._writer = records, writer
        self._unsaved: str | None = None

    def add(self, indices: np.ndarray, batch: ScoredBatch) -> None:
        """Add the scores of images with these indices in the split."""
        self._pieces.append(Shard(indices, batch.scores))
        if self._unsaved is None:
            self._unsaved = self._save(indices, batch)

    def shard(self) -> Shard:
        """Return all scores so far."""
        shard = merge_shards(self._pieces, sum)
        return replace(shard, scores=replace(shard.scores, unsaved=self._unsaved))

    def _save(self, indices: np.ndarray, batch: ScoredBatch) -> str | None:
        """Write predictions and records of a batch; return why it failed, or None."""
        try:
            if self._writer:
                for position, index in enumerate(indices.tolist()):
                    self._writer(index, {name: ids[position].cpu().numpy() for name, ids in batch.predictions.items()})
            if self._records:
                self._records.append(indices, batch.scores)
        except OSError as error:
            return f"{error.filename or 'a file'}: {error.strerror or error}"
        return None
