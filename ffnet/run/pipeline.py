"""The evaluation, from checkpoints and images to Results. Nothing here prints; `ffnet.report` presents the Results."""

import contextlib
import gc
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import Split, find_layout
from ffnet.config import ONE_SPLIT, RESULT_FILE, Config
from ffnet.evaluation.scores import FP32, ONNX_RUNTIME, SIMULATED, Backend, Scores, Shard
from ffnet.labels import CITYSCAPES
from ffnet.onnx.runtime import OnnxBackend
from ffnet.options import option_values
from ffnet.quantization.layers import Layers
from ffnet.results import result as results
from ffnet.results.images import KeptPredictions, compare_images, worst_images
from ffnet.results.published import Comparison, ImageSetup, compare_with_variant
from ffnet.results.result import CheckpointInfo, Details, Diagnostics, NpuResult, Result
from ffnet.run.inputs import Inputs, check_checkpoints, find_checkpoints, load_model, open_inputs
from ffnet.run.layers import measure_layers
from ffnet.run.networks import Model, calibration_setup, export_network, quantize_checkpoint
from ffnet.run.npu import NpuOutcome, open_npu, run_on_npu
from ffnet.run.ranks import Ranks
from ffnet.run.scoring import measure_sensitivity, onnx_runtime_notes, prepare, score
from ffnet.run.session import Run, timed
from ffnet.run.storage import IMAGES, NPU_IMAGES, damage_named
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8
from ffnet.system.process import heartbeat

logger = logging.getLogger(__name__)


def evaluate_models(config: Config, ranks: Ranks) -> Iterator[Result]:
    """Evaluate one model after the other, and yield the Result of each as soon as it is complete.

    Under torchrun every rank scores its share of the images and yields the same Results. A model is marked as finished
    once the consumer, which writes its Result, asks for the next one.

    Raises:
        UserError: If an option, a file or the environment is wrong.
        DatasetError: If an image or a label is wrong.
    """
    names, seconds = config.model.names, dict[str, float]()
    data = config.for_model(names[0]).data
    with timed("open images", seconds), heartbeat("Reading the images"):
        inputs = open_inputs(replace(config, data=data), ranks)
    with timed("find checkpoints", seconds), heartbeat("Finding the weights"):
        checkpoints, notes = ranks.once(find_checkpoints, config)
        if len(names) > 1:  # report errors before the first model takes time
            ranks.once(check_checkpoints, checkpoints, inputs.images.label_set)
    for name in names:
        if data != (data := config.for_model(name).data):  # images of another size
            inputs = open_inputs(replace(config, data=data), ranks)
        with _model_named(name, config), Run(config.for_model(name), ranks, seconds, [*inputs.notes, *notes]) as run:
            result = evaluate_model(run, inputs, checkpoints[name])
            yield result
            mark_finished(run, result)
        if isinstance(result.details.failure, KeyboardInterrupt):
            return
        torch.compiler.reset()
        gc.collect()  # AIMET's simulations refer to themselves


def evaluate_model(run: Run, inputs: Inputs, path: Path) -> Result:
    """Evaluate the weights in a file in FP32, in simulated INT8 and, if requested, on ONNX Runtime and on the NPU."""
    images, output = inputs.images, run.config.output
    with run.stage("load checkpoint"):
        checkpoint = run.once(load_model, run.config.model.name, path, images.label_set)
    run.begin(path, checkpoint.sha256, inputs)
    if run.storage and run.saved_work.finished:
        return finished_result(run.storage.output_dir, run, images)
    model = quantize_checkpoint(checkpoint, inputs, run)
    exported = export_network(model, dataset_name(run.config), images, run)
    backends: dict[str, Backend] = {FP32: checkpoint.model, SIMULATED: model.network.lowered}
    if exported and output.execute:
        backends[ONNX_RUNTIME] = OnnxBackend(exported)
    npu = open_npu(exported, images, run) if exported and run.config.npu.chips else None
    prepared = prepare(backends, images, run)
    kept = KeptPredictions(output.worst if output.output_dir else 0)
    scores = score(prepared, images, run, kept)
    with run.stage("diagnose"):
        diagnosis = run.once(diagnose, model, backends, inputs, scores, kept, run)
    run.notes += diagnosis.notes
    outcome = NpuOutcome()
    if npu and not isinstance(diagnosis.failure, KeyboardInterrupt):
        outcome = run_on_npu(npu, prepared, images, run, model.network)
    failure = diagnosis.failure or outcome.failure
    details = details_of(scores, images, diagnostics=diagnosis.diagnostics, failure=failure)
    result = build_result(run.config.model.name, details, outcome, run, model)
    layers = diagnosis.layers
    for label, each in result.npus.items():
        if layers and each.chip in outcome.layers:
            layers = layers.add(label, outcome.layers[each.chip])
    return replace(result, layers=layers)


@dataclass(frozen=True)
class Diagnosis:
    """What explains the scores, or the error that prevented it, so that the scores are reported in either case."""

    diagnostics: Diagnostics = Diagnostics()
    layers: Layers | None = None
    notes: tuple[str, ...] = ()
    failure: BaseException | None = None


def diagnose(
    model: Model, backends: Mapping[str, Backend], inputs: Inputs, scores: Scores, kept: KeptPredictions, run: Run
) -> Diagnosis:
    """Find the images, layers and quantizers with the largest drops, as the options say, and notes on ONNX Runtime."""
    images, output = inputs.images, run.config.output
    try:
        worst = worst_images(scores, output.worst) if output.output_dir else []
        compared = compare_images(worst, images, images.names, backends, scores, run.runtime.device, kept.predictions)
        sensitivity = measure_sensitivity(model, inputs, run)
        layers, executed = measure_layers(model, backends, images, run)
        notes = onnx_runtime_notes(model.network, backends, images, scores, executed)
    except KeyboardInterrupt as interrupt:
        return Diagnosis(failure=interrupt)
    except Exception as error:
        return Diagnosis(failure=UserError(f"The scores are reported, but the diagnostics failed: {error}"))
    return Diagnosis(Diagnostics(tuple(compared), sensitivity), layers, tuple(notes))


def build_result(name: str, details: Details, outcome: NpuOutcome, run: Run, model: Model | None = None) -> Result:
    """Return the Result of a variant or, without a model, of an ONNX file, whose path is its name."""
    config = run.config
    published = _published(model, details, config) if model and config.data.is_cityscapes else Comparison()
    recovery = model.recovery if model else None
    checkpoint, names = (model.checkpoint, model.network.names) if model else (None, run.names)
    label_set, scored = details.label_set, Shard(np.arange(len(details.image_names)), details.scores)
    backends = results.backend_results(details.scores, names, label_set.names)
    found = results.definition_notes(backends) + results.recovery_notes(recovery, backends.get(names.of(SIMULATED)))
    if checkpoint and label_set.name == CITYSCAPES.name and not (config.data.demo or config.data.is_cityscapes):
        found.insert(0, f"The published weights were trained on Cityscapes, and not on {dataset_name(config)}.")
    return Result(
        schema=results.SCHEMA,
        model=name,
        dataset=dataset_name(config),
        images=len(details.image_names),
        device=results.device_name(run.runtime.device),
        notes=[*([results.DEMO_NOTE] if config.data.demo else []), *published.notes, *run.notes, *found],
        published=dict(published.mious),
        checkpoint=CheckpointInfo(str(checkpoint.path), checkpoint.sha256, checkpoint.form) if checkpoint else None,
        calibration=model.calibration if model else None,
        recovery=recovery,
        precision=names.precision,
        label_set=label_set.name,
        classes=results.class_counts(details.scores, label_set),
        backends=backends,
        agreement=results.agreement(details.scores, names),
        npu=next(iter(outcome.results), None),
        other_npus=list(outcome.results[1:]),
        npu_chips=list(outcome.chips),
        layers=None,
        baseline=run.baseline.compare({IMAGES: scored, **outcome.scores}, names) if run.baseline else None,
        compilation=run.compilation,
        processor_share=results.processor_share(details.scores, run.runtime.device),
        stage_seconds=run.stage_seconds,
        options=option_values(config),
        command=config.command,
        versions=results.versions(),
        details=details,
    )


def _published(model: Model, details: Details, config: Config) -> Comparison:
    """Return the published mIoU that is comparable with the run's, and a note if it is not."""
    images = ImageSetup(config.data.split, len(details.image_names), details.image_size)
    calibration = calibration_setup(model.network.found, config)
    return compare_with_variant(config, images, calibration, model.checkpoint.equalized)


def dataset_name(config: Config) -> str:
    """Return the name of the scored images in the report."""
    data = config.data
    if data.demo:
        return "the demo's street scenes"
    layout = find_layout(data.dataset)
    title = layout.title or Path(str(data.dataset_path)).resolve().name
    return " ".join(filter(None, (title, "" if data.dataset == ONE_SPLIT else data.split, layout.variant)))


def details_of(scores: Scores, images: Split, **others: Any) -> Details:
    """Return the details of a Result on all images of a split."""
    return Details(scores, tuple(images.names), images.size, images.label_set, **others)


def finished_result(folder: Path, run: Run, images: Split) -> Result:
    """Return the Result that an earlier run has written into a folder."""
    path, saved = folder / RESULT_FILE, run.saved_work.scores
    logger.info(f"{folder}: the results of an earlier run are complete.")
    details = details_of(saved[IMAGES].scores, images, written=True)
    with damage_named(path):
        result = Result.from_json(json.loads(read_utf8(path)), details)
        pairs: list[tuple[str, Result | NpuResult]] = [(IMAGES, result)]
        pairs += [(NPU_IMAGES.format(npu.chip), npu) for npu in result.npus.values()]
        if not all(
            kind in saved and results.is_counted(each, saved[kind].scores, result.names) for kind, each in pairs
        ):
            raise ValueError("its metrics are not those of the records in the folder beside it")
        return result


def mark_finished(run: Run, result: Result) -> None:
    """Mark the results as complete, unless they already are or something is missing."""
    details = result.details
    if run.storage and not (details.written or details.failure or details.scores.unsaved):
        run.once(run.storage.mark_finished)


@contextlib.contextmanager
def _model_named(name: str, config: Config) -> Iterator[None]:
    """Name the model in a UserError if there are several models."""
    try:
        yield
    except UserError as error:
        if len(config.model.names) == 1:
            raise
        raise UserError(f"{name}: {error}") from error
