"""Evaluate some of the images on the NPU, whose emulation takes seconds to minutes per image.

Qualcomm's library runs in separate processes, because it may crash. Whatever ends the evaluation, the finished images
and all other results are saved.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets import Split
from ffnet.chips import CHIPS
from ffnet.evaluation.compilation import PreparedBackends
from ffnet.evaluation.loading import every_nth, normalize
from ffnet.evaluation.loop import ScoredBatch, score_batches
from ffnet.evaluation.scores import NPU, Shard, no_scores
from ffnet.npu.backend import NpuBackend, open_on_npu
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.divergence import Execute, compare_layers, describe_divergence
from ffnet.onnx.input_format import NORMALIZED_RGB, InputFormat
from ffnet.quantization.layers import Comparison
from ffnet.quantization.quantize import QuantizedNetwork
from ffnet.quantization.sites import quantizer_sites
from ffnet.results import result as results
from ffnet.results.published import ImageSetup, ai_hub_notes, ai_hub_result_on, compare_with_ai_hub
from ffnet.results.result import ChipResult, NpuResult
from ffnet.run.layers import compared_images, normalized
from ffnet.run.networks import calibration_setup
from ffnet.run.session import Run
from ffnet.run.storage import NPU_IMAGES
from ffnet.system.errors import UserError

MAX_PROCESSES = 16  # processes that run images at the same time; one takes about 0.4 GB for a large network


@dataclass(frozen=True)
class NpuOutcome:
    """What the NPU computed before the end or a failure."""

    results: tuple[NpuResult, ...] = ()  # one for each group of chips with a finished image
    chips: tuple[ChipResult, ...] = ()
    layers: Mapping[str, Comparison] = field(default_factory=dict)  # chip of a result -> layers
    failure: BaseException | None = None
    scores: Mapping[str, Shard] = field(default_factory=dict)  # kind of records -> scores of a result


@dataclass(frozen=True)
class NpuFile:
    """A file that at least one of the run's chips takes."""

    path: Path
    input_format: InputFormat
    chips: tuple[ChipResult, ...]

    @property
    def groups(self) -> list[list[ChipResult]]:
        """The chips that take the file; those of a group computed the same logits, and the first stands for all."""
        found: dict[str | None, list[ChipResult]] = {}
        for chip in self.chips:
            if chip.error is None:
                found.setdefault(chip.logits, []).append(chip)
        return list(found.values())


def open_npu(path: Path, images: Split, run: Run, input_format: InputFormat = NORMALIZED_RGB) -> NpuFile:
    """Compile a file for the run's chips, run the first image on several; raise a UserError if none takes it."""
    with run.stage("compile for the NPU"):
        chips = run.once(_check_chips, path, images, run, input_format)
    errors = [chip.error for chip in chips if chip.error]
    if len(errors) == len(chips):
        raise UserError(f"--npu: none of {len(chips)} chips takes the file. {errors[0]}" if errors[1:] else errors[0])
    return NpuFile(path, input_format, chips)


def _check_chips(path: Path, images: Split, run: Run, input_format: InputFormat) -> tuple[ChipResult, ...]:
    """Return what every chip makes of a file; what an earlier run saved is not repeated."""
    chips, storage = run.config.npu.chips, run.storage
    found = storage.load_chips() if storage else {}
    image = normalize(images[0][0][None]) if len(chips) > 1 else None
    for part in tqdm(chips, "compile for chips", unit="chip", disable=run.runtime.quiet or image is None):
        if part not in found:
            found[part] = _check_chip(part, path, run, input_format, image)
            if storage:
                storage.save_chips({chip: row for chip, row in found.items() if row.refused or not row.error})
    return tuple(found[part] for part in chips)


def _check_chip(part: str, path: Path, run: Run, input_format: InputFormat, image: torch.Tensor | None) -> ChipResult:
    """Return what one chip makes of a file, beside what Qualcomm AI Hub published for the chip."""
    found = ai_hub_result_on(part, run.config)
    chip = ChipResult(part, found.describe_latency(), found.measured_change) if found else ChipResult(part)
    try:
        with NpuBackend(NpuTarget(path, CHIPS[part], run.config.npu.fallback), input_format=input_format) as backend:
            logits = None if image is None else hashlib.sha256(backend(image).numpy().tobytes()).hexdigest()
            session = backend.session
    except UserError as error:
        message = str(error).replace(str(path), path.name)  # the folder may be temporary
        return replace(chip, error=message, refused=getattr(error, "nodes", []))
    return replace(chip, cpu_nodes=list(session.cpu_nodes), hardware=session.hardware, logits=logits)


def run_on_npu(
    file: NpuFile, prepared: PreparedBackends, images: Split, run: Run, network: QuantizedNetwork | None = None
) -> NpuOutcome:
    """Score the NPU beside the other backends and, if `network` is given, compare its layers with the simulation's.

    One chip of each group runs the images.
    """
    with run.stage("evaluate on the NPU"):
        outcome = evaluate_on_npu(file, prepared, images, run, network)
    compared = compared_images(images, run)
    if not outcome.results or outcome.failure or network is None or not len(compared):
        return outcome
    with run.stage("compare layers with the NPU"):
        outcome = run.once(_with_layers, outcome, file, network, compared, run)
    for chip, layers in outcome.layers.items():
        name = network.names.of(NPU) if len(outcome.layers) == 1 else f"{network.names.of(NPU)}, {chip}"
        run.notes.append(describe_divergence(layers, name))
    return outcome


def _with_layers(outcome: NpuOutcome, file: NpuFile, network: QuantizedNetwork, images: Split, run: Run) -> NpuOutcome:
    """Return an outcome with the divergence of the layers, or with the error that prevented the comparison."""
    layers: dict[str, Comparison] = {}
    failure: BaseException | None = None
    try:
        for result in outcome.results:
            target = NpuTarget(file.path, CHIPS[result.chip], run.config.npu.fallback)
            layers[result.chip] = compare_with_npu(target, network, normalized(images))
    except KeyboardInterrupt as interrupt:
        failure = interrupt
    except Exception as error:
        failure = UserError(f"The layers of {network.names.of(NPU)} could not be compared: {error}")
    return replace(outcome, layers=layers, failure=failure)


def evaluate_on_npu(
    file: NpuFile, prepared: PreparedBackends, images: Split, run: Run, network: QuantizedNetwork | None
) -> NpuOutcome:
    """Score all backends and the first chip of each group on the same images, every n-th of those that are scored.

    The other backends predict these images again, which takes little time beside the NPU's, so that no predictions need
    to be saved.
    """
    indices, groups = every_nth(len(images), run.config.npu.images), file.groups
    name = (network.names if network else run.names).of(NPU)
    missing = sum(len(run.missing(NPU_IMAGES.format(group[0].chip), indices)) for group in groups)
    several = len(groups) > 1  # otherwise the evaluation loop has a progress bar
    title = f"evaluate {name}, {len(groups)} groups of chips"
    results, failures, scores = [], [], {}
    with tqdm(total=missing, desc=title, unit="image", disable=run.runtime.quiet or not several) as bar:
        for group in groups:
            shard, failure = _score_chip(group[0].chip, file, prepared, images, run, name, bar)
            failures += [failure] if failure else []
            if shard.scores.images:
                result, notes = npu_result(group, shard, images, run, network)
                results.append(result)
                scores[NPU_IMAGES.format(result.chip)] = shard
                run.notes += [f"{name}{f', {result.chip}' if several else ''}: {result.describe()}", *notes]
            if isinstance(failure, KeyboardInterrupt):
                break
    run.notes += ai_hub_notes(run.config) if results else []
    return NpuOutcome(tuple(results), file.chips, failure=next(iter(failures), None), scores=scores)


def _score_chip(
    part: str, file: NpuFile, prepared: PreparedBackends, images: Split, run: Run, name: str, bar: tqdm
) -> tuple[Shard, BaseException | None]:
    """Return the scores with one chip, and what ended the evaluation early."""
    failures: list[BaseException] = []

    def batches(own: np.ndarray) -> Iterator[ScoredBatch]:
        target = NpuTarget(file.path, CHIPS[part], run.config.npu.fallback)
        try:
            if not len(own):
                return
            with NpuBackend(target, _processes(len(own)), file.input_format) as backend:
                both = replace(prepared, backends={**prepared.backends, NPU: backend})
                quiet = run.runtime.quiet or not bar.disable
                runtime = replace(run.runtime, batch_size=len(backend.processes), num_workers=0, quiet=quiet)
                for batch in score_batches(both, images.select(own.tolist()), runtime, f"evaluate {name}"):
                    yield batch
                    bar.update(batch.scores.images)
        except KeyboardInterrupt as interrupt:
            failures.append(interrupt)
        except Exception as error:
            failures.append(UserError(f"The other results are complete, but {name} is not: {error}"))

    indices = every_nth(len(images), run.config.npu.images)
    nothing = no_scores((*prepared.backends, NPU), len(images.label_set.classes))
    shard = run.saved_per_image(NPU_IMAGES.format(part), indices, nothing, batches)
    failure = next((each for found in run.ranks.all_gather(failures) for each in found), None)
    if (unsaved := shard.scores.unsaved) and not failure:
        failure = UserError(f"{unsaved}. The images of {name} from this one on are not saved for --resume.")
    return shard, failure


def _processes(images: int) -> int:
    return min(torch.get_num_threads(), MAX_PROCESSES, images)


def npu_result(
    group: Sequence[ChipResult], shard: Shard, images: Split, run: Run, network: QuantizedNetwork | None
) -> tuple[NpuResult, Sequence[str]]:
    """Return the result of a group of chips on the images that the first one ran, and notes on published values."""
    first, chip, config, scores = group[0], CHIPS[group[0].chip], run.config, shard.scores
    names, requested = network.names if network else run.names, len(every_nth(len(images), config.npu.images))
    setup = ImageSetup(config.data.split, scores.images, images.size)
    calibration = calibration_setup(network.found, config) if network else None
    published = compare_with_ai_hub(config, [each.chip for each in group], setup, len(images), calibration)
    result = NpuResult(
        chip=chip.part,
        same_chips=[other.chip for other in group[1:]],
        name=chip.name,
        soc_model=chip.soc_model,
        architecture=chip.architecture,
        hardware=first.hardware,
        version=importlib.metadata.version("onnxruntime-qnn"),
        processes=1 if first.hardware else _processes(requested) * run.ranks.world_size,
        cpu_nodes=first.cpu_nodes,
        requested_images=requested,
        images=images.select(shard.indices.tolist()).names,
        classes=results.class_counts(scores, images.label_set),
        backends=results.backend_results(scores, names, images.label_set.names),
        agreement=results.agreement(scores, names),
        published=dict(published.mious),
    )
    return result, published.notes


def compare_with_npu(target: NpuTarget, network: QuantizedNetwork, images: Iterable[torch.Tensor]) -> Comparison:
    """Compare each quantized activation of the NPU with the simulation's on normalized images."""

    def open_file(file: Path) -> AbstractContextManager[Execute]:
        # The NPU refuses to transpose some of the integers that become outputs; the CPU may.
        return open_on_npu(replace(target, path=file, fallback=True))

    return compare_layers(network.lowered, quantizer_sites(network.sim), target.path, images, open_file)
