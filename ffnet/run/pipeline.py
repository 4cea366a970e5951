"""The evaluation, from checkpoints and images to Results. Nothing here prints; `ffnet.report` presents the Results."""

import contextlib
import gc
import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel

from datasets.cityscapes import CityscapesSplit
from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import Config
from ffnet.evaluation.backends import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED, ONNX_FILE, Backend
from ffnet.evaluation.compilation import PreparedBackends
from ffnet.evaluation.loading import decoding_threads
from ffnet.evaluation.scores import Scores
from ffnet.file_names import MODEL_FILE, RESULT_FILE, ROUNDED_LAYERS
from ffnet.npu.backend import NpuBackend
from ffnet.onnx.export import export
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.bias_ranges import raise_weight_scales
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.rounded_weights import rounded_layers
from ffnet.quantization.sites import quantizer_sites
from ffnet.results.published import Comparison, ImageSetup, compare_with_variant, quantization_setup
from ffnet.results.recovery import Recovery
from ffnet.results.result import Calibration, CheckpointInfo, Details, Diagnostics, Result
from ffnet.run import ranks as distributed
from ffnet.run.diagnostics import Networks, attempt, diagnose
from ffnet.run.encodings import find_encodings, quantization_notes
from ffnet.run.inputs import (
    Inputs,
    check_checkpoints,
    find_checkpoints,
    ignored_files_notes,
    keep_decoded,
    load_model,
    open_images,
    open_inputs,
    select_device,
)
from ffnet.run.npu import NpuOutcome, open_npu, run_on_npu
from ffnet.run.onnx_file import open_onnx
from ffnet.run.ranks import Ranks
from ffnet.run.scoring import prepare, score
from ffnet.run.session import Run, create_output_folders, timed
from ffnet.run.storage import IMAGES, images_digest
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8, sha256_of
from ffnet.system.memory import enough_memory_for
from ffnet.variants import VARIANTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model whose backends are ready to be evaluated."""

    run: Run
    checkpoint: Checkpoint
    calibration: Calibration
    recovery: Recovery | None
    networks: Networks
    backends: Mapping[str, Backend]  # as they were built
    prepared: PreparedBackends  # as the evaluation loop runs them
    npu: NpuBackend | None


@dataclass(frozen=True)
class Shared:
    """What all models of the program have in common."""

    ranks: Ranks
    inputs: Inputs
    images_digest: str  # of the main process; "" elsewhere and if nothing is kept
    checkpoints: Mapping[str, Path]  # by name of the model
    stage_seconds: Mapping[str, float]
    notes: Sequence[str]


def evaluate_models(config: Config) -> Iterator[Result]:
    """Score checkpoints in FP32, in simulated INT8 and, if requested, in INT8 on ONNX Runtime and on the NPU.

    Models that are in memory at the same time share one evaluation loop. A result is yielded as soon as it is there.
    Under torchrun every rank scores its share of the images; only the main process yields Results.

    Raises:
        UserError: if an option, a file or the environment is wrong.
        DatasetError: if an image or a label is wrong.
    """
    names, at_once = config.model.names, config.runtime.models_at_once
    with distributed.session(select_device(config.runtime)) as ranks:
        warn_without_gpu(config, ranks)
        shared = open_shared(config, ranks)
        if len(names) > at_once:
            check_checkpoints(shared.checkpoints)
        for start in range(0, len(names), at_once):
            group = [config.for_model(name) for name in names[start : start + at_once]]
            interrupted = yield from evaluate_group(group, shared)
            free_memory()
            if interrupted:
                return


def open_shared(config: Config, ranks: Ranks) -> Shared:
    """Open the images, and find the checkpoints of all models."""
    seconds: dict[str, float] = {}
    with timed("open images", seconds):
        inputs = ranks.main_process_first(open_inputs, config)
        if ranks.is_main:
            create_output_folders(config, inputs.images)
        digest = keep_digest(config, inputs.images, ranks)
        if ranks.device.type == "cuda":
            keep_decoded(inputs)
    with timed("find checkpoints", seconds):
        checkpoints, notes = ranks.main_process_first(find_checkpoints, config)
    notes = [*ignored_files_notes(inputs.images, inputs.calibration_images), *notes]
    return Shared(ranks, inputs, digest, checkpoints, seconds, notes)


def evaluate_group(configs: Sequence[Config], shared: Shared) -> Generator[Result, None, bool]:
    """Evaluate models that are in memory at the same time; return whether the user interrupted this."""
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(Run(config, shared.ranks, shared.stage_seconds, shared.notes)) for config in configs
        ]
        inputs = shared.inputs
        with enough_memory_for(len(runs)):
            checkpoints = [load_checkpoint(run, shared) for run in runs]  # all, before the first takes time
            models = [
                quantize(run, checkpoint, inputs)
                for run, checkpoint in zip(runs, checkpoints, strict=True)
                if not run.is_finished(inputs.images)
            ]
        scores = score([model.prepared for model in models], [model.run for model in models], inputs.images)
        scored = {model.run: (model, scores) for model, scores in zip(models, scores, strict=True)}
        interrupt: KeyboardInterrupt | None = None
        for run in runs:
            result = finish(*scored[run], inputs, interrupt) if run in scored else finished_result(run, inputs.images)
            if result:
                yield result
                failure = result.details.failure
                interrupt = failure if isinstance(failure, KeyboardInterrupt) else interrupt
        return interrupt is not None


def free_memory() -> None:
    """Free the memory of models that are no longer needed: AIMET's simulations refer to themselves."""
    torch.compiler.reset()
    gc.collect()


def load_checkpoint(run: Run, shared: Shared) -> Checkpoint:
    """Load the weights of a model, and find what an earlier run with them has kept."""
    name = run.config.model.name
    with run.stage("load checkpoint"):
        checkpoint = shared.ranks.main_process_first(load_model, name, shared.checkpoints[name])
    run.begin(checkpoint.sha256, shared.inputs.images, shared.images_digest)
    return checkpoint


def quantize(run: Run, checkpoint: Checkpoint, inputs: Inputs) -> Model:
    """Quantize a model and prepare its backends."""
    config, images = run.config, inputs.images
    with run.stage("build QuantSim"):
        fp32 = checkpoint.model.to(run.ranks.device)
        equalized = equalize(fp32, config.quantization.cle and not checkpoint.equalized)
        sim = build_quantsim(equalized, config.quantization)
    calibration, recovery = find_encodings(sim, equalized, inputs, run)
    run.notes += quantization_notes(config, checkpoint, raise_weight_scales(sim), calibration)
    networks = Networks(equalized, sim, lower(sim))
    backends: dict[str, Backend] = {FP32: fp32, INT8_SIMULATED: networks.lowered}
    facts = export_facts(checkpoint, calibration, recovery) | {ROUNDED_LAYERS: rounded_layers(sim, equalized)}
    exported = export_files(sim, images, facts, run)
    if exported and config.output.execute:
        backends[INT8_ONNX_RUNTIME] = OnnxBackend(exported)
    npu = open_npu(exported, run) if exported and config.npu.chip else None
    prepared = prepare(backends, images, run)
    return Model(run, checkpoint, calibration, recovery, networks, backends, prepared, npu)


def finish(
    model: Model, scores: Scores | None, inputs: Inputs, interrupt: KeyboardInterrupt | None = None
) -> Result | None:
    """Find what explains the scores, and evaluate the NPU; return the Result, None if this is not the main process.

    After an `interrupt`, only the scores are reported.
    """
    run, diagnostics, outcome = model.run, Diagnostics(), NpuOutcome()
    failure: BaseException | None = interrupt
    if failure is None:
        diagnostics, failure = attempt(lambda: diagnose(model.networks, model.backends, inputs, scores, run), run)
    if model.npu and not isinstance(failure, KeyboardInterrupt):
        simulated = (model.networks.lowered, quantizer_sites(model.networks.sim))
        outcome = run_on_npu(model.npu, model.prepared, inputs.images, run, simulated)
    if scores is None:
        return None
    diagnostics = replace(diagnostics, npu_layers=outcome.layers)
    details = details_of(scores, inputs.images, diagnostics=diagnostics, failure=failure or outcome.failure)
    checkpoint = model.checkpoint
    info = CheckpointInfo(str(checkpoint.path), checkpoint.sha256, checkpoint.form)
    published = published_results(run.config, inputs.images, checkpoint, model.calibration)
    return run.result(
        run.config.model.name, details, info, model.calibration, model.recovery, outcome.result, published
    )


def finished_result(run: Run, images: CityscapesSplit) -> Result | None:
    """Return the Result that an earlier run has written; None if this is not the main process."""
    folder, scores = run.config.output.output_dir, run.progress.earlier_scores(IMAGES)
    if folder is None or scores is None:
        return None
    logger.info(f"{folder}: the results of an earlier run are complete.")
    path = folder / RESULT_FILE
    try:
        return Result.from_json(json.loads(read_utf8(path)), details_of(scores, images, written=True))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: this file is damaged ({error}). Delete it and start again with --resume.") from error


def details_of(scores: Scores, images: CityscapesSplit, **others: Any) -> Details:
    """Return the details of a Result on all images of a split."""
    return Details(scores, tuple(images.images), (images.height, images.width), **others)


def evaluate_onnx(config: Config) -> Iterator[Result]:
    """Score an exported ONNX file on the CPU and, if requested, on the NPU; only the main process yields a Result.

    Raises:
        UserError: if the file can't be run.
        DatasetError: if an image or a label is wrong.
    """
    path = config.model.onnx
    if path is None:
        raise ValueError("config.model.onnx is not set")
    with distributed.session(torch.device("cpu")) as ranks, Run(config, ranks) as run:
        with run.stage("open images"):
            images = ranks.main_process_first(open_images, config)
            run.notes += ignored_files_notes(images)
            if ranks.is_main:
                create_output_folders(config, images)
            run.begin(sha256_of(path), images, keep_digest(config, images, ranks))
        result = finished_result(run, images) if run.is_finished(images) else score_onnx(path, images, run)
        if result:
            yield result


def score_onnx(path: Path, images: CityscapesSplit, run: Run) -> Result | None:
    """Score a file on the CPU and, if requested, on the NPU."""
    backend = open_onnx(path, images, run)
    npu = open_npu(path, run, backend.input_format) if run.config.npu.chip else None
    prepared = prepare({ONNX_FILE: backend}, images, run)
    (scores,) = score([prepared], [run], images)
    outcome = run_on_npu(npu, prepared, images, run) if npu else NpuOutcome()
    if scores is None:
        return None
    return run.result(str(path), details_of(scores, images, failure=outcome.failure), npu=outcome.result)


def keep_digest(config: Config, images: CityscapesSplit, ranks: Ranks) -> str:
    """Return the digest of the images if the main process keeps its work; "" otherwise."""
    kept = ranks.is_main and config.output.output_dir
    return images_digest(images, decoding_threads(ranks.device, config.runtime.num_workers)) if kept else ""


def warn_without_gpu(config: Config, ranks: Ranks) -> None:
    """Say on stderr that the run takes longer than expected, unless a CPU was asked for."""
    if ranks.is_main and ranks.device.type == "cpu" and config.runtime.use_cuda is None:
        logger.warning("No CUDA device found: running on the CPU.")


def published_results(
    config: Config, images: CityscapesSplit, checkpoint: Checkpoint, calibration: Calibration
) -> Comparison:
    """Return the published mIoU that is comparable with the run's, and a note if it is not; nothing in the demo."""
    if config.data.demo:
        return Comparison()
    return compare_with_variant(
        VARIANTS[config.model.name],
        ImageSetup(config.data.split, len(images), (images.height, images.width)),
        quantization_setup(config, calibration.images, checkpoint.equalized),
    )


def export_facts(checkpoint: Checkpoint, calibration: Calibration, recovery: Recovery | None) -> dict[str, Any]:
    """Return what the manifest of an export says about the network, beside the run."""
    facts = {"checkpoint_sha256": checkpoint.sha256, "calibration": calibration.description}
    return facts | ({"recovery": recovery.describe()} if recovery else {})


def export_files(sim: QuantizationSimModel, images: CityscapesSplit, facts: Mapping[str, Any], run: Run) -> Path | None:
    """Export the simulation, to a temporary folder if none is named, and return the quantized file; None if not needed.

    Under torchrun the main process writes the named folder and every other rank a temporary one. `facts` go into the
    manifest.
    """
    output = run.config.output
    named = output.export if run.ranks.is_main else None
    npu = run.config.npu
    if named is None and not output.execute and npu.chip is None:
        return None
    folder = named or run.temporary_folder() / "export"
    provenance = run.provenance() | {"model": run.config.model.name, **facts}
    try:
        with run.stage("export"):
            export(sim, (images.height, images.width), folder, provenance, output.force, npu if named else None)
    except OSError as error:
        option = f"--export {named}" if named else f"--execute and --npu: the temporary folder {folder}"
        raise UserError(
            f"{option} can't be written ({error.strerror}). Free some space, or name another folder with --export."
        ) from error
    return folder / MODEL_FILE
