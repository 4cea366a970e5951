"""The records of the images that were scored: one line of JSON with a checksum per image.

What is read may have been torn by a kill, damaged since, or edited: a record that no run can have written is dropped,
and its image is scored again.
"""

import errno
import itertools
import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffnet.evaluation.scores import Scores, Shard, concatenate, merge_shards
from ffnet.system.files import check_plain_file, write_atomically
from ffnet.system.schema import parse


@dataclass(frozen=True)
class RecordedImages:
    """What is known of the images that records are about."""

    backends: tuple[str, ...]  # names of the backends that score them, in evaluation order
    pixels: Sequence[int]  # pixels of each image's label, scored or not
    classes: int


class RecordFile:
    """A file to which the scores of images are appended, one line per image."""

    def __init__(self, path: Path) -> None:
        """Open or create a file."""
        check_plain_file(path)
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
            "pixels": int(scores.pixels[position]),
            "confusion": {name: m[position].ravel().tolist() for name, m in scores.confusion_matrices.items()},
            "agreeing": [[*pair, int(counts[position])] for pair, counts in scores.agreeing_pixels.items()],
            "seconds": {name: seconds / scores.images for name, seconds in scores.seconds.items()},
            "scoring_seconds": scores.scoring_seconds / scores.images,
            "processor_seconds": scores.processor_seconds / scores.images,
        }


@dataclass(frozen=True)
class _Record:
    """The JSON object of a record."""

    image: int
    pixels: int
    confusion: dict[str, list[int]]
    agreeing: list[tuple[str, str, int]]
    seconds: dict[str, float]
    scoring_seconds: float
    processor_seconds: float

    def scores(self, classes: int) -> Scores:
        shape = (1, classes, classes)
        return Scores(
            {name: np.array(counts, np.int64).reshape(shape) for name, counts in self.confusion.items()},
            {(first, second): np.array([count], np.int64) for first, second, count in self.agreeing},
            np.array([self.pixels], np.int64),
            self.seconds,
            self.scoring_seconds,
            self.processor_seconds,
        )


def read_records(
    paths: Sequence[Path], images: RecordedImages, repair: bool = True
) -> tuple[Shard | None, dict[Path, int]]:
    """Return the scores in files, None if there are none, and the number of dropped records of each file.

    Dropped are the records that are torn or damaged or that no run can have written, and those that contradict each
    other about the labels of an image. If `repair`, they are removed from the files, so that these can be appended to.
    """
    parsed = {}
    for path in paths:
        check_plain_file(path)
        parsed[path] = [(line, _parse(line, images)) for line in path.read_bytes().splitlines(keepends=True)]
    labels: dict[int, set[bytes]] = defaultdict(set)
    for index, scores in (record for lines in parsed.values() for _, record in lines if record):
        labels[index].add(_label_counts(scores)[0].tobytes())
    pieces, dropped = [], {}
    for path, lines in parsed.items():
        kept = [(line, record) for line, record in lines if record and len(labels[record[0]]) == 1]
        if len(kept) < len(lines):
            dropped[path] = len(lines) - len(kept)
            if repair:
                write_atomically(path, b"".join(line for line, _ in kept))
        if by_image := dict(record for _, record in kept):
            pieces.append(Shard(np.array(list(by_image), np.int64), concatenate(list(by_image.values()))))
    return merge_shards(pieces) if pieces else None, dropped


def _parse(line: bytes, images: RecordedImages) -> tuple[int, Scores] | None:
    """Return the index and the scores of the image in a line; None if no run can have written the line."""
    checksum, _, content = line.partition(b" ")
    if not content.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content[:-1]):
        return None
    try:
        record = parse(_Record, json.loads(content))
        scores = record.scores(images.classes)
    except (ValueError, RecursionError):
        return None
    in_split = 0 <= record.image < len(images.pixels)
    is_plausible = in_split and _is_plausible(scores, images.backends, images.pixels[record.image])
    return (record.image, scores) if is_plausible else None


def _is_plausible(scores: Scores, backends: tuple[str, ...], pixels: int) -> bool:
    """Return whether a run of these backends can have counted these scores of one image."""
    labels = _label_counts(scores)
    counts = [*scores.confusion_matrices.values(), *scores.agreeing_pixels.values()]
    return (
        tuple(scores.confusion_matrices) == tuple(scores.seconds) == backends
        and tuple(scores.agreeing_pixels) == tuple(itertools.combinations(backends, 2))
        and scores.pixels[0] == pixels
        and all(((each >= 0) & (each <= pixels)).all() for each in counts)
        and all(np.array_equal(each, labels[0]) and each.sum() <= pixels for each in labels)
        and all(
            0 <= each < math.inf
            for each in (*scores.seconds.values(), scores.scoring_seconds, scores.processor_seconds)
        )
    )


def _label_counts(scores: Scores) -> list[np.ndarray]:
    """Return how many pixels of one image have each label, as every backend counted them."""
    return [matrices[0].sum(1) for matrices in scores.confusion_matrices.values()]
