"""The state of one run: its device, stage times, notes, temporary files and processes."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from datasets.cityscapes import CityscapesSplit
from ffnet.backends import INT8_SIMULATED, ONNX_FILE
from ffnet.config import Config
from ffnet.distributed import Ranks
from ffnet.evaluation.loop import Writer
from ffnet.evaluation.runtime import Runtime
from ffnet.files import create_output_folder
from ffnet.options import option_values
from ffnet.published import Comparison
from ffnet.report import result as results
from ffnet.report.delivery import RESULT_MEGABYTES
from ffnet.report.predictions import prediction_writer, predictions_megabytes
from ffnet.report.recovery import Recovery
from ffnet.report.result import Calibration, CheckpointInfo, Details, NpuResult, Result

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """One run of the pipeline on one rank. As a context manager it releases what the run keeps open."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        options, progress = config.runtime, ranks.is_main and not config.runtime.quiet
        self.runtime = Runtime(ranks.device, options.batch_size, options.num_workers, progress)
        self.notes: list[str] = []  # sentences for the report
        self._stage_seconds: dict[str, float] = {}
        self._resources = contextlib.ExitStack()
        if ranks.is_main and ranks.device.type == "cpu" and options.use_cuda is None and not config.model.onnx:
            logger.warning("No CUDA device found: running on the CPU.")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._resources.close()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the wall time of a stage, also of one that fails."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._stage_seconds[name] = time.perf_counter() - begin

    def temporary_folder(self) -> Path:
        """Create a folder that is removed at the end of the run."""
        return Path(self.keep(tempfile.TemporaryDirectory()))

    def keep(self, resource: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context manager that is left at the end of the run."""
        return self._resources.enter_context(resource)

    @property
    def saved_backends(self) -> tuple[str, ...]:
        """The backends whose predictions --save-predictions writes."""
        return (ONNX_FILE,) if self.config.model.onnx else (INT8_SIMULATED,)

    @property
    def dataset(self) -> str:
        """The name of the scored images in the report."""
        return "the demo's street scenes" if self.config.data.demo else f"Cityscapes {self.config.data.split}"

    def create_output_folders(self, images: CityscapesSplit) -> None:
        """Create the folders for results on the main process, before the work; see files.create_output_folder."""
        output = self.config.output
        if output.output_dir and self.ranks.is_main:
            create_output_folder("--output-dir", output.output_dir, RESULT_MEGABYTES)
        if output.save_predictions and self.ranks.is_main:
            megabytes = RESULT_MEGABYTES + predictions_megabytes(images, self.saved_backends)
            create_output_folder("--save-predictions", output.save_predictions, megabytes)

    def prediction_writer(self, images: CityscapesSplit) -> Writer | None:
        """Return a function that writes the predictions of this rank's images; None if none were requested."""
        folder = self.config.output.save_predictions
        if folder is None:
            return None
        paths = images.images[self.ranks.rank :: self.ranks.world_size]
        return prediction_writer(folder, paths, self.saved_backends)

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
        demo_note = "The project renders these street scenes itself: the metrics say nothing about Cityscapes."
        return Result(
            model=model,
            dataset=self.dataset,
            images=len(details.image_paths),
            device=results.device_name(self.ranks.device),
            notes=[*([demo_note] if self.config.data.demo else []), *published.notes, *self.notes],
            published=dict(published.mious),
            checkpoint=checkpoint,
            calibration=calibration,
            recovery=recovery,
            backends=results.backend_results(details.scores),
            agreement=results.agreement(details.scores),
            npu=npu,
            stage_seconds=self._stage_seconds,
            options=option_values(self.config),
            command=self.config.command,
            versions=results.versions(),
            details=details,
        )
