"""What a run saves image by image: predictions, and in the folder `progress` the work that `--resume` continues.

    settings.json        what the saved work depends on, see `conditions`
    network.safetensors  ranges, bit widths and rounded weights of the simulation, once they are found
    images-0.jsonl       scores of the images that rank 0 has run through the backends; see `RecordFile`
    npu-0.jsonl          the same for the NPU
    finished             names of the result files, once all are written

Every rank appends to record files of its own; the main process writes everything else.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError

from ffnet import __version__
from ffnet.config import PROGRESS_FOLDER, RESULT_FILE, RESULT_FILES, Config
from ffnet.evaluation.scores import INT8_SIMULATED, ONNX_FILE, Scores, Shard, concatenate, merge_shards, short_name
from ffnet.labels import LABEL_IDS, NUM_CLASSES
from ffnet.options import FLAGS, lookup, plain_value
from ffnet.quantization.quantize import FoundEncodings
from ffnet.quantization.recovery.search import recovery_from_json
from ffnet.quantization.sites import load_state, save_state
from ffnet.results.result import processor_name, versions
from ffnet.system.errors import UserError
from ffnet.system.files import check_plain_file, read_utf8, remove_unfinished, sha256_of, write_atomically
from ffnet.system.text import count

logger = logging.getLogger(__name__)

Writer = Callable[[int, Mapping[str, np.ndarray]], None]  # index of an image, {backend: train ids (H, W) uint8}

SETTINGS, NETWORK, FINISHED, LOCK = "settings.json", "network.safetensors", "finished", "lock"
IMAGES, NPU = "images", "npu"  # kinds of record files
BYTES_PER_PIXEL = 1 / 8  # upper bound of a PNG file of predictions

# Options that change nothing in the saved work, or whose files are compared by their content.
MAY_DIFFER = (
    "model.names", "model.checkpoint", "model.onnx", "model.cache_dir", "list_models", "data.dataset_path",
    "quantization.encodings", "runtime.num_workers", "runtime.quiet", "output.output_dir", "output.resume",
    "output.force", "output.fail_under",
)  # fmt: skip


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
    check_plain_file(path)
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


def conditions(config: Config, weights: str, images: str, device: str) -> dict[str, Any]:
    """Return what the saved work depends on: resuming requires identical conditions.

    Args:
        config: Configuration of one model.
        weights: sha256 of the checkpoint or of the ONNX file.
        images: Digest of the images, see `inputs.images_digest`.
        device: Device on which the networks run.
    """
    values = {flag: plain_value(lookup(config, target)) for target, flag in FLAGS.items() if target not in MAY_DIFFER}
    files = {"--encodings": config.quantization.encodings, "--config-file": Path(config.quantization.config_file)}
    packages = versions()
    if config.npu.chip:
        packages["onnxruntime-qnn"] = importlib.metadata.version("onnxruntime-qnn")
    return {
        **values,
        **{f"sha256 of {flag}": sha256_of(path) for flag, path in files.items() if path and path.is_file()},
        "sha256 of the weights": weights,
        "sha256 of the images and labels": images,
        "device": processor_name(device),
        "version of this program": __version__,
        **{f"version of {name}": version for name, version in packages.items()},
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the conditions that differ, with both values unless they are hashes."""
    phrases = []
    for name in {**saved, **now}:
        before, after = saved.get(name), now.get(name)
        if before != after:
            phrases.append(f"the {name}" if name.startswith("sha256") else f"{name} was {before} and is {after}")
    return phrases


class Storage:
    """The folder with the saved work of one model; used by the main process, apart from `open_records`."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / PROGRESS_FOLDER
        self._lock = FileLock(self.folder / LOCK)

    def begin(self, conditions: Mapping[str, Any], resume: bool) -> dict[str, Shard]:
        """Lock the folder, and empty it unless `resume`; return the saved scores by their kind.

        Raises:
            UserError: If another run uses the folder, or if the earlier run was made under other conditions.
        """
        with self.errors_named():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(
                    f"--output-dir {self.output_dir}: another run writes there. Wait until it ends, or name another "
                    "folder."
                ) from error
            remove_unfinished(self.folder, (SETTINGS, NETWORK))
            remove_unfinished(self.output_dir, RESULT_FILES)
            if resume and (self.folder / SETTINGS).exists():
                self._compare(conditions)
                found = {kind: self._read(kind) for kind in (IMAGES, NPU)}
                return {kind: shard for kind, shard in found.items() if shard}
            for name in (SETTINGS, NETWORK, FINISHED):
                (self.folder / name).unlink(missing_ok=True)
            self.drop_records()
            write_atomically(self.folder / SETTINGS, json.dumps(conditions, indent=1) + "\n")
            return {}

    def close(self) -> None:
        """Let other runs use the folder."""
        self._lock.release()

    def drop_records(self) -> None:
        """Remove the scores of all images, so that they are computed again."""
        for path in (*self._record_files(IMAGES), *self._record_files(NPU)):
            path.unlink()

    @contextlib.contextmanager
    def open_records(self, kind: str, rank: int) -> Iterator[RecordFile]:
        """Open the file of a rank for the scores of one kind."""
        with self.errors_named():
            self.folder.mkdir(parents=True, exist_ok=True)  # on another node than that of the main process
            file = RecordFile(self.folder / f"{kind}-{rank}.jsonl")
        with contextlib.closing(file):
            yield file

    @property
    def has_network(self) -> bool:
        """Whether a quantized network is saved."""
        return (self.folder / NETWORK).exists()

    def save_network(self, found: FoundEncodings) -> None:
        """Save encodings and, after accuracy recovery, weights; otherwise these follow from the checkpoint."""
        description = {
            "calibration_images": found.calibration_images,
            "batch_size": found.batch_size,
            "recovery": found.recovery and dataclasses.asdict(found.recovery),
        }
        with self.errors_named():
            write_atomically(self.folder / NETWORK, save_state(found.state, description, found.recovery is not None))

    def load_network(self) -> FoundEncodings:
        """Return what `save_network` saved."""
        path = self.folder / NETWORK
        try:
            check_plain_file(path)
            state, description = load_state(path)
            recovery = recovery_from_json(description["recovery"])
            return FoundEncodings(state, description["calibration_images"], description["batch_size"], recovery)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}: this file is damaged ({error}). Delete it and start again with --resume."
            ) from error

    @property
    def is_finished(self) -> bool:
        """Whether all results were written, and are still there."""
        path = self.folder / FINISHED
        names = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
        return RESULT_FILE in names and all((self.output_dir / name).is_file() for name in names)

    def mark_finished(self) -> None:
        """Mark all results as written, after which the network is no longer needed.

        Do nothing if the results could not be written: result.json is written last.
        """
        if not (self.output_dir / RESULT_FILE).exists():
            return
        names = [name for name in RESULT_FILES if (self.output_dir / name).exists()]
        with self.errors_named():
            write_atomically(self.folder / FINISHED, "".join(f"{name}\n" for name in names))
            (self.folder / NETWORK).unlink(missing_ok=True)

    def _compare(self, conditions: Mapping[str, Any]) -> None:
        """Raise a UserError unless the earlier run was made under the same conditions."""
        path = self.folder / SETTINGS
        try:
            saved = dict(json.loads(read_utf8(path)).items())
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: this file is damaged ({error}). Start again with --force instead of --resume."
            ) from error
        if phrases := differences(saved, json.loads(json.dumps(conditions))):
            raise UserError(
                f"--resume: the run in {self.output_dir} was made under other conditions: {'; '.join(phrases)}. "
                "Restore them, or start again with --force instead of --resume."
            )

    def _record_files(self, kind: str) -> list[Path]:
        """Return the files of all ranks with the scores of one kind."""
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(rf"{kind}-\d+\.jsonl", path.name))

    def _read(self, kind: str) -> Shard | None:
        """Return the saved scores of all ranks, None if there are none; report damaged records."""
        shards = []
        for path in self._record_files(kind):
            shard, damaged = read_records(path)
            if shard:
                shards.append(shard)
            if damaged:
                logger.warning(
                    f"{path}: dropped {count(damaged, 'record')}, torn when the earlier run stopped or damaged since; "
                    f"{'its image is' if damaged == 1 else 'their images are'} evaluated again."
                )
        return merge_shards(shards) if shards else None

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn an OSError into a UserError that names the option, the file and what to do."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--output-dir {self.output_dir}: the run's work can't be saved in {error.filename or self.folder} "
                f"({error.strerror or error}). Free some space there, or name another folder."
            ) from error


def saved_backends(config: Config) -> tuple[str, ...]:
    """Return the backends whose predictions --save-predictions writes."""
    return (ONNX_FILE,) if config.model.onnx else (INT8_SIMULATED,)


def predictions_megabytes(images: int, size: tuple[int, int], backends: Collection[str]) -> float:
    """Return an upper bound of the disk space that the predictions of images of `size` (H, W) take, in MB."""
    return len(backends) * images * size[0] * size[1] * BYTES_PER_PIXEL / 1e6


def prediction_writer(folder: Path, names: Sequence[str], backends: Collection[str]) -> Writer:
    """Return a function that writes the predictions of one image, given its index in `names` and its train ids.

    The official script takes the folder of a backend as CITYSCAPES_RESULTS. The files are
    `<folder>/<backend>/<city>_<sequence>_<frame>_pred_labelIds.png`.
    """
    for backend in backends:
        (folder / short_name(backend)).mkdir(parents=True, exist_ok=True)

    def write(index: int, predictions: Mapping[str, np.ndarray]) -> None:
        for backend, path in _prediction_files(folder, names[index], backends).items():
            file = io.BytesIO()
            Image.fromarray(LABEL_IDS[predictions[backend]]).save(file, "PNG")
            write_atomically(path, file.getvalue())

    return write


def missing_predictions(
    folder: Path, names: Sequence[str], backends: Collection[str], indices: Iterable[int]
) -> list[int]:
    """Return the `indices` of the images whose predictions are not all in the folder."""
    return [
        index
        for index in indices
        if not all(path.is_file() for path in _prediction_files(folder, names[index], backends).values())
    ]


def _prediction_files(folder: Path, name: str, backends: Collection[str]) -> dict[str, Path]:
    """Return the file of each backend with the predictions of an image."""
    return {backend: folder / short_name(backend) / f"{name}_pred_labelIds.png" for backend in backends}
