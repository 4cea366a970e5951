"""The evaluation, from checkpoint and images to a Result. Nothing here prints; `ffnet.report` presents the Result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import fx

from datasets.cityscapes import CityscapesSplit
from ffnet import distributed
from ffnet.backends import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED, ONNX_FILE, Backend
from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import Config
from ffnet.errors import UserError
from ffnet.evaluation.compilation import PreparedBackends, prepare_backends
from ffnet.evaluation.loop import evaluate, warm_up
from ffnet.evaluation.preprocessing import normalize
from ffnet.evaluation.scores import Scores, merge_shards
from ffnet.inputs import Inputs, ignored_files_notes, load_model, open_images, open_inputs, select_device
from ffnet.npu_stage import NpuOutcome, open_npu, run_on_npu
from ffnet.onnx.divergence import compare_layers, first_divergence
from ffnet.onnx.export import export
from ffnet.onnx.formats import MODEL_FILE, ROUNDED_LAYERS
from ffnet.onnx.inspection import inspect_onnx
from ffnet.onnx.runtime import OnnxBackend
from ffnet.onnx_stage import open_onnx
from ffnet.published import Comparison, ImageSetup, compare_with_variant, quantization_setup
from ffnet.quantization.bias_ranges import raise_weight_scales
from ffnet.quantization.encodings import LoadedEncodings, load_encodings
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate_on_images, check_finite_logits, equalize
from ffnet.quantization.rounded_weights import rounded_layers
from ffnet.quantization.sensitivity import analyze_sensitivity
from ffnet.quantization.sites import quantizer_sites
from ffnet.recovery_stage import recover
from ffnet.report.images import ImageComparison, compare_images, worst_images
from ffnet.report.recovery import Recovery
from ffnet.report.result import Calibration, CheckpointInfo, Details, Diagnostics, Result
from ffnet.run import Run
from ffnet.variants import VARIANTS
from ffnet.wording import count, list_names

MIOU_TOLERANCE = 0.2  # percentage points by which simulation and ONNX Runtime may differ without an explanation
LEAST_AGREEMENT = 99.0  # percent, their least prediction agreement without an explanation


@dataclass(frozen=True)
class Networks:
    """The quantized network in its three forms."""

    float_network: fx.GraphModule  # equalized, not quantized
    sim: QuantizationSimModel
    lowered: fx.GraphModule


def quantize_and_score(config: Config) -> Result | None:
    """Score a checkpoint in FP32, in simulated INT8 and, if requested, in INT8 on ONNX Runtime and on the NPU.

    Under torchrun every rank scores its share of the images; only the main process returns a Result.

    Raises:
        UserError: if an option, a file or the environment is wrong.
        DatasetError: if an image or a label is wrong.
    """
    with distributed.session(select_device(config.runtime)) as ranks, Run(config, ranks) as run:
        with run.stage("open images"):
            inputs = ranks.main_process_first(open_inputs, config)
            run.notes += ignored_files_notes(inputs.images, inputs.calibration_images)
            run.create_output_folders(inputs.images)
        with run.stage("load checkpoint"):
            checkpoint = ranks.main_process_first(load_model, config)
            fp32 = checkpoint.model.to(ranks.device)
            check_finite_logits(fp32, checkpoint.path)
        with run.stage("build QuantSim"):
            equalized = equalize(fp32, config.quantization.cle and not checkpoint.equalized)
            sim = build_quantsim(equalized, config.quantization)
        with run.stage("calibrate"):
            calibration = set_encodings(sim, inputs, run)
        recovery = recover(sim, equalized, inputs, run) if config.quantization.recovers else None
        run.notes += quantization_notes(config, checkpoint, raise_weight_scales(sim), calibration)
        networks = Networks(equalized, sim, lower(sim))
        backends: dict[str, Backend] = {FP32: fp32, INT8_SIMULATED: networks.lowered}
        facts = export_facts(checkpoint, calibration, recovery) | {ROUNDED_LAYERS: rounded_layers(sim, equalized)}
        exported = export_files(sim, inputs.images, facts, run)
        if exported and config.output.execute:
            backends[INT8_ONNX_RUNTIME] = OnnxBackend(exported)
        npu = open_npu(exported, run) if exported and config.npu.chip else None
        prepared = prepare(backends, inputs.images, run)
        scores = score(prepared, inputs.images, run)
        diagnostics, failure = attempt(lambda: diagnose(networks, backends, inputs, scores, run), run)
        outcome = NpuOutcome()
        if npu and not isinstance(failure, KeyboardInterrupt):
            outcome = run_on_npu(npu, prepared, inputs.images, run, (networks.lowered, quantizer_sites(sim)))
        if scores is None:
            return None
        diagnostics = replace(diagnostics, npu_layers=outcome.layers)
        details = Details(scores, tuple(inputs.images.images), diagnostics, failure or outcome.failure)
        info = CheckpointInfo(str(checkpoint.path), checkpoint.sha256, checkpoint.form)
        published = published_results(config, inputs.images, checkpoint, calibration)
        return run.result(config.model.name, details, info, calibration, recovery, outcome.result, published)


def score_onnx(config: Config) -> Result | None:
    """Score an exported ONNX file on the CPU and, if requested, on the NPU; only the main process returns a Result.

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
            run.create_output_folders(images)
        backend = open_onnx(path, images, run)
        npu = open_npu(path, run, backend.input_format) if config.npu.chip else None
        prepared = prepare({ONNX_FILE: backend}, images, run)
        scores = score(prepared, images, run)
        outcome = run_on_npu(npu, prepared, images, run) if npu else NpuOutcome()
        if scores is None:
            return None
        details = Details(scores, tuple(images.images), failure=outcome.failure)
        return run.result(str(path), details, npu=outcome.result)


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


def set_encodings(sim: QuantizationSimModel, inputs: Inputs, run: Run) -> Calibration:
    """Load or calibrate the encodings of `sim`, the same on every rank, and say where they come from."""
    quantization = run.config.quantization
    loaded = load_encodings(sim, inputs.encodings, quantization.partial_encodings) if inputs.encodings else None
    images = inputs.calibration_images if loaded is None or loaded.missing else None
    batch_size = run.runtime.batch_size
    if images is not None and run.ranks.is_main:
        batch_size = calibrate_on_images(sim, images, run.runtime)
    run.ranks.share_state(sim)
    number = 0 if images is None else len(images)
    description = describe_encodings(run.config, number, loaded)
    if batch_size < run.runtime.batch_size:
        description += f" The GPU ran out of memory, so batches of {count(batch_size, 'image')} were used."
    return Calibration(number, description)


def describe_encodings(config: Config, images: int, loaded: LoadedEncodings | None) -> str:
    """Return sentences that say where the encodings come from; `images`: number of calibration images."""
    data = config.data
    if data.calibration_split == data.split:
        published = "" if config.quantization.recovers else ", as the published results were"
        calibrated = (
            f"Calibrated on {count(images, 'image')} of the split that is scored{published}; with --calibration-split "
            "train no calibration image is scored."
        )
    else:
        calibrated = (
            f"Calibrated on {count(images, 'image')} of the {data.calibration_split} split; none of them is scored."
        )
    if loaded is None:
        return calibrated
    sentences = [f"Encodings, bit widths and symmetry are those of {config.quantization.encodings}."]
    if loaded.prefix:
        sentences.append(f"The prefix {loaded.prefix!r}, which a wrapper adds, was removed from its names.")
    lists = {
        "Quantizers that the file does not cover": loaded.missing,
        "Entries that belong to no quantizer and were ignored": loaded.unexpected,
        "Quantizers that AIMET 2 shares and the file gives separate encodings": loaded.separated,
        "Layers whose weights AdaRound rounded, read from the exported float network beside the file": loaded.rounded,
    }
    sentences += [f"{title} ({len(names)}): {list_names(names)}." for title, names in lists.items() if names]
    return " ".join([*sentences, calibrated] if loaded.missing else sentences)


def quantization_notes(
    config: Config, checkpoint: Checkpoint, raised: Mapping[str, int], calibration: Calibration
) -> list[str]:
    """Return the report's notes on how the network was quantized; `raised`: see raise_weight_scales."""
    notes = list(checkpoint.notes)
    if checkpoint.equalized:
        notes.append("The checkpoint is already equalized, so cross-layer equalization was not applied again.")
    elif not config.quantization.cle:
        notes.append("Cross-layer equalization was not applied.")
    if raised:
        notes.append(f"Weight scales were raised so that biases fit into int32: {', '.join(raised)}.")
    return [*notes, calibration.description]


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


def prepare(backends: Mapping[str, Backend], images: CityscapesSplit, run: Run) -> PreparedBackends:
    """Prepare the backends for speed, and compile those that are worth it."""
    with run.stage("compile"):
        pixels = images.total_pixels // run.ranks.world_size
        prepared = prepare_backends(backends, pixels, run.runtime, run.config.runtime.compile)
        warm_up(prepared, (images.height, images.width), run.runtime)
    if FP32 in backends:
        run.notes.append(f"{FP32} and {INT8_SIMULATED}: {prepared.reason}.")
    return prepared


def score(prepared: PreparedBackends, images: CityscapesSplit, run: Run) -> Scores | None:
    """Run all images through all backends; the main process returns the scores of all ranks, the others None."""
    with run.stage("evaluate"):
        scores = evaluate(prepared, run.ranks.shard(images), run.runtime, run.prediction_writer(images))
        shards = run.ranks.gather(scores)
    if shards is None:
        return None
    merged = merge_shards(shards)
    if not any(matrices.any() for matrices in merged.confusion_matrices.values()):
        run.notes.append(
            "There is no mIoU, because no pixel has the label of a class that is scored. For example, the labels of "
            "Cityscapes' test split are not published."
        )
    if merged.batch_size:
        run.notes.append(f"The GPU ran out of memory: the last batches had {count(merged.batch_size, 'image')}.")
    return merged


def attempt(work: Callable[[], Diagnostics], run: Run) -> tuple[Diagnostics, BaseException | None]:
    """Return the diagnostics or the error that ended `work`, so that the scores are reported in either case."""
    try:
        with run.stage("diagnose"):
            return work(), None
    except KeyboardInterrupt as interrupt:
        return Diagnostics(), interrupt
    except Exception as error:
        return Diagnostics(), UserError(f"The scores are reported, but the diagnostics failed: {error}")


def diagnose(
    networks: Networks,
    backends: Mapping[str, Backend],
    inputs: Inputs,
    scores: Scores | None,
    run: Run,
) -> Diagnostics:
    """Find the images and layers with the largest drops, if the options ask for them; add notes on ONNX Runtime.

    Without `scores`, in a process that is not the main one, it does nothing.
    """
    if scores is None:
        return Diagnostics()
    output, images, device = run.config.output, inputs.calibration_images, run.ranks.device
    worst: list[ImageComparison] = []
    sensitivity = None
    if output.output_dir:
        worst = compare_images(worst_images(scores, output.worst), inputs.images, backends, scores, device)
    if output.sensitivity and images is not None:
        indices = range(min(output.sensitivity_images, len(images)))
        batches = [normalize(images[index][0][None].to(device)) for index in indices]
        sensitivity = analyze_sensitivity(
            networks.sim, networks.float_network, networks.lowered, batches, run.runtime.progress
        )
    backend = backends.get(INT8_ONNX_RUNTIME)
    if isinstance(backend, OnnxBackend):
        run.notes += onnx_runtime_notes(networks, backend.path, inputs.images, scores)
    return Diagnostics(tuple(worst), sensitivity)


def onnx_runtime_notes(networks: Networks, path: Path, images: CityscapesSplit, scores: Scores) -> list[str]:
    """Return notes on ONNX Runtime's integer kernels and, if it differs from the simulation, on where it diverges."""
    notes = [f"{INT8_ONNX_RUNTIME}: {line}" for line in inspect_onnx(path).kernel_lines()]
    mious = scores.miou(INT8_SIMULATED), scores.miou(INT8_ONNX_RUNTIME)
    agreement = scores.agreement(INT8_SIMULATED, INT8_ONNX_RUNTIME)
    if not differ(mious, agreement):
        return notes
    image = normalize(images[0][0][None])
    divergence = first_divergence(compare_layers(networks.lowered, quantizer_sites(networks.sim), path, image))
    where = divergence.describe("ONNX Runtime") if divergence else "No layer diverges."
    return [
        *notes,
        f"{INT8_ONNX_RUNTIME} is far from {INT8_SIMULATED}: {mious[1]:.2f} and {mious[0]:.2f} mIoU, {agreement:.2f} % "
        f"of the pixels predicted alike. {where} (Compared on the first image.)",
    ]


def differ(mious: tuple[float, float], agreement: float) -> bool:
    """Return whether two backends that should agree differ by more than MIOU_TOLERANCE or agree on too few pixels."""
    both_nan = mious[0] != mious[0] and mious[1] != mious[1]
    return not (both_nan or abs(mious[0] - mious[1]) <= MIOU_TOLERANCE) or agreement < LEAST_AGREEMENT
