"""Evaluate some of the images on the NPU, whose emulation takes seconds to minutes per image.

Qualcomm's library runs in separate processes, because it may crash. Whatever ends the evaluation, the finished images
and all other results are saved.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from datasets import Split
from ffnet.chips import CHIPS
from ffnet.evaluation.compilation import PreparedBackends
from ffnet.evaluation.loading import every_nth, normalize
from ffnet.evaluation.loop import ScoredBatch, score_batches
from ffnet.evaluation.scores import NPU, BackendNames, Scores, no_scores
from ffnet.npu.backend import NpuBackend, run_once
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.divergence import LayerDivergence, compare_layers, first_divergence, largest_divergence
from ffnet.onnx.input_format import NORMALIZED_RGB, InputFormat
from ffnet.quantization.quantize import QuantizedNetwork
from ffnet.quantization.sites import quantizer_sites
from ffnet.results import result as results
from ffnet.results.published import Comparison, ImageSetup, ai_hub_notes, compare_with_ai_hub
from ffnet.results.result import NpuResult
from ffnet.run.networks import calibration_setup
from ffnet.run.session import Run
from ffnet.run.storage import NPU_IMAGES
from ffnet.system.errors import UserError

MAX_PROCESSES = 16  # processes that run images at the same time; one takes about 0.4 GB for a large network


@dataclass(frozen=True)
class NpuOutcome:
    """What the NPU computed before the end or a failure."""

    result: NpuResult | None = None  # None if no image was finished
    layers: tuple[LayerDivergence, ...] = ()
    failure: BaseException | None = None


def open_npu(path: Path, run: Run, input_format: InputFormat = NORMALIZED_RGB) -> NpuBackend:
    """Compile a file for the chip that the run names, in one process; raise a UserError if that is impossible."""
    npu = run.config.npu
    target = NpuTarget(path, CHIPS[str(npu.chip)], npu.fallback)
    with run.stage("compile for the NPU"):
        return run.enter_context(NpuBackend(target, input_format=input_format))


def run_on_npu(
    backend: NpuBackend,
    prepared: PreparedBackends,
    images: Split,
    run: Run,
    network: QuantizedNetwork | None = None,
) -> NpuOutcome:
    """Score the NPU beside the other backends and, if `network` is given, compare its layers with the simulation's."""
    with run.stage("evaluate on the NPU"):
        outcome = evaluate_on_npu(backend, prepared, images, run, network)
    backend.close()
    if outcome.result is None or outcome.failure or network is None:
        return outcome
    with run.stage("compare layers with the NPU"):
        outcome = run.once(_with_layers, outcome, backend.target, network, images)
    run.notes += [] if outcome.failure else divergence_notes(outcome.layers, network.names.of(NPU))
    return outcome


def _with_layers(outcome: NpuOutcome, target: NpuTarget, network: QuantizedNetwork, images: Split) -> NpuOutcome:
    """Return an outcome with the divergence of the layers, or with the error that prevented the comparison."""
    try:
        return replace(outcome, layers=tuple(compare_with_npu(target, network, images)))
    except KeyboardInterrupt as interrupt:
        return replace(outcome, failure=interrupt)
    except Exception as error:
        return replace(
            outcome, failure=UserError(f"The layers of {network.names.of(NPU)} could not be compared: {error}")
        )


def evaluate_on_npu(
    backend: NpuBackend,
    prepared: PreparedBackends,
    images: Split,
    run: Run,
    network: QuantizedNetwork | None,
) -> NpuOutcome:
    """Score all backends and the NPU on the same images, every n-th of those that are scored.

    The other backends predict these images again, which takes little time beside the NPU's, so that no predictions need
    to be saved.
    """
    indices = every_nth(len(images), run.config.npu.images)
    backend_names = network.names if network else BackendNames("")
    name = backend_names.of(NPU)
    both = replace(prepared, backends={**prepared.backends, NPU: backend})
    failures: list[BaseException] = []

    def batches(own: np.ndarray) -> Iterator[ScoredBatch]:
        try:
            backend.start_processes(min(torch.get_num_threads(), MAX_PROCESSES, max(1, len(own))))
            runtime = replace(run.runtime, batch_size=len(backend.processes), num_workers=0)
            yield from score_batches(both, images.select(own.tolist()), runtime, f"evaluate {name}")
        except KeyboardInterrupt as interrupt:
            failures.append(interrupt)
        except Exception as error:
            failures.append(UserError(f"The other results are complete, but {name} is not: {error}"))

    shard = run.saved_per_image(NPU_IMAGES, indices, no_scores(both.backends, len(images.label_set.classes)), batches)
    failure = next((each for found in run.ranks.all_gather(failures) for each in found), None)
    scores = shard.scores
    if scores.unsaved and not failure:
        failure = UserError(f"{scores.unsaved}. The images of {name} from this one on are not saved for --resume.")
    if not scores.images:
        return NpuOutcome(failure=failure)
    setup = ImageSetup(run.config.data.split, scores.images, images.size)
    calibration = calibration_setup(network.found, run.config) if network else None
    published = compare_with_ai_hub(run.config, setup, len(images), calibration)
    ran = images.select(shard.indices.tolist())
    result = npu_result(backend, run.ranks.world_size, scores, ran, len(indices), published, backend_names)
    run.notes += [f"{name}: {result.describe()}", *published.notes, *ai_hub_notes(run.config)]
    return NpuOutcome(result, failure=failure)


def npu_result(
    backend: NpuBackend,
    ranks: int,
    scores: Scores,
    images: Split,
    requested_images: int,
    published: Comparison,
    backend_names: BackendNames,
) -> NpuResult:
    """Return the result of the NPU on the images that it ran; `ranks`: number of ranks with such a backend."""
    chip = backend.target.chip
    return NpuResult(
        chip=chip.part,
        name=chip.name,
        soc_model=chip.soc_model,
        architecture=chip.architecture,
        hardware=backend.session.hardware,
        version=importlib.metadata.version("onnxruntime-qnn"),
        processes=len(backend.processes) * ranks,
        cpu_nodes=list(backend.session.cpu_nodes),
        requested_images=requested_images,
        images=images.names,
        classes=results.class_counts(scores, images.label_set),
        backends=results.backend_results(scores, backend_names, images.label_set.names),
        agreement=results.agreement(scores, backend_names),
        published=dict(published.mious),
    )


def compare_with_npu(target: NpuTarget, network: QuantizedNetwork, images: Split) -> list[LayerDivergence]:
    """Return how far each quantized activation of the NPU is from the simulation's on the first image."""

    def execute(file: Path, image: np.ndarray) -> dict[str, np.ndarray]:
        # The NPU refuses to transpose some of the integers that become outputs; the CPU may.
        return run_once(replace(target, path=file, fallback=True), image)

    image = normalize(images[0][0][None])
    return compare_layers(network.lowered, quantizer_sites(network.sim), target.path, image, execute)


def divergence_notes(layers: Sequence[LayerDivergence], name: str) -> list[str]:
    """Return notes on the first divergent layer, and on the one that adds most to the divergence."""
    first, largest = first_divergence(layers), largest_divergence(layers)
    if first is None or largest is None:
        return [f"{name}: on the first image, all quantized values equal those of the simulation."]
    differences = [
        f"{100 * layer.own.differing:.2f} % of its values differ for the same input, by "
        f"{layer.own.mean_steps:.4f} quantization steps on average and at most {layer.own.largest_steps}"
        for layer in (first, largest)
    ]
    return [
        f"{name}: on the first image, the first layer that diverges from the simulation is {first.layer} "
        f"({differences[0]}), and {largest.layer} adds most ({differences[1]})."
    ]
