"""The run of one model on one rank: what it is asked to do, what it saves, and what it holds open."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from ffnet.config import MANIFEST_FILE, Config
from ffnet.evaluation.loop import ScoredBatch
from ffnet.evaluation.scores import BackendNames, Scores, Shard, merge_shards
from ffnet.quantization.quantize import Execution, FoundEncodings
from ffnet.quantization.sites import SimState
from ffnet.run.baseline import ScoredRun
from ffnet.run.inputs import Inputs
from ffnet.run.predictions import Writer
from ffnet.run.progress import describe_run, phase_titles
from ffnet.run.ranks import Ranks
from ffnet.run.records import RecordedImages, RecordFile
from ffnet.run.storage import IMAGES, Storage, conditions, scored_backends
from ffnet.system.process import heartbeat
from ffnet.system.text import count

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """The work that an earlier run saved; the same on every rank."""

    scores: Mapping[str, Shard] = field(default_factory=dict)  # kind of records -> scores
    network: bool = False  # whether there is a quantized network
    finished: bool = False  # whether all results are there


@contextlib.contextmanager
def timed(name: str, stage_seconds: dict[str, float]) -> Iterator[None]:
    """Measure the wall time of a stage, even of one that fails."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        stage_seconds[name] = time.perf_counter() - begin


class Run(Execution, contextlib.ExitStack):
    """The evaluation of one model on one rank. As a context manager it releases what it holds open."""

    def __init__(
        self, config: Config, ranks: Ranks, stage_seconds: Mapping[str, float] = {}, notes: Sequence[str] = ()
    ) -> None:
        """Begin the run of one model after earlier stages, whose wall times and notes are given."""
        super().__init__()
        self.config = config
        self.ranks = ranks
        quiet = config.runtime.quiet or not ranks.is_main
        self.runtime = replace(config.runtime, device=ranks.device, quiet=quiet)
        self.notes = list(notes)  # sentences for the report
        self.compilation = ""
        self.stage_seconds = dict(stage_seconds)
        self.names = BackendNames("")  # names of the backends of an ONNX file
        self.storage: Storage | None = None
        self.saved_work = Saved()
        self.baseline: ScoredRun | None = None

    def begin(self, weights: Path, sha256: str, inputs: Inputs) -> None:
        """Say what is run, and begin to save work in the output folder or find what an earlier run saved there.

        Args:
            weights: The checkpoint or the ONNX file.
            sha256: Its digest.
            inputs: The data of the run.

        Raises:
            UserError: If another run uses the folder, or if the earlier run was made under other conditions.
        """
        folder, self.baseline = self.config.output.output_dir, inputs.baselines.get(self.config.model.name)
        self._log(*describe_run(self.config, weights, sha256, inputs, self.runtime.device))
        if folder is not None:
            self.storage = self.saved_states = self.enter_context(contextlib.closing(Storage(folder)))
            self.saved_work = self.once(lambda: self._find_saved_work(self.storage, sha256, inputs))
            if earlier := self.saved_work.scores.get(IMAGES):
                self._log(f"Resumed: {len(earlier.indices)} of {count(len(inputs.images), 'image')} are done.")

    def _log(self, *lines: str) -> None:
        """Log lines on the main process."""
        for line in lines if self.ranks.is_main else ():
            logger.info(line)

    def _find_saved_work(self, storage: Storage | None, sha256: str, inputs: Inputs) -> Saved:
        """Return the saved work without what is no longer usable, because files that belong to it are gone."""
        if storage is None:
            return Saved()
        output, images = self.config.output, inputs.images
        pixels = [height * width for height, width in images.sizes]
        classes = len(images.label_set.classes)
        scores = storage.begin(
            conditions(self.config, sha256, inputs.digest, self.runtime.device),
            output.resume,
            {k: RecordedImages(v, pixels, classes) for k, v in scored_backends(self.config).items()},
        )
        complete = IMAGES in scores and len(scores[IMAGES].indices) == len(images)
        exported = output.export is None or (output.export / MANIFEST_FILE).exists()
        saved = Saved(scores, storage.has_network, complete and exported and storage.is_finished)
        # Recovery may end elsewhere when it is repeated, because it can be interrupted.
        if self.config.quantization.recovers and not saved.network and not saved.finished and scores:
            logger.warning(f"{storage.folder}: the recovered network is missing; all images are evaluated again.")
            storage.drop_records()
            return Saved()
        return saved

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Release what is held open; after an interruption, say how to continue."""
        if isinstance(error, KeyboardInterrupt) and self.storage and self.ranks.is_main:
            logger.warning("Interrupted. The finished work is saved; continue with the same command and --resume.")
        return super().__exit__(kind, error, trace)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, if it is a phase of the run, and measure its wall time, even if it fails."""
        title = phase_titles(self.config).get(name)
        self._log(*([title] if title else []))
        with timed(name, self.stage_seconds), heartbeat(title or name.capitalize(), self.ranks.is_main):
            yield

    def once(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function on the main process; return its result, or raise its error, on every rank."""
        return self.ranks.once(function, *arguments)

    def saved(self, find: Callable[[], FoundEncodings], like: SimState) -> FoundEncodings:
        """Return the encodings that an earlier run saved, or those that the main process finds, which are saved."""
        storage = self.storage
        if storage and self.saved_work.network:
            with self.stage("restore encodings"):
                return self.once(storage.load_network, like)

        def find_and_save() -> FoundEncodings:
            found = find()
            if storage:
                storage.save_network(found)
            return found

        return self.once(find_and_save)

    def missing(self, kind: str, indices: np.ndarray) -> np.ndarray:
        """Return this rank's share of the images without saved scores of a kind."""
        earlier = self.saved_work.scores.get(kind)
        return self.ranks.share_of(indices if earlier is None else np.setdiff1d(indices, earlier.indices))

    def saved_per_image(
        self,
        kind: str,
        indices: np.ndarray,
        nothing: Scores,
        score: Callable[[np.ndarray], Iterable[ScoredBatch]],
        write: Writer | None = None,
    ) -> Shard:
        """Score images on all ranks, save the scores of each as they come, and return those of all images.

        After an OSError while saving, nothing more is saved, and `Scores.unsaved` says why.

        Args:
            kind: Kind of the records.
            indices: Indices of the images in the split; those with saved scores are not scored again.
            nothing: The scores of no image.
            score: Yields the scores of the images with the given indices, a share of this rank.
            write: Writes the predictions of an image, before its scores are saved.
        """
        earlier, own = self.saved_work.scores.get(kind), self.missing(kind, indices)
        pieces = [Shard(np.empty(0, np.int64), nothing)]
        unsaved: str | None = None
        with self.storage.open_records(kind, self.ranks.rank) if self.storage else contextlib.nullcontext() as records:
            for batch in score(own):
                pieces.append(Shard(own[batch.positions], batch.scores))
                unsaved = unsaved or _save(pieces[-1].indices, batch, records, write)
        shard = merge_shards(pieces, sum)
        shards = self.ranks.all_gather(replace(shard, scores=replace(shard.scores, unsaved=unsaved)))
        merged = merge_shards(shards)
        return merge_shards([earlier, merged], sum) if earlier else merged

    def temporary_folder(self) -> Path:
        """Create a folder that is removed at the end of the run."""
        return Path(self.enter_context(tempfile.TemporaryDirectory()))


def _save(indices: np.ndarray, batch: ScoredBatch, records: RecordFile | None, write: Writer | None) -> str | None:
    """Write the predictions and the records of a batch; return why that failed, or None."""
    try:
        if write:
            for position, index in enumerate(indices.tolist()):
                write(index, {name: ids[position].cpu().numpy() for name, ids in batch.predictions.items()})
        if records:
            records.append(indices, batch.scores)
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None
