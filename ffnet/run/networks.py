"""Quantize the network of a checkpoint, export it, and describe how it was quantized."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from datasets import Split
from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import MODEL_FILE, ONE_SPLIT, ROUNDED_LAYERS, Config, Runtime
from ffnet.evaluation.loading import memory_format
from ffnet.labels import LabelSet
from ffnet.npu.backend import write_npu_contexts
from ffnet.onnx.export import export
from ffnet.options import option_values
from ffnet.quantization.encodings import LoadedEncodings, rounded_layers
from ffnet.quantization.quantize import FoundEncodings, QuantizedNetwork, quantize
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.results.published import CalibrationSetup
from ffnet.results.result import Calibration, versions
from ffnet.run.inputs import Inputs
from ffnet.run.session import Run
from ffnet.system.errors import UserError
from ffnet.system.text import count, list_names


@dataclass(frozen=True)
class Model:
    """A checkpoint and its quantized network."""

    checkpoint: Checkpoint  # its network is on the device of the run
    network: QuantizedNetwork
    calibration: Calibration
    recovery: Recovery | None  # None without accuracy recovery


def quantize_checkpoint(checkpoint: Checkpoint, inputs: Inputs, run: Run) -> Model:
    """Quantize the network of a checkpoint, and add notes about it to the run."""
    options = run.config.quantization
    config = replace(options, cle=options.cle and not checkpoint.equalized)
    fp32 = checkpoint.model.to(run.runtime.device)
    network = quantize(fp32, inputs.calibration_images, config, run.runtime, inputs.selection_images, run)
    found = network.found
    recovery = found.recovery
    if recovery and inputs.selection_images:
        selection = inputs.selection_images
        scored_too = not set(selection.images).isdisjoint(inputs.images.images)
        recovery = replace(recovery, selection_images=selection.names, scored_too=scored_too)
        run.notes.append(recovery.describe())
    description = describe_encodings(run.config, found.calibration_images, network.loaded)
    neighbors = " or fewer of one size" if inputs.calibration_images and inputs.calibration_images.size is None else ""
    if found.batch_size is not None:
        description += (
            f" Calibration took them in file order, in batches of {found.batch_size}{neighbors}{layout(run.runtime)}."
        )
    if found.batch_size is not None and found.batch_size < run.runtime.batch_size:
        description += " The GPU ran out of memory for larger ones."
    calibration = Calibration(found.calibration_images, found.batch_size, description)
    run.notes += quantization_notes(run.config, checkpoint, network.raised_scales, calibration)
    return Model(checkpoint, network, calibration, recovery)


def layout(runtime: Runtime) -> str:
    """Return the memory layout of the batches as a phrase; it moves the last bits of what a network computes."""
    channels_last = memory_format(torch.device(runtime.device), runtime.allow_tf32) == torch.channels_last
    return ", channels last" if channels_last else ", channels first"


def calibration_setup(found: FoundEncodings, config: Config) -> CalibrationSetup | None:
    """Return what a published calibration is compared with; None if all encodings were loaded from a file."""
    if not found.calibration_images:
        return None
    return CalibrationSetup(found.calibration_images, config.data.calibration_split, found.batch_size)


def describe_encodings(config: Config, images: int, loaded: LoadedEncodings | None) -> str:
    """Return sentences that say where the encodings come from; `images`: number of calibration images."""
    data = config.data
    if data.scores_calibration_images:
        as_published = (data.demo or data.is_cityscapes) and not config.quantization.recovers
        published = ", as the published results were" if as_published else ""
        remedy = "with --calibration-split train no calibration image is scored"
        if data.dataset == ONE_SPLIT:
            remedy = "this data set has one part only"
        calibrated = f"Calibrated on {count(images, 'image')} of the split that is scored{published}; {remedy}."
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
    config: Config, checkpoint: Checkpoint, raised_scales: dict[str, int], calibration: Calibration
) -> list[str]:
    """Return the report's notes on how the network was quantized."""
    notes = list(checkpoint.notes)
    if checkpoint.equalized:
        notes.append("The checkpoint is already equalized, so cross-layer equalization was not applied again.")
    elif not config.quantization.cle:
        notes.append("Cross-layer equalization was not applied.")
    if raised_scales:
        notes.append(f"Weight scales were raised so that biases fit into int32: {', '.join(raised_scales)}.")
    return [*notes, calibration.description]


def export_network(model: Model, dataset: str, images: Split, run: Run) -> Path | None:
    """Export a network if a backend or an option needs files, and return the quantized file.

    Without --export, and on other ranks than the main process, it is in a temporary folder.
    """
    output, npu = run.config.output, run.config.npu
    named = output.export if run.ranks.is_main else None
    if images.size is None or (output.export is None and not output.execute and not npu.chips):
        return None
    folder = named or run.temporary_folder() / "export"
    compiled_too = bool(npu.chips) and named is not None
    try:
        with run.stage("export"):
            export(
                model.network.sim,
                images.size,
                folder,
                _provenance(model, dataset, images.label_set, run),
                (lambda work: write_npu_contexts(work, npu)) if compiled_too else None,
            )
    except OSError as error:
        option = f"--export {named}" if named else f"--execute and --npu: the temporary folder {folder}"
        raise UserError(
            f"{option} can't be written ({error.strerror}). Free some space, or name another folder with --export."
        ) from error
    return folder / MODEL_FILE


def _provenance(model: Model, dataset: str, label_set: LabelSet, run: Run) -> dict[str, Any]:
    """Return what the manifest of an export says about the network, and about the run that wrote it."""
    network, recovery = model.network, model.recovery
    return {
        "dataset": dataset,
        "output": {"classes": list(label_set.names)},
        "options": option_values(run.config),
        "versions": versions(),
        "model": run.config.model.name,
        "checkpoint_sha256": model.checkpoint.sha256,
        "calibration": model.calibration.description,
        **({"recovery": recovery.describe()} if recovery else {}),
        ROUNDED_LAYERS: rounded_layers(network.sim, network.float_network),
    }
