"""The state of one model's run: its device, stage times, notes, kept work, temporary files and processes."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Config
from ffnet.evaluation.backends import INT8_SIMULATED, ONNX_FILE
from ffnet.file_names import MANIFEST_FILE, PROGRESS_FOLDER, RESULT_MEGABYTES
from ffnet.options import option_values
from ffnet.results import result as results
from ffnet.results.published import Comparison
from ffnet.results.recovery import Recovery
from ffnet.results.result import Calibration, CheckpointInfo, Details, NpuResult, Result
from ffnet.run.predictions import missing_predictions, prediction_writer, predictions_megabytes
from ffnet.run.ranks import Ranks
from ffnet.run.records import Writer
from ffnet.run.storage import IMAGES, Progress, conditions
from ffnet.system.files import create_output_folder
from ffnet.system.text import count

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextlib.contextmanager
def timed(name: str, *stage_seconds: dict[str, float]) -> Iterator[None]:
    """Measure the wall time of a stage, also of one that fails, for one or more runs."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        for seconds in stage_seconds:
            seconds[name] = time.perf_counter() - begin


class Run:
    """The evaluation of one model on one rank. As a context manager it releases what it keeps open."""

    def __init__(
        self, config: Config, ranks: Ranks, stage_seconds: Mapping[str, float] = {}, notes: Sequence[str] = ()
    ) -> None:
        """Begin a run.

        Args:
            config: of one model.
            ranks: of the program.
            stage_seconds: wall times of stages that were before it.
            notes: of these stages.
        """
        self.config = config
        self.ranks = ranks
        quiet = config.runtime.quiet or not ranks.is_main
        self.runtime = replace(config.runtime, device=str(ranks.device), quiet=quiet)
        self.notes = list(notes)  # sentences for the report
        self.stage_seconds = dict(stage_seconds)
        self.progress = Progress()
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._resources.close()

    def begin(self, weights: str, images: CityscapesSplit, digest: str) -> None:
        """Begin to keep the run's work in its output folder or, with --resume, find what an earlier run has kept.

        Args:
            weights: sha256 of the checkpoint or the ONNX file.
            images: that are scored.
            digest: sha256 of all images and labels; used in the main process only.

        Raises:
            UserError: if another run uses the folder, or if the earlier run was made under other conditions.
        """
        output = self.config.output
        if output.output_dir is None:
            return
        self.progress = Progress(output.output_dir / PROGRESS_FOLDER, self.ranks.rank)
        self._resources.callback(self.progress.close)
        if self.ranks.is_main:
            self.progress.begin(conditions(self.config, weights, digest, self.ranks.device), output.resume)
            self._drop_unusable(images)
        self.progress.kept = self.ranks.share(self.progress.kept)

    def is_finished(self, images: CityscapesSplit) -> bool:
        """Return whether an earlier run has written all results."""
        return self.progress.is_finished(len(images))

    def _drop_unusable(self, images: CityscapesSplit) -> None:
        """Drop what an earlier run has kept if files are gone that belong to it, and say so on stderr."""
        output, kept = self.config.output, self.progress.kept
        if output.export and not (output.export / MANIFEST_FILE).exists():
            kept.finished = False
        done = kept.done.get(IMAGES, np.empty(0, np.int64))
        if output.save_predictions:
            names = saved_backends(self.config)
            missing = missing_predictions(output.save_predictions, images.images, names, done.tolist())
            if missing:
                logger.warning(
                    f"--save-predictions {output.save_predictions}: the files of {count(len(missing), 'image')} that "
                    "the earlier run wrote are not there; these images are evaluated again."
                )
                self.progress.drop_images(np.array(missing, np.int64))
        # Recovery may end elsewhere when it is repeated, for it can be interrupted.
        lost = self.config.quantization.recovers and not kept.network and not self.is_finished(images)
        if lost and len(done):
            logger.warning(
                f"{self.progress.folder}: the recovered network is no longer there; all images are evaluated again."
            )
            self.progress.drop_records()

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Measure the wall time of a stage, also of one that fails."""
        return timed(name, self.stage_seconds)

    def temporary_folder(self) -> Path:
        """Create a folder that is removed at the end of the run."""
        return Path(self.keep(tempfile.TemporaryDirectory()))

    def keep(self, resource: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context manager that is left at the end of the run."""
        return self._resources.enter_context(resource)

    @property
    def dataset(self) -> str:
        """The name of the scored images in the report."""
        return "the demo's street scenes" if self.config.data.demo else f"Cityscapes {self.config.data.split}"

    def prediction_writer(self, images: CityscapesSplit) -> Writer | None:
        """Return a function that writes the predictions of an image, given its index; None if none were requested."""
        folder = self.config.output.save_predictions
        return prediction_writer(folder, images.images, saved_backends(self.config)) if folder else None

    def provenance(self) -> dict[str, Any]:
        """Return what the manifest of an export says about the run that wrote it."""
        return {"dataset": self.dataset, "options": option_values(self.config), "versions": results.versions()}

    def result(
        self,
        model: str,
        details: Details,
        checkpoint: CheckpointInfo | None = None,
        calibration: Calibration | None = None,
        recovery: Recovery | None = None,
        npu: NpuResult | None = None,
        published: Comparison = Comparison(),
    ) -> Result:
        """Return the Result of the run; `model`: name of a variant, or path of an ONNX file."""
        return Result(
            model=model,
            dataset=self.dataset,
            images=len(details.image_paths),
            device=results.device_name(self.ranks.device),
            notes=[*([results.DEMO_NOTE] if self.config.data.demo else []), *published.notes, *self.notes],
            published=dict(published.mious),
            checkpoint=checkpoint,
            calibration=calibration,
            recovery=recovery,
            backends=results.backend_results(details.scores),
            agreement=results.agreement(details.scores),
            npu=npu,
            stage_seconds=self.stage_seconds,
            options=option_values(self.config),
            command=self.config.command,
            versions=results.versions(),
            details=details,
        )


def saved_backends(config: Config) -> tuple[str, ...]:
    """Return the backends whose predictions --save-predictions writes."""
    return (ONNX_FILE,) if config.model.onnx else (INT8_SIMULATED,)


def create_output_folders(config: Config, images: CityscapesSplit) -> None:
    """Create the folders for results, before the work; see files.create_output_folder."""
    output, models = config.output, len(config.model.names)
    megabytes: float = models * RESULT_MEGABYTES
    if output.output_dir:
        create_output_folder("--output-dir", output.output_dir, megabytes)
    if output.save_predictions:
        megabytes += models * predictions_megabytes(images, saved_backends(config))
        create_output_folder("--save-predictions", output.save_predictions, megabytes)
