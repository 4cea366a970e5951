"""Run the images through all backends, and find what explains the scores."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from datasets import Split
from ffnet.evaluation.compilation import PreparedBackends, choose_compilation, prepare_backends
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.loop import ScoredBatch, score_batches, warm_up
from ffnet.evaluation.metrics import statistics
from ffnet.evaluation.scores import FP32, ONNX_RUNTIME, SIMULATED, Backend, Scores, no_scores
from ffnet.onnx.divergence import compare_layers, describe_divergence
from ffnet.onnx.runtime import OnnxBackend, inspect_onnx
from ffnet.quantization.layers import Comparison, layer_names
from ffnet.quantization.quantize import QuantizedNetwork
from ffnet.quantization.sensitivity import Sensitivity, analyze_sensitivity
from ffnet.quantization.sites import quantizer_sites
from ffnet.results.images import KeptPredictions
from ffnet.run.inputs import Inputs
from ffnet.run.networks import Model
from ffnet.run.predictions import prediction_writer, predictions_folder
from ffnet.run.session import Run
from ffnet.run.storage import IMAGES
from ffnet.system.text import count

MIOU_TOLERANCE = 0.2  # percentage points by which simulation and ONNX Runtime may differ without an explanation
LEAST_AGREEMENT = 99.0  # percent; least prediction agreement of the two without an explanation


def prepare(backends: Mapping[str, Backend], images: Split, run: Run) -> PreparedBackends:
    """Prepare the backends for speed, and compile the networks among them if that saves time."""
    with run.stage("compile"):
        compiled, reason = choose_compilation(run.runtime, len(images), images.size)
        prepared = prepare_backends(backends, run.runtime, compiled)
        warm_up(prepared, images, run.runtime)
    if SIMULATED in backends:
        run.compilation = f"{FP32} and the simulation were {reason}."
    return prepared


def score(prepared: PreparedBackends, images: Split, run: Run, kept: KeptPredictions) -> Scores:
    """Run the images through all backends, apart from those whose scores an earlier run saved.

    Predictions of the worst images are added to `kept`.
    """
    runtime = run.runtime
    if not runtime.on_gpu:  # backends take single images anyway, and less is lost if the run is stopped
        runtime = replace(runtime, batch_size=1)
    folder, backends = run.config.output.save_predictions, prepared.backends
    saved = SIMULATED if SIMULATED in backends else list(backends)[-1]
    write = prediction_writer(predictions_folder(folder, run.config), images, saved) if folder else None

    def batches(indices: np.ndarray) -> Iterator[ScoredBatch]:
        for batch in score_batches(prepared, images.select(indices.tolist()), runtime):
            kept.add(indices[batch.positions].tolist(), batch.scores, batch.predictions)
            yield batch

    nothing = no_scores(prepared.backends, len(images.label_set.classes))
    with run.stage("evaluate"):
        scores = run.saved_per_image(IMAGES, np.arange(len(images)), nothing, batches, write).scores
    run.notes += scoring_notes(scores)
    return scores


def scoring_notes(scores: Scores) -> list[str]:
    """Return notes on missing labels and on backoff."""
    notes = []
    if not any(matrices.any() for matrices in scores.confusion_matrices.values()):
        notes.append(
            "There is no mIoU, because no pixel has the label of a class that is scored. For example, the labels of "
            "Cityscapes' test split are not published."
        )
    if scores.batch_size:
        notes.append(f"The GPU ran out of memory: the last batches had {count(scores.batch_size, 'image')}.")
    return notes


def measure_sensitivity(model: Model, inputs: Inputs, run: Run) -> Sensitivity | None:
    """Rank the quantizers on some calibration images, by the names of `layer_names`; None if no option asks for it."""
    output, images = run.config.output, inputs.calibration_images
    if not output.sensitivity or images is None:
        return None
    indices = evenly_spaced(len(images), output.sensitivity_images).tolist()
    batches = [normalize(images[index][0][None].to(run.runtime.device)) for index in indices]
    network, quiet = model.network, run.runtime.quiet
    found = analyze_sensitivity(network.sim, network.float_network, network.lowered, batches, not quiet)
    names = layer_names(model.checkpoint.model, network.sim)
    return replace(found, rows=[replace(row, layer=names[row.layer]) for row in found.rows])


def onnx_runtime_notes(
    network: QuantizedNetwork, backends: Mapping[str, Backend], images: Split, scores: Scores, layers: Comparison
) -> list[str]:
    """Return notes on ONNX Runtime's integer kernels and, if it differs from the simulation, on where.

    `layers` may be empty; then the first image is compared.
    """
    executed_name = network.names.of(ONNX_RUNTIME)
    backend = backends.get(ONNX_RUNTIME)
    if not isinstance(backend, OnnxBackend):
        return []
    notes = [f"{executed_name}: {line}" for line in inspect_onnx(backend.path).kernel_lines()]
    matrices = (scores.confusion_matrices[name] for name in (SIMULATED, ONNX_RUNTIME))
    simulated, executed = (statistics(each).labelled_miou.value for each in matrices)
    agreement = scores.agreement(SIMULATED, ONNX_RUNTIME)
    if not differ((simulated, executed), agreement):
        return notes
    if not layers:
        image = normalize(images[0][0][None])
        layers = compare_layers(network.lowered, quantizer_sites(network.sim), backend.path, [image])
    return [
        *notes,
        f"{executed_name} is far from {network.names.of(SIMULATED)}: {executed:.2f} and {simulated:.2f} mIoU, "
        f"prediction agreement {agreement:.2f} %. {describe_divergence(layers, executed_name)}",
    ]


def differ(mious: tuple[float, float], agreement: float) -> bool:
    """Return whether two backends that should agree differ by more than MIOU_TOLERANCE or agree on too few pixels."""
    both_nan = mious[0] != mious[0] and mious[1] != mious[1]
    return not (both_nan or abs(mious[0] - mious[1]) <= MIOU_TOLERANCE) or agreement < LEAST_AGREEMENT
