"""Scores of single images on disk: JSON lines, each after its checksum."""

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ffnet.evaluation.scores import Scores, Shard, concatenate
from ffnet.labels import NUM_CLASSES
from ffnet.system.files import write_atomically


class RecordFile:
    """A file to which the scores of images are appended, one line per image."""

    def __init__(self, path: Path) -> None:
        """Open or create a file."""
        self._file = path.open("ab", buffering=0)

    def append(self, indices: Iterable[int], scores: Scores) -> None:
        """Append the scores of the images with these indices; raise an OSError if the disk is full or fails."""
        try:
            for record in _records(indices, scores):
                content = json.dumps(record, separators=(",", ":")).encode()
                line = b"%08x %s\n" % (zlib.crc32(content), content)
                if self._file.write(line) != len(line):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:  # writing to an open file does not name it
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        """Close the file."""
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


def read_records(path: Path) -> tuple[Shard | None, int]:
    """Return the scores in a file, None if there are none, and the number of damaged records.

    The last record is torn if the run was killed while it was written. Damaged records are removed from the file, so
    that it can be appended to; their images have to be scored again.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    parsed = [(line, record) for line in lines if (record := _parse(line))]
    damaged = len(lines) - len(parsed)
    if damaged:
        write_atomically(path, b"".join(line for line, _ in parsed))
    by_image = dict(record for _, record in parsed)
    if not by_image:
        return None, damaged
    return Shard(np.array(list(by_image), np.int64), concatenate(list(by_image.values()))), damaged


def _parse(line: bytes) -> tuple[int, Scores] | None:
    """Return the index and the scores of the image in a line; None if the line is damaged."""
    checksum, _, content = line.partition(b" ")
    if not content.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content[:-1]):
        return None
    record = json.loads(content)
    shape = (1, NUM_CLASSES, NUM_CLASSES)
    scores = Scores(
        {name: np.array(counts, np.int64).reshape(shape) for name, counts in record["confusion"].items()},
        {(first, second): np.array([count], np.int64) for first, second, count in record["agreeing"]},
        record["pixels"],
        record["seconds"],
        record["scoring_seconds"],
    )
    return record["image"], scores
