"""Measure on a GPU how fast the backends, the stages of scoring and the whole program are.

    python -m benchmarks.cuda [--minutes M] [--model-name NAME] [--images N]

Rows are printed as soon as they are measured; what a table compares is measured alternately, medians over the rounds.
If the time runs out, the remaining rows are left out, and a line says so. The weights are random; a few scenes are
rendered, and N links to them make up a data set. Linux only.
"""

import contextlib
import copy
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accounting import run_once
from benchmarks.inputs import first_image, option_parser, random_model, write_checkpoint, write_images
from benchmarks.timing import markdown, markdown_row, measure_alternately, medians, synchronized_clock
from datasets.cityscapes import CityscapesSplit
from ffnet.config import FLOAT_MODEL_FILE, MODEL_FILE, Runtime
from ffnet.evaluation.loading import load_batches, normalize
from ffnet.evaluation.postprocessing import agreeing_pixels, confusion_matrices, predict
from ffnet.evaluation.scores import FP32, ONNX_RUNTIME, SIMULATED
from ffnet.labels import CITYSCAPES
from ffnet.model import FFNet
from ffnet.onnx.export import export
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantize import QuantizedNetwork, quantize
from ffnet.quantization.weighted_layers import multiply_accumulates
from ffnet.variants import DEFAULT_MODEL, INPUT_SIZE

DEVICE = "cuda:0"
CLASSES = len(CITYSCAPES.classes)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SCENES = 4  # number of different images
SCORING_BATCH_SIZE = 8  # the program's default
ROUNDS, ROUND_SECONDS = 5, 0.2
LEAST_SECONDS = 30  # with less time left, no row is measured
PROGRAM_SECONDS = 150  # time that the tables before the last leave to the runs of the program
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
EAGER = (  # TF32, memory format, compiled
    (False, CONTIGUOUS, False),
    (True, CHANNELS_LAST, False),
    (False, CHANNELS_LAST, False),
    (True, CONTIGUOUS, False),
)
COMPILED = ((False, CONTIGUOUS, True), (True, CHANNELS_LAST, True))
SPEED_COLUMNS = ("per image, ms", "images/s", "TFLOP/s")

Call = Callable[[], Any]
Row = Sequence[str]


@dataclass(frozen=True)
class Bench:
    """The images and networks that are measured, each created when it is first needed."""

    name: str
    images: CityscapesSplit
    folder: Path  # for files

    @functools.cached_property
    def model(self) -> FFNet:
        """The float network with random weights."""
        return random_model(self.name).to(DEVICE)

    @functools.cached_property
    def quantized(self) -> QuantizedNetwork:
        """The quantized network, calibrated on one image."""
        return quantize(self.model, self.images.select([0]), runtime=Runtime(DEVICE, batch_size=1, quiet=True))

    @functools.cached_property
    def operations(self) -> int:
        """Floating-point operations of the network per image."""
        return 2 * sum(multiply_accumulates(random_model(self.name), INPUT_SIZE).values())

    def inputs(self, batch_size: int) -> torch.Tensor:
        """Return copies of the first image, normalized (batch_size, 3, H, W) float32, on the GPU."""
        return first_image(self.images, DEVICE).repeat(batch_size, 1, 1, 1)

    def speed_cells(self, seconds: float) -> Row:
        """Return the cells of SPEED_COLUMNS for the seconds per image."""
        return f"{1e3 * seconds:.2f}", f"{1 / seconds:.1f}", f"{self.operations / seconds / 1e12:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print all tables and return the exit status."""
    parser = option_parser("cuda", __doc__, DEFAULT_MODEL)
    parser.add_argument("--minutes", type=float, default=5.5, help="time limit; default %(default)s")
    parser.add_argument("--images", type=int, default=500, help="for the program; default %(default)s")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.cuda: torch finds no CUDA device. Run it on a machine with a GPU.", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        bench = Bench(args.model_name, write_images(folder / "images", args.images, scenes=SCENES), folder)
        print(describe(bench), flush=True)
        print_table("Backends", measure_backends(bench), end - PROGRAM_SECONDS)
        print_table("TF32 and layout", measure_executions(bench, EAGER), end - PROGRAM_SECONDS)
        print_table("Stages of scoring", measure_scoring(bench), end - PROGRAM_SECONDS)
        print_table("Compiled", measure_executions(bench, COMPILED), end - PROGRAM_SECONDS)
        print_table("ONNX Runtime on the CPU", measure_onnx(bench), end - PROGRAM_SECONDS)
        torch.cuda.empty_cache()  # the program needs the memory
        print_table("The whole program", measure_programs(bench), end)
    return 0


def describe(bench: Bench) -> str:
    """Return lines about the machine and the network."""
    gpu = torch.cuda.get_device_properties(DEVICE)
    return (
        f"{gpu.name}; {gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 1e9:.0f} GB; CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; torch {torch.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} CPU cores\n"
        f"{bench.name}, 1024x2048: {bench.operations / 2e9:.1f} GMAC per image"
    )


def print_table(title: str, rows: Iterator[Row], end: float) -> None:
    """Print rows as they come, the first of which is the heading, while enough time is left.

    An error is printed in one line, so that the other tables are still measured.
    """
    print(f"\n#### {title}\n")
    print("\n".join(markdown([next(rows)])), flush=True)
    try:
        while time.monotonic() < end - LEAST_SECONDS:
            print(markdown_row(next(rows)), flush=True)
        print("\nStopped: too little time is left. Give more --minutes.")
    except StopIteration:
        return
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"\nFailed: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")


def median_seconds(calls: Mapping[Any, Call]) -> dict[Any, float]:
    """Return the median seconds of each call, measured alternately."""
    return medians(measure_alternately(calls, ROUNDS, lambda: synchronized_clock(DEVICE), ROUND_SECONDS))


def measure_backends(bench: Bench) -> Iterator[Row]:
    """Yield the speed of every backend, eager and in strict FP32, at every batch size."""
    yield "backend", "batch size", *SPEED_COLUMNS
    quantized = bench.quantized
    networks = {FP32: bench.model, SIMULATED: quantized.lowered, "AIMET's simulation": quantized.sim.model}
    for batch_size in BATCH_SIZES:
        inputs = bench.inputs(batch_size)
        calls = {name: functools.partial(network, inputs) for name, network in networks.items()}
        for name, seconds in median_seconds(calls).items():
            yield name, str(batch_size), *bench.speed_cells(seconds / batch_size)


def measure_executions(bench: Bench, executions: Sequence[tuple[bool, torch.memory_format, bool]]) -> Iterator[Row]:
    """Yield the speed of FP32 and of the simulation with TF32 on and off, in several layouts or compiled."""
    yield "backend", "batch size", "TF32", "layout", "mode", "first call, s", *SPEED_COLUMNS
    batch_size, calls, first = BATCH_SIZES[-1], {}, {}
    for execution in executions:
        for name, network in {FP32: bench.model, SIMULATED: bench.quantized.lowered}.items():
            call = calls[name, execution] = prepare(network, bench.inputs(batch_size), *execution)
            begin = synchronized_clock(DEVICE)
            call()
            first[name, execution] = synchronized_clock(DEVICE) - begin
    for (name, execution), seconds in median_seconds(calls).items():
        tf32, layout, compiled = execution
        options = (
            "on" if tf32 else "off",
            str(layout).removeprefix("torch.").removesuffix("_format"),
            "compiled" if compiled else "eager",
        )
        first_call = f"{first[name, execution]:.1f}"
        yield name, str(batch_size), *options, first_call, *bench.speed_cells(seconds / batch_size)


def prepare(network: nn.Module, inputs: torch.Tensor, tf32: bool, layout: torch.memory_format, compiled: bool) -> Call:
    """Return a call of a copy of a network with these settings."""
    network, inputs = copy.deepcopy(network).to(memory_format=layout), inputs.contiguous(memory_format=layout)
    network = torch.compile(network, dynamic=False) if compiled else network

    def call() -> torch.Tensor:
        # torch.compile reads the older of torch's two interfaces, and fails once the newer one was used.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        return network(inputs)

    return call


def measure_scoring(bench: Bench) -> Iterator[Row]:
    """Yield the time of every stage of scoring a batch with two backends, and of the FP32 network to compare with."""
    yield "stage", "calls per batch", "per call, ms", "per image, ms"
    runtime = Runtime(DEVICE, batch_size=SCORING_BATCH_SIZE)
    repeated = bench.images.select([index % len(bench.images) for index in range(SCORING_BATCH_SIZE)])
    with contextlib.closing(load_batches(repeated, runtime)) as batches:
        batch = next(batches)
    images, labels = (tensor.to(DEVICE) for tensor in batch)
    inputs = normalize(images)
    logits = bench.model(inputs)
    ids = predict(logits, labels.shape[1:])
    others = ids.clone()
    calls: dict[tuple[str, int], Call] = {
        ("copy to the device", 1): lambda: [tensor.to(DEVICE, non_blocking=True) for tensor in batch],
        ("normalize", 1): lambda: normalize(images),
        (f"network, {FP32}", 1): lambda: bench.model(inputs),
        ("check that logits are finite", 2): lambda: bool(logits.sum().isfinite()),
        ("upsample and argmax", 2): lambda: predict(logits, labels.shape[1:]),
        ("confusion matrices", 2): lambda: confusion_matrices(labels, ids, CLASSES),
        ("prediction agreement", 1): lambda: agreeing_pixels(ids, others),
    }
    for (name, number), seconds in median_seconds(calls).items():
        yield name, str(number), f"{1e3 * seconds:.3f}", f"{1e3 * number * seconds / SCORING_BATCH_SIZE:.3f}"


def measure_onnx(bench: Bench) -> Iterator[Row]:
    """Yield the speed of the exported files in ONNX Runtime on the CPU, one image at a time."""
    yield "backend", "batch size", *SPEED_COLUMNS
    exported = export(bench.quantized.sim, INPUT_SIZE, bench.folder / "onnx", {})
    files = {ONNX_RUNTIME: MODEL_FILE, "FP32 ONNX Runtime": FLOAT_MODEL_FILE}
    image = bench.inputs(1).cpu()
    calls = {name: functools.partial(OnnxBackend(exported / file), image) for name, file in files.items()}
    for name, seconds in median_seconds(calls).items():
        yield name, "1", *bench.speed_cells(seconds)


def measure_programs(bench: Bench) -> Iterator[Row]:
    """Yield where the time of whole runs goes, calibrated on all images, in strict FP32 and with TF32."""
    yield "what", "strict FP32, s", "--allow-tf32, s"
    options: list[str | Path] = ["--dataset-path", bench.images.root, "--model-name", bench.name, "--use-cuda", "true"]
    options += ["--checkpoint", write_checkpoint(bench.name, bench.folder / "weights.pth")]
    runs = run_once(options), run_once([*options, "--allow-tf32"])
    for name in dict.fromkeys([*runs[0], *runs[1]]):
        yield name, *(f"{run.get(name, 0.0):.2f}" for run in runs)


if __name__ == "__main__":
    sys.exit(main())
