"""Evaluate an ONNX file: as it is, or a float file beside what encodings or AIMET make of it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import torch

from datasets import Split
from ffnet.config import ENCODINGS_FILE, FLOAT_MODEL_FILE, MODEL_FILE, Config, Runtime
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.scores import FP32, ONNX_FILE, ONNX_RUNTIME, Backend, BackendNames
from ffnet.onnx.aimet import quantize_with_aimet
from ffnet.onnx.input_format import InputFormat, choose_input
from ffnet.onnx.placement import Placement, bit_width, place
from ffnet.onnx.quantizers import insert_quantizers
from ffnet.onnx.reading import read_onnx
from ffnet.onnx.runtime import OnnxBackend, inspect_onnx
from ffnet.onnx.validation import describe_head
from ffnet.options import FLAGS, lookup
from ffnet.quantization.encodings_file import read_encodings
from ffnet.results.images import KeptPredictions, compare_images, worst_images
from ffnet.results.result import Diagnostics, Result
from ffnet.run.inputs import Inputs, check_classes, open_inputs
from ffnet.run.networks import describe_encodings
from ffnet.run.npu import NpuOutcome, open_npu, run_on_npu
from ffnet.run.pipeline import build_result, details_of, finished_result, mark_finished
from ffnet.run.ranks import Ranks
from ffnet.run.scoring import prepare, score
from ffnet.run.session import Run
from ffnet.system.errors import UserError
from ffnet.system.files import sha256_of
from ffnet.system.text import list_names

TRIAL_IMAGES = 4  # images, spread evenly over the scored ones, on which input formats are tried


def evaluate_onnx(config: Config, path: Path, ranks: Ranks) -> Iterator[Result]:
    """Evaluate an ONNX file on the CPU and, if requested, on the NPU; yield the only Result.

    Raises:
        UserError: If the file can't be run.
        DatasetError: If an image or a label is wrong.
    """
    with Run(config, ranks) as run:
        placement = None
        if config.quantization.encodings:
            placement = run.once(read_placement, path, config.quantization.encodings, config)
        with run.stage("open images"):
            inputs = open_inputs(config, ranks)
            run.notes += inputs.notes
            run.begin(path, sha256_of(path), inputs)
        images = inputs.images
        if run.storage and run.saved_work.finished:
            result = finished_result(run.storage.output_dir, run, images)
        else:
            result = score_onnx(path, inputs, placement, run)
        yield result
        mark_finished(run, result)


def read_placement(path: Path, encodings: Path, config: Config) -> Placement:
    """Read an encodings file, and compare it with the float file that it belongs to.

    Raises:
        UserError: If an entry is wrong, if bits differ from those that options name, or, without --partial-encodings,
            if an encoding is missing or unexpected.
    """
    file, what = read_encodings(encodings, allow_floats=True), f"--encodings {encodings}"
    if file.by_layer:
        raise UserError(f"{what}: its entries name torch modules. Give the file that AIMET wrote beside {path}.")
    placement = place(read_onnx(path), file, path)
    lists = {
        "no entry for tensors of quantized operators": placement.missing,
        "entries that name no float32 tensor": placement.unexpected,
        "entries of floats, which converters may turn into INT8": file.floats,
    }
    problems = [f"{problem}: {len(names)} ({list_names(names)})" for problem, names in lists.items() if names]
    if problems and not config.quantization.partial_encodings:
        raise UserError(
            f"{what}: the file has {' and '.join(problems)}. Give the encodings of {path}, or add --partial-encodings "
            "to leave in float what is missing and of floats, and ignore what is unexpected."
        )
    for target in config.asked_bits:
        asked, names = lookup(config, target), sorted(placement.weights)
        if target == "quantization.output_bw":
            names = placement.activations
        if others := [name for name in names if bit_width(placement.entries[name]) != asked]:
            raise UserError(
                f"{what}: {FLAGS[target]} asks for {asked} bits, and entries have others: "
                f"{len(others)} ({list_names(others)}). Remove the option, or give other encodings."
            )
    return placement


def score_onnx(path: Path, inputs: Inputs, placement: Placement | None, run: Run) -> Result:
    """Score an ONNX file on the CPU, also quantized if requested, and, if requested, on the NPU."""
    images, config = inputs.images, run.config
    with run.stage("open ONNX file"):
        model = config.model
        backend, notes = open_onnx(path, images, run.runtime, (model.onnx_input, model.onnx_channels))
    run.notes += notes
    backends: dict[str, Backend] = {ONNX_FILE: backend}
    if config.quantizes_onnx:
        with run.stage("quantize"):
            quantized, placement = _quantize(backend, placement, inputs, run)
        backends = {FP32: backend, ONNX_RUNTIME: quantized}
        backend = quantized
    npu = open_npu(backend.path, images, run, backend.input_format) if config.npu.chips else None
    prepared = prepare(backends, images, run)
    most = config.output.worst if config.output.output_dir and placement else 0
    kept = KeptPredictions(most)
    scores = score(prepared, images, run, kept)
    diagnostics = Diagnostics(placement=tuple(placement.differences()) if placement else ())
    if most:
        with run.stage("diagnose"):
            worst = worst_images(scores, most), images, images.names, backends, scores, "cpu", kept.predictions
            diagnostics = replace(diagnostics, worst_images=tuple(run.once(compare_images, *worst)))
    outcome = run_on_npu(npu, prepared, images, run) if npu else NpuOutcome()
    details = details_of(scores, images, diagnostics=diagnostics, failure=outcome.failure)
    return build_result(str(path), details, outcome, run)


def _quantize(
    backend: OnnxBackend, placement: Placement | None, inputs: Inputs, run: Run
) -> tuple[OnnxBackend, Placement]:
    """Return the quantized form of a float file, in a temporary folder, and where it is quantized."""
    folder, options, source = run.temporary_folder(), run.config.quantization, backend.path
    if placement is None:
        calibration = inputs.calibration_images or inputs.images
        written = run.once(quantize_with_aimet, backend, calibration, options, folder)
        run.notes.append(describe_encodings(run.config, len(calibration), None))
        source = written / FLOAT_MODEL_FILE
        placement = read_placement(source, written / ENCODINGS_FILE, run.config)
    else:
        run.notes.append(f"Encodings, bit widths and symmetry are those of {options.encodings}.")
    run.names = BackendNames(placement.precision)
    onnx.save(insert_quantizers(read_onnx(source), placement), folder / MODEL_FILE)
    quantized = OnnxBackend(folder / MODEL_FILE, backend.input_format)
    kernels = inspect_onnx(quantized.path).kernel_lines()
    run.notes += [*placement.notes(), *(f"{run.names.of(ONNX_RUNTIME)}: {line}" for line in kernels)]
    return quantized, placement


def open_onnx(
    path: Path, images: Split, runtime: Runtime, given: tuple[str | None, str | None] = (None, None)
) -> tuple[OnnxBackend, list[str]]:
    """Return a file as a backend that feeds it what it takes, and notes on the file.

    Args:
        path: The ONNX file.
        images: Scored images; some are used to find what the file takes, if options and metadata do not say it.
        runtime: How images are loaded.
        given: Value range and channels that options name; None for what is not given.

    Raises:
        UserError: If the file can't be run.
        DatasetError: If an image or a label is wrong.
    """
    backend = OnnxBackend(path)
    notes = inspect_onnx(path).lines()
    few = images.select(evenly_spaced(len(images), TRIAL_IMAGES).tolist())
    one_by_one = replace(runtime, batch_size=1, num_workers=0, quiet=True)

    def trial(input_format: InputFormat) -> float:
        try:
            return evaluate({ONNX_FILE: backend.with_input(input_format)}, few, one_by_one).miou(ONNX_FILE)
        except UserError:  # logits that are not finite
            return float("nan")

    _, classes, _, last = backend.header.output_shape
    if last == len(images.label_set.classes) != classes:
        raise UserError(
            f"{path}: the output of this file has its channels last. Export it with (N, classes, height, width); on AI "
            "Hub, leave out --force_channel_last_output."
        )
    check_classes(str(path), classes or 0, images.label_set)
    proto = read_onnx(path)
    chosen = choose_input(proto, given, trial)
    backend = backend.with_input(chosen)
    notes.append(chosen.describe())
    with torch.inference_mode():
        logits = backend(normalize(images[0][0][None]))
    head = describe_head(proto, backend.header.output_name)
    if head and tuple(logits.shape[2:]) not in images.sizes:
        notes.append(head)
    return backend, notes
