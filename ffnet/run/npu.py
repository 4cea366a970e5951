"""Evaluate on the NPU: some of the images, because each takes long, and in processes of their own, which may crash.

Whatever ends it, the images that were done and all other results are kept.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import fx
from torch.utils.data import Subset

from datasets.cityscapes import CityscapesSplit, image_name
from ffnet.chips import CHIPS
from ffnet.config import Config
from ffnet.evaluation.backends import FP32, INT8_NPU
from ffnet.evaluation.compilation import PreparedBackends
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.loop import score_batches
from ffnet.evaluation.scores import Scores, merge_shards
from ffnet.npu.backend import NpuBackend, run_once
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.divergence import LayerDivergence, compare_layers, first_divergence, largest_divergence
from ffnet.onnx.input_format import NORMALIZED_RGB, InputFormat
from ffnet.quantization.sites import QuantizerSite
from ffnet.results import ai_hub
from ffnet.results import result as results
from ffnet.results.published import (
    Comparison,
    ImageSetup,
    PublishedResults,
    QuantizationSetup,
    compare_with_published,
    quantization_setup,
)
from ffnet.results.result import NpuResult
from ffnet.run.records import ScoreCollector
from ffnet.run.session import Run
from ffnet.run.storage import NPU
from ffnet.system.errors import UserError

MAX_PROCESSES = 16  # that run images at the same time; one takes about 0.4 GB for a large network


@dataclass(frozen=True)
class NpuOutcome:
    """What the NPU computed before the end or a failure."""

    result: NpuResult | None = None  # None if no image was finished, and in processes that are not the main one
    layers: tuple[LayerDivergence, ...] = ()
    failure: BaseException | None = None


def open_npu(path: Path, run: Run, input_format: InputFormat = NORMALIZED_RGB) -> NpuBackend:
    """Compile a file for the chip that the run names, in one process; raise a UserError if that is impossible.

    The other processes start when the NPU's turn comes: those of several models at once would fill the memory.
    """
    npu = run.config.npu
    target = NpuTarget(path, CHIPS[str(npu.chip)], npu.fallback)
    with run.stage("compile for the NPU"):
        return run.keep(NpuBackend(target, input_format=input_format))


def run_on_npu(
    backend: NpuBackend,
    prepared: PreparedBackends,
    images: CityscapesSplit,
    run: Run,
    simulated: tuple[fx.GraphModule, Sequence[QuantizerSite]] | None = None,
) -> NpuOutcome:
    """Score the NPU beside the other backends and, if `simulated` is given, compare its layers with the simulation's.

    `simulated`: the lowered simulation, and its quantizer sites.
    """
    with run.stage("evaluate on the NPU"):
        outcome = evaluate_on_npu(backend, prepared, images, run)
    backend.close()
    if outcome.result is None or outcome.failure or simulated is None:
        return outcome
    try:
        with run.stage("compare layers with the NPU"):
            layers = compare_with_npu(backend.target, *simulated, images)
    except KeyboardInterrupt as interrupt:
        return replace(outcome, failure=interrupt)
    except Exception as error:
        return replace(outcome, failure=UserError(f"The layers of {INT8_NPU} could not be compared: {error}"))
    run.notes += divergence_notes(layers)
    return replace(outcome, layers=tuple(layers))


def evaluate_on_npu(backend: NpuBackend, prepared: PreparedBackends, images: CityscapesSplit, run: Run) -> NpuOutcome:
    """Score all backends and the NPU on the same images, spread evenly over the split.

    The other backends predict these images again, which takes little time beside the NPU's, so that no predictions need
    to be kept. Every rank takes its share of the images that no earlier run has kept; the main process returns the
    results of all.
    """
    indices = evenly_spaced(len(images), run.config.npu.images)
    own = run.ranks.share_of(run.progress.remaining(NPU, indices))
    both = replace(prepared, backends={**prepared.backends, INT8_NPU: backend})
    failure: BaseException | None = None
    with run.progress.records(NPU) as records:
        collector = ScoreCollector(both.backends, records)
        try:
            backend.start_processes(min(torch.get_num_threads(), MAX_PROCESSES, max(1, len(own))))
            runtime = replace(run.runtime, batch_size=len(backend.processes), num_workers=0)
            title = f"evaluate {INT8_NPU}"
            for batch in score_batches([both], Subset(images, own.tolist()), runtime, title):
                collector.add(own[batch.positions], batch)
        except KeyboardInterrupt as interrupt:
            failure = interrupt
        except Exception as error:
            failure = UserError(f"The other results are complete, but {INT8_NPU} is not: {error}")
    shards = run.ranks.gather((collector.shard(), failure))
    if shards is None:
        return NpuOutcome()
    shard = run.progress.with_earlier(NPU, merge_shards([shard for shard, _ in shards]))
    merged = shard.scores
    failure = next((failure for _, failure in shards if failure), None)
    if merged.unsaved and not failure:
        failure = UserError(f"{merged.unsaved}. The images of {INT8_NPU} from this one on are not kept for --resume.")
    if not merged.images:
        return NpuOutcome(failure=failure)
    setup = ImageSetup(run.config.data.split, merged.images, (images.height, images.width))
    published = compare_with_ai_hub(run.config, setup)
    names = [image_name(images.images[index]) for index in shard.indices]
    result = npu_result(backend, run.ranks.world_size, merged, names, len(indices), published)
    run.notes += [f"{INT8_NPU}: {result.describe()}", *published.notes, *ai_hub_notes(run.config)]
    return NpuOutcome(result, failure=failure)


def npu_result(
    backend: NpuBackend, ranks: int, scores: Scores, names: list[str], requested_images: int, published: Comparison
) -> NpuResult:
    """Return the result of the NPU on the images with these names; `ranks`: how many have such a backend."""
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
        images=names,
        backends=results.backend_results(scores),
        agreement=results.agreement(scores),
        published=dict(published.mious),
    )


def compare_with_npu(
    target: NpuTarget, lowered: fx.GraphModule, sites: Sequence[QuantizerSite], images: CityscapesSplit
) -> list[LayerDivergence]:
    """Return how far each quantized activation of the NPU is from the simulation's on the first image."""

    def execute(file: Path, image: np.ndarray) -> dict[str, np.ndarray]:
        # The NPU refuses to transpose some of the integers that become outputs; the CPU may.
        return run_once(replace(target, path=file, fallback=True), image)

    return compare_layers(lowered, sites, target.path, normalize(images[0][0][None]), execute)


def compare_with_ai_hub(config: Config, images: ImageSetup) -> Comparison:
    """Return the mIoU that Qualcomm AI Hub published and that is comparable with the run's, and a note if it is not.

    AI Hub does not say which images it used and how it calibrated: number and size of the images and bit widths are
    compared. It published the mIoU on a Galaxy S25 only.
    """
    results = ai_hub.galaxy_s25(config.model.name)
    if results is None or config.npu.chip != ai_hub.GALAXY_S25 or config.model.onnx or config.data.demo:
        return Comparison()
    height, width = results.input_size
    published = PublishedResults(
        {FP32: results.float_miou, INT8_NPU: results.w8a8_miou.onnx},
        ImageSetup("val", ai_hub.MIOU_IMAGES, results.input_size),
        QuantizationSetup(8, 8, from_file=False),
        f"{ai_hub.SOURCE}: mIoU of this model on {results.device} by ONNX",
        f"on {ai_hub.MIOU_IMAGES} images of {height}x{width} pixels",
    )
    return compare_with_published(published, images, quantization_setup(config))


def ai_hub_notes(config: Config) -> list[str]:
    """Return a note on what Qualcomm AI Hub published for the same model and chip, if it did."""
    published = ai_hub.RESULTS.get(config.model.name)
    latency = published and published.latency.get(str(config.npu.chip))
    if published is None or latency is None or config.model.onnx:
        return []
    times = "/".join("-" if value is None else f"{value:g}" for value in dataclasses.astuple(latency))
    height, width = published.input_size
    return [
        f"{ai_hub.SOURCE}: latency of this model, W8A8 at {height}x{width}, on {ai_hub.DEVICES[str(config.npu.chip)]} "
        f"by TFLite/DLC/ONNX: {times} ms. An emulation tells nothing about latency."
    ]


def divergence_notes(layers: Sequence[LayerDivergence]) -> list[str]:
    """Return notes that name the first layer of divergence, and the one that adds most to it."""
    first, largest = first_divergence(layers), largest_divergence(layers)
    if first is None or largest is None:
        return [f"{INT8_NPU}: on the first image, all quantized values are those of the simulation."]
    differences = [
        f"{100 * layer.own.differing:.2f} % of its values differ for the same input, by "
        f"{layer.own.mean_steps:.4f} quantization steps on average and at most {layer.own.largest_steps}"
        for layer in (first, largest)
    ]
    return [
        f"{INT8_NPU}: on the first image, the first layer of divergence from the simulation is {first.layer} "
        f"({differences[0]}), and {largest.layer} adds most ({differences[1]})."
    ]
