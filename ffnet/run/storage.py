"""The folder `progress`, in which a run saves the work that `--resume` continues.

    settings.json           what the saved work depends on, see `conditions`
    recovery-*.safetensors  finished parts of the accuracy recovery, until the network is saved
    network.safetensors     ranges, bit widths and rounded weights of the simulation, once they are found
    images-0.jsonl          scores of the images that rank 0 has run through the backends; see `RecordFile`
    npu-sm8750-0.jsonl      the same for the NPU of a chip
    npu-chips.json          which of several chips take the file, and the digest of what each computed for one image
    finished                names of the result files, once all are written

Every rank appends to record files of its own; the main process writes everything else.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ffnet import __version__
from ffnet.config import PROGRESS_FOLDER, RESULT_FILE, RESULT_FILES, Config
from ffnet.evaluation.scores import FP32, NPU, ONNX_FILE, ONNX_RUNTIME, SIMULATED, Shard
from ffnet.options import FLAGS, lookup, plain_value
from ffnet.quantization.quantize import FoundEncodings
from ffnet.quantization.sites import SavedStates, SimState, load_state, save_state, without_parameters
from ffnet.results.result import SCHEMA, ChipResult, processor_name, versions
from ffnet.run.earlier import FINISHED, HARMLESS, IMAGES_DIGEST, SETTINGS
from ffnet.run.records import RecordedImages, RecordFile, read_records
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8, remove_unfinished, sha256_of, write_atomically
from ffnet.system.schema import parse
from ffnet.system.text import count

logger = logging.getLogger(__name__)

NETWORK, LOCK = "network.safetensors", "lock"
RECOVERY = "recovery-*.safetensors"
IMAGES, NPU_IMAGES = "images", "npu-{}"  # kinds of record files; with the part name of a chip
NPU_CHIPS = "npu-chips.json"
RECORDS = ("images-[0-9]*.jsonl", "npu-*-[0-9]*.jsonl", NPU_CHIPS)
FILES = (SETTINGS, NETWORK, FINISHED, RECOVERY, *RECORDS)

# Options that change nothing in the saved work, or whose files are compared by their content.
MAY_DIFFER = (
    *HARMLESS, "model.names", "model.checkpoint", "model.onnx", "list_models", "data.dataset_path", "data.classes",
    "quantization.encodings",
)  # fmt: skip


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
    if config.npu.chips:
        packages["onnxruntime-qnn"] = importlib.metadata.version("onnxruntime-qnn")
    return {
        **values,
        **{f"sha256 of {flag}": sha256_of(path) for flag, path in files.items() if path and path.is_file()},
        "sha256 of the weights": weights,
        IMAGES_DIGEST: images,
        "device": processor_name(device),
        "version of this program": __version__,
        "schema of result.json": SCHEMA,
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


def scored_backends(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the names of the backends whose scores the records of each kind hold."""
    runtime = (ONNX_RUNTIME,) if config.output.execute else ()
    backends = (ONNX_FILE,) if config.model.onnx else (FP32, SIMULATED, *runtime)
    if config.quantizes_onnx:
        backends = (FP32, ONNX_RUNTIME)
    return {IMAGES: backends, **{NPU_IMAGES.format(chip): (*backends, NPU) for chip in config.npu.chips}}


@contextlib.contextmanager
def damage_named(path: Path, remedy: str = "Delete it and start again with --resume") -> Iterator[None]:
    """Turn whatever goes wrong while one of the program's own files is read into a UserError that names it."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: this file is damaged ({error or type(error).__name__}). {remedy}.") from error


class Storage(SavedStates):
    """The folder with the saved work of one model; used by the main process, apart from `open_records`."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / PROGRESS_FOLDER
        self._lock = FileLock(self.folder / LOCK)

    def begin(
        self, conditions: Mapping[str, Any], resume: bool, expected: Mapping[str, RecordedImages]
    ) -> dict[str, Shard]:
        """Lock the folder, and empty it unless `resume`; return the saved scores by their kind.

        Args:
            conditions: What the saved work depends on.
            resume: Whether to use the saved work.
            expected: Kind of records -> what is known of their images.

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
            remove_unfinished(self.folder, FILES)
            remove_unfinished(self.output_dir, RESULT_FILES)
            if resume and (self.folder / SETTINGS).exists():
                self._compare(conditions)
                found = {kind: self._read(kind, images) for kind, images in expected.items()}
                return {kind: shard for kind, shard in found.items() if shard}
            self._remove(*FILES)
            write_atomically(self.folder / SETTINGS, json.dumps(conditions, indent=1) + "\n")
            return {}

    def close(self) -> None:
        """Let other runs use the folder."""
        self._lock.release()

    def drop_records(self) -> None:
        """Remove the scores of all images, so that they are computed again."""
        self._remove(*RECORDS)

    def _remove(self, *patterns: str) -> None:
        for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
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
        description = dataclasses.asdict(dataclasses.replace(found, state={}))
        del description["state"]
        state = found.state if found.recovery else without_parameters(found.state)
        with self.errors_named():
            write_atomically(self.folder / NETWORK, save_state(state, description))
            self._remove(RECOVERY)

    def load_network(self, like: SimState) -> FoundEncodings:
        """Return what `save_network` saved; `like`: a state of the same simulation, with tensors of the same shapes."""
        with damage_named(self.folder / NETWORK):
            state, description = load_state(self.folder / NETWORK, like)
            return parse(FoundEncodings, description, state=state)

    def load(self, name: str, like: SimState, form: Any) -> tuple[SimState, Any] | None:
        """Return a finished part of the recovery, None if it is not saved; see `SavedStates`."""
        path = self.folder / RECOVERY.replace("*", name)
        if not path.exists():
            return None
        with damage_named(path):
            state, description = load_state(path, like)
            return state, parse(form, description)

    def save(self, name: str, state: SimState, description: Any = None) -> None:
        """Save a finished part of the recovery."""
        with self.errors_named():
            write_atomically(self.folder / RECOVERY.replace("*", name), save_state(state, description))

    def load_chips(self) -> dict[str, ChipResult]:
        """Return what `save_chips` saved."""
        path = self.folder / NPU_CHIPS
        with damage_named(path):
            return dict(parse(dict[str, ChipResult], json.loads(read_utf8(path)))) if path.exists() else {}

    def save_chips(self, chips: Mapping[str, ChipResult]) -> None:
        """Save what is known of each chip."""
        with self.errors_named():
            write_atomically(self.folder / NPU_CHIPS, json.dumps(chips, indent=1, default=dataclasses.asdict) + "\n")

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
            self._remove(NETWORK)

    def _compare(self, conditions: Mapping[str, Any]) -> None:
        """Raise a UserError unless the earlier run was made under the same conditions."""
        with damage_named(self.folder / SETTINGS, "Start again with --force instead of --resume"):
            saved = dict(json.loads(read_utf8(self.folder / SETTINGS)).items())
        if phrases := differences(saved, json.loads(json.dumps(conditions))):
            raise UserError(
                f"--resume: the run in {self.output_dir} was made under other conditions: {'; '.join(phrases)}. "
                "Restore them, or start again with --force instead of --resume."
            )

    def _read(self, kind: str, images: RecordedImages) -> Shard | None:
        """Return the saved scores of all ranks, None if there are none; report dropped records."""
        shard, dropped = read_records(sorted(self.folder.glob(f"{kind}-[0-9]*.jsonl")), images)
        for path, number in dropped.items():
            logger.warning(
                f"{path}: dropped {count(number, 'record')}, torn when the earlier run stopped or damaged since; "
                f"{'its image is' if number == 1 else 'their images are'} evaluated again."
            )
        return shard

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
