"""What a model's run keeps of its work, so that `--resume` can go on: the folder `progress` in its output folder.

    settings.json        what the kept work depends on, see `conditions`
    network.safetensors  ranges, bit widths and rounded weights of the simulation, once they are found
    images-0.jsonl       the scores of the images that rank 0 has run through the backends; see `evaluation.recording`
    npu-0.jsonl          the same for the NPU
    finished             the names of the files of the results, once all are written

All ranks append to files of their own; everything else is written by the main process.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aimet_torch.quantsim import QuantizationSimModel
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Config
from ffnet.evaluation.scores import Scores, Shard, merge_shards, without
from ffnet.file_names import PROGRESS_FOLDER, RESULT_FILE, RESULT_FILES
from ffnet.options import FLAGS, lookup, plain_value
from ffnet.quantization.state import load_state, read_state, save_state, write_state
from ffnet.results.recovery import Recovery, recovery_from_json
from ffnet.results.result import Calibration, processor_name, versions
from ffnet.run.records import RecordFile, read_records
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8, remove_unfinished, sha256_of, write_atomically
from ffnet.system.text import count

logger = logging.getLogger(__name__)

SETTINGS, NETWORK, FINISHED, LOCK = "settings.json", "network.safetensors", "finished", "lock"
IMAGES, NPU = "images", "npu"  # kinds of record files

# Options that change nothing of what is kept, or whose files are compared by their content.
MAY_DIFFER = (
    "model.names", "model.checkpoint", "model.onnx", "model.cache_dir", "list_models", "data.dataset_path",
    "quantization.encodings", "runtime.models_at_once", "runtime.num_workers", "runtime.quiet", "output.output_dir",
    "output.resume", "output.force", "output.fail_under",
)  # fmt: skip


def conditions(config: Config, weights: str, images: str, device: torch.device) -> dict[str, Any]:
    """Return what the kept work depends on: a run may only go on with the work of one that has the same.

    Args:
        config: of one model.
        weights: sha256 of the checkpoint or the ONNX file.
        images: see `images_digest`.
        device: on which the networks run.
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
        "sha256 of this program's code": code_digest(),
        "device": processor_name(device),
        **{f"version of {name}": version for name, version in packages.items()},
    }


def images_digest(images: CityscapesSplit, threads: int) -> str:
    """Return a sha256 of the names and contents of all images and labels."""
    paths = [*images.images, *images.targets]
    with ThreadPoolExecutor(max(1, threads)) as executor:
        digests = executor.map(sha256_of, map(Path, paths))
        lines = [f"{digest} {Path(path).name}\n" for digest, path in zip(digests, paths, strict=True)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def code_digest() -> str:
    """Return a sha256 of the Python files that compute results."""
    root = Path(__file__).parents[2]
    files = sorted(path for package in ("ffnet", "datasets") for path in (root / package).rglob("*.py"))
    lines = [f"{sha256_of(path)} {path.relative_to(root).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the conditions that differ, with both values where these are short."""
    phrases = []
    for name in {**kept, **now}:
        before, after = kept.get(name), now.get(name)
        if before != after:
            phrases.append(f"the {name}" if name.startswith("sha256") else f"{name} was {before} and is {after}")
    return phrases


@dataclass
class Kept:
    """What an earlier run has kept; the same on every rank."""

    compilation: tuple[tuple[str, ...], str] | None = None  # which backends are compiled, and why; None if undecided
    network: bool = False  # whether the simulation is there
    finished: bool = False
    key: int = 0  # of the records
    done: dict[str, np.ndarray] = field(default_factory=dict)  # kind -> indices of the images that are there


class Progress:
    """The kept work of one model, as one rank sees it. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.folder = folder
        self.kept = Kept()
        self._rank = rank
        self._earlier: dict[str, Shard] = {}  # by kind; in the main process only
        self._conditions: Mapping[str, Any] = {}
        self._lock: FileLock | None = None

    def begin(self, now: Mapping[str, Any], resume: bool) -> None:
        """Begin anew or, if `resume`, find what an earlier run has kept; to be called in the main process.

        Raises:
            UserError: if another run uses the folder, or if the earlier run was made under other conditions.
        """
        if self.folder is None:
            return
        with errors_naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked(self.folder)
            remove_unfinished(self.folder, (SETTINGS, NETWORK))
            remove_unfinished(self.folder.parent, RESULT_FILES)
            self._conditions = now
            if resume and (self.folder / SETTINGS).exists():
                self._find_kept(self.folder)
                return
            for path in [self.folder / name for name in (SETTINGS, NETWORK, FINISHED)]:
                path.unlink(missing_ok=True)
            self.drop_records()
            self._write_settings()

    def drop_records(self) -> None:
        """Remove the scores of all images, so that they are computed again; in the main process."""
        self._earlier, self.kept.done = {}, {}
        for path in record_files(self.folder, IMAGES) + record_files(self.folder, NPU) if self.folder else []:
            path.unlink()

    def drop_images(self, images: np.ndarray) -> None:
        """Have some images computed again whose scores are there; in the main process."""
        if IMAGES in self._earlier:
            self._earlier[IMAGES] = without(self._earlier[IMAGES], images)
            self.kept.done[IMAGES] = self._earlier[IMAGES].indices

    def is_finished(self, images: int) -> bool:
        """Return whether an earlier run has written its results and kept the scores of all images, so many of them."""
        return self.kept.finished and not len(self.remaining(IMAGES, np.arange(images)))

    def remaining(self, kind: str, images: np.ndarray) -> np.ndarray:
        """Return those of the images, by their indices, whose scores of this kind are not there yet."""
        return np.setdiff1d(images, self.kept.done.get(kind, np.empty(0, np.int64)))

    def earlier_scores(self, kind: str) -> Scores | None:
        """Return the scores that an earlier run has kept; None if there are none or this is not the main process."""
        return self._earlier[kind].scores if kind in self._earlier else None

    def with_earlier(self, kind: str, shard: Shard) -> Shard:
        """Return the scores of this run together with those that an earlier run has kept; in the main process."""
        return merge_shards([self._earlier[kind], shard], sum) if kind in self._earlier else shard

    @contextlib.contextmanager
    def records(self, kind: str) -> Iterator[RecordFile | None]:
        """Open this rank's file for the scores of one kind, and close it in the end; None without a folder."""
        if self.folder is None:
            yield None
            return
        with errors_naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)  # on another node than that of the main process
            file = RecordFile(self.folder / f"{kind}-{self._rank}.jsonl", self.kept.key)
        try:
            yield file
        finally:
            file.close()

    def keep_compilation(self, compiled: tuple[str, ...], reason: str) -> None:
        """Keep which backends are compiled, and why; in the main process."""
        self.kept.compilation = compiled, reason
        self._write_settings()

    def keep_network(
        self, sim: QuantizationSimModel, calibration: Calibration, recovery: Recovery | None, rounded: bool
    ) -> None:
        """Keep a simulation whose ranges are found, and how they were; in the main process.

        Its weights are kept only if they are `rounded`; otherwise they follow from the checkpoint.
        """
        if self.folder is None:
            return
        calibrated, recovered = dataclasses.asdict(calibration), recovery and dataclasses.asdict(recovery)
        description = {"calibration": calibrated, "recovery": recovered}
        with errors_naming(self.folder):
            write_atomically(self.folder / NETWORK, save_state(read_state(sim), description, rounded), durable=True)

    def restore_network(self, sim: QuantizationSimModel) -> tuple[Calibration, Recovery | None]:
        """Give a simulation the ranges, bit widths and rounded weights that were kept; in the main process."""
        if self.folder is None:
            raise ValueError("nothing is kept without a folder")
        path = self.folder / NETWORK
        try:
            state, description = load_state(path)
            found = Calibration(**description["calibration"]), recovery_from_json(description["recovery"])
            write_state(sim, state)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: this file is damaged ({error}). Delete it and start again with --resume."
            ) from error
        return found

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock:
            self._lock.release()

    def _locked(self, folder: Path) -> FileLock:
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"--output-dir {folder.parent}: another run writes there. Wait for its end, or name another folder."
            ) from error
        return lock

    def _find_kept(self, folder: Path) -> None:
        path = folder / SETTINGS
        try:
            settings = json.loads(read_utf8(path))
            self._compare(dict(settings["conditions"].items()))  # first: another version may keep other things
            compilation = settings["compilation"]
            compilation = None if compilation is None else compilation_of(*compilation)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: this file is damaged ({error}). Start again with --force instead of --resume."
            ) from error
        key = records_key(self._conditions)
        self._earlier = {kind: shard for kind in (IMAGES, NPU) if (shard := read_kind(folder, kind, key))}
        done = {kind: shard.indices for kind, shard in self._earlier.items()}
        self.kept = Kept(compilation, (folder / NETWORK).exists(), has_results(folder), key, done)

    def _compare(self, kept: Mapping[str, Any]) -> None:
        """Raise a UserError unless the earlier run was made under the same conditions."""
        if phrases := differences(kept, self._conditions):
            raise UserError(
                f"--resume: the run in {self.folder and self.folder.parent} was made under other conditions: "
                f"{'; '.join(phrases)}. Restore them, or start again with --force instead of --resume."
            )

    def _write_settings(self) -> None:
        if self.folder:
            self.kept.key = records_key(self._conditions)
            content = {"compilation": self.kept.compilation, "conditions": self._conditions}
            with errors_naming(self.folder):
                write_atomically(self.folder / SETTINGS, json.dumps(content, indent=1) + "\n", durable=True)


def mark_finished(output_dir: Path) -> None:
    """Note that all results of the model with this output folder are written, and remove what is no longer needed."""
    folder = output_dir / PROGRESS_FOLDER
    if folder.is_dir():
        names = [name for name in RESULT_FILES if (output_dir / name).exists()]
        write_atomically(folder / FINISHED, "\n".join(names) + "\n")
        (folder / NETWORK).unlink(missing_ok=True)


def has_results(folder: Path) -> bool:
    """Return whether all results were written by the run whose work is kept in `folder`, and are still there."""
    path = folder / FINISHED
    return path.exists() and all(
        (folder.parent / name).exists() for name in (RESULT_FILE, *read_utf8(path).splitlines())
    )


def compilation_of(compiled: list[str], reason: str) -> tuple[tuple[str, ...], str]:
    """Return which backends are compiled, and why; raise a TypeError if the settings hold something else."""
    if not isinstance(compiled, list) or not all(isinstance(text, str) for text in (*compiled, reason)):
        raise TypeError("its entry `compilation` does not name backends and a reason")
    return tuple(compiled), reason


def records_key(conditions: Mapping[str, Any]) -> int:
    """Return a number that tells the records of runs under different conditions apart."""
    return zlib.crc32(json.dumps(conditions, sort_keys=True).encode())


def record_files(folder: Path, kind: str) -> list[Path]:
    """Return the files of all ranks with the scores of one kind."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(rf"{kind}-\d+\.jsonl", path.name))


def read_kind(folder: Path, kind: str, key: int) -> Shard | None:
    """Return the scores that all ranks have kept, and say on stderr if records were damaged; None if there are none."""
    shards = []
    for path in record_files(folder, kind):
        shard, damaged = read_records(path, key)
        if shard:
            shards.append(shard)
        if damaged:
            logger.warning(
                f"{path}: dropped {count(damaged, 'record')}, torn when the earlier run stopped, damaged since or of "
                f"another run; {'its image is' if damaged == 1 else 'their images are'} evaluated again."
            )
    return merge_shards(shards) if shards else None


@contextlib.contextmanager
def errors_naming(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the option, the file and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output-dir {folder.parent}: the run's work can't be kept in {error.filename or folder} "
            f"({error.strerror or error}). Free some space there, or name another folder."
        ) from error
