"""The measurements of `benchmarks.cuda`. They run on any device, so that tests need no GPU."""

import contextlib
import functools
import itertools
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.data import ConcatDataset

from benchmarks import speed
from benchmarks.program import read_stage_seconds, run_program
from datasets.cityscapes import CityscapesSplit
from ffnet.config import Runtime
from ffnet.evaluation.backends import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED, Backend
from ffnet.evaluation.loading import load_batches, normalize, synchronized_clock
from ffnet.evaluation.postprocessing import agreeing_pixels, confusion_matrices, predict
from ffnet.file_names import FLOAT_MODEL_FILE, MODEL_FILE
from ffnet.model import FFNet
from ffnet.onnx.export import export
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import quantize
from ffnet.quantization.weighted_layers import multiply_accumulates
from ffnet.run.inputs import allow_tf32
from ffnet.system.memory import is_out_of_memory

AIMET = "AIMET's simulation"  # `sim.model`, before it is lowered
ONNX_FP32 = "FP32 ONNX Runtime"
MOST_CALLS = 100  # per round
NO_ENGINE = "unable to find an engine"  # cuDNN's words if its workspace does not fit into the memory (pytorch 108645)

# Multiply-adds in FP32 per clock and multiprocessor, by compute capability: the table of the throughput of arithmetic
# instructions in the CUDA C++ Programming Guide.
FP32_MULTIPLY_ADDS = {
    (7, 0): 64,
    (7, 5): 64,
    (8, 0): 64,
    (8, 6): 128,
    (8, 9): 128,
    (9, 0): 128,
    (10, 0): 128,
    (12, 0): 128,
}
# Of the tensor cores in TF32, dense: NVIDIA's white papers on the A100 and the H100. Cards of 8.6 and 8.9 differ.
TF32_MULTIPLY_ADDS = {(8, 0): 512, (9, 0): 1024}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    device: torch.device
    model_name: str = "segmentation_ffnet78S_dBBB_mobile"
    size: tuple[int, int] = (speed.HEIGHT, speed.WIDTH)  # height, width of the images
    scenes: int = 4  # that are rendered; more images are links to them
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rounds: int = 5  # whose median is taken
    round_seconds: float = 0.2  # shortest duration of a round
    stage_batch_size: int = 8  # for the stages of scoring; the program's default
    program_images: int = 500
    programs: tuple[tuple[int | None, int], ...] = ((None, 16), (16, 16), (16, 4))  # see program_times


@dataclass(frozen=True)
class Peaks:
    """Upper bounds of a GPU's speed in FLOP/s, from its highest clock rate; None if unknown."""

    fp32: float | None = None
    tf32: float | None = None


@dataclass(frozen=True)
class Machine:
    """The device and the versions that times depend on."""

    name: str
    python: str
    torch: str
    processors: int
    cuda: str | None = None
    cudnn: int | None = None
    multiprocessors: int | None = None
    clock_hz: float | None = None  # the highest
    memory_bytes: int | None = None
    peaks: Peaks = Peaks()


@dataclass(frozen=True)
class Execution:
    """How a network is run."""

    tf32: bool = False
    channels_last: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Speed:
    """The speed of a backend, or why it was not measured."""

    backend: str
    batch_size: int
    execution: Execution = Execution()
    image_seconds: float | None = None
    compile_seconds: float | None = None  # with the first call; None if not compiled
    failure: str | None = None


@dataclass(frozen=True)
class StageTime:
    """The time of a stage of scoring, or why it was not measured."""

    stage: str
    calls: int  # per batch, with two backends
    seconds: float | None = None  # of one call
    failure: str | None = None


@dataclass(frozen=True)
class ProgramTime:
    """The wall times of a run of the program, or why it failed."""

    decoding_threads: int
    calibration_images: int | None  # None: all
    images: int
    seconds: float | None = None  # with the start of Python
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


# The first and the last are the layouts that should be the fastest in FP32 and in TF32.
EXECUTIONS = (
    Execution(tf32=False, channels_last=False),
    Execution(tf32=True, channels_last=True),
    Execution(tf32=False, channels_last=True),
    Execution(tf32=True, channels_last=False),
)


class Bench:
    """The networks and the images, each made when it is first needed, so that a failure only concerns its users."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder

    @functools.cached_property
    def images(self) -> CityscapesSplit:
        """The rendered scenes."""
        return speed.write_images(self.folder / "scenes", self.settings.scenes, self.settings.size)

    @functools.cached_property
    def model(self) -> FFNet:
        """The network in FP32 with random weights."""
        return speed.random_model(self.settings.model_name).to(self.settings.device)

    @property
    def sim(self) -> QuantizationSimModel:
        """AIMET's simulation, calibrated on one image."""
        if isinstance(self._sim, Exception):
            raise self._sim
        return self._sim

    @functools.cached_property
    def _sim(self) -> QuantizationSimModel | Exception:
        """The simulation, or why it can't be built: trying again for each row would take half a minute."""
        runtime = Runtime(self.settings.device, batch_size=1, progress=False)
        try:
            return quantize(self.model, [self.images[0]], runtime=runtime)
        except Exception as error:
            return error.with_traceback(None)  # whose frames would keep memory of the GPU

    @functools.cached_property
    def lowered(self) -> nn.Module:
        """The simulation as the program runs it."""
        return lower(self.sim)

    @functools.cached_property
    def multiply_accumulates(self) -> int:
        """Number of multiply-accumulates of the network per image."""
        network = speed.random_model(self.settings.model_name)
        return sum(multiply_accumulates(network, self.settings.size).values())

    def network(self, backend: str) -> nn.Module:
        """Return the network of a backend that torch runs."""
        if backend == FP32:
            return self.model
        return self.lowered if backend == INT8_SIMULATED else self.sim.model

    def inputs(self, batch_size: int) -> torch.Tensor:
        """Return copies of the first image, normalized (batch_size, 3, H, W) float32, on the device."""
        return speed.first_batch(self.images, self.settings.device).repeat(batch_size, 1, 1, 1)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the median time of a call over all rounds, after a warm-up."""
        clock = functools.partial(synchronized_clock, self.settings.device)
        # Timer makes calls that it does not time first, and sets the number of threads.
        timer = Timer("call()", globals={"call": call}, timer=clock, num_threads=torch.get_num_threads())
        calls = round(self.settings.round_seconds / max(timer.timeit(1).mean, 1e-9))
        calls = min(max(calls, 1), MOST_CALLS)
        return statistics.median(timer.timeit(calls).mean for _ in range(self.settings.rounds))


def describe_machine(device: torch.device) -> Machine:
    """Return what the times depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "processors": os.cpu_count() or 1}
    if device.type == "cpu":
        return Machine(speed.machine(device), **versions)
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", None)  # in kHz; not in every version of torch
    return Machine(
        properties.name,
        **versions,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        multiprocessors=properties.multi_processor_count,
        clock_hz=clock * 1e3 if clock else None,
        memory_bytes=properties.total_memory,
        peaks=peaks_of(properties),
    )


def peaks_of(properties: Any) -> Peaks:
    """Return the upper bounds of a GPU's speed; `properties`: of torch.cuda.get_device_properties."""
    clock = getattr(properties, "clock_rate", None)
    capability = properties.major, properties.minor

    def peak(multiply_adds: Mapping[tuple[int, int], int]) -> float | None:
        if not clock or capability not in multiply_adds:
            return None
        return 2 * multiply_adds[capability] * properties.multi_processor_count * clock * 1e3

    return Peaks(peak(FP32_MULTIPLY_ADDS), peak(TF32_MULTIPLY_ADDS))


def attempt(call: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return the result of a call and None; or, if it fails, None and the reason in one line."""
    try:
        return call(), None
    except Exception as error:  # whatever fails on an unknown machine, the other measurements go on
        return None, failure_reason(error)


def failure_reason(error: BaseException) -> str:
    """Return the first cause of an exception in one line of at most 150 characters."""
    while error.__cause__:  # torch.compile and torch.onnx raise errors of their own from what has happened
        error = error.__cause__
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}, see stderr"
    if is_out_of_memory(error) or NO_ENGINE in str(error):
        return "out of memory"
    first_line = str(error).strip().partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {first_line}"[:150]


def backend_speeds(bench: Bench) -> Iterator[Speed]:
    """Yield the speed of every backend, eager and in strict FP32, at every batch size up to the first that fails."""
    for backend in (FP32, INT8_SIMULATED, AIMET):
        failed = False
        for batch_size in bench.settings.batch_sizes:
            if failed:
                yield Speed(backend, batch_size, failure="left out, because a smaller batch failed")
                continue
            measured = measure_speed(bench, backend, batch_size, Execution())
            failed = measured.failure is not None
            yield measured


def execution_speeds(bench: Bench, batch_size: int, compiled: bool) -> Iterator[Speed]:
    """Yield the speed of FP32 and of the simulation with TF32 on and off, in both layouts."""
    for execution, backend in itertools.product(EXECUTIONS, (FP32, INT8_SIMULATED)):
        yield measure_speed(
            bench, backend, batch_size, Execution(execution.tf32, execution.channels_last, compiled=compiled)
        )


def measure_speed(bench: Bench, backend: str, batch_size: int, execution: Execution) -> Speed:
    """Return the speed of a backend; a failure is part of it."""
    times, failure = attempt(lambda: _time_execution(bench, backend, batch_size, execution))
    if times is None:
        release_memory(bench.settings.device)
        return Speed(backend, batch_size, execution, failure=failure)
    seconds, compile_seconds = times
    return Speed(backend, batch_size, execution, seconds / batch_size, compile_seconds)


def _time_execution(bench: Bench, backend: str, batch_size: int, execution: Execution) -> tuple[float, float | None]:
    """Return the seconds per batch and, if compiled, those of compiling with the first call."""
    allow_tf32(execution.tf32)
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    network: Backend = bench.network(backend).to(memory_format=layout)
    inputs = bench.inputs(batch_size).contiguous(memory_format=layout)
    compile_seconds = None
    if execution.compiled:
        torch._dynamo.reset()  # each is compiled anew, and none counts towards the limit of versions
        network = torch.compile(network, dynamic=False)
        begin = synchronized_clock(bench.settings.device)
        network(inputs)
        compile_seconds = synchronized_clock(bench.settings.device) - begin
    return bench.seconds(lambda: network(inputs)), compile_seconds


def onnx_speeds(bench: Bench) -> Iterator[Speed]:
    """Yield the speed of the exported files in ONNX Runtime on the CPU, one image at a time."""
    exported = export(bench.sim, bench.settings.size, bench.folder / "onnx", {})
    image = bench.inputs(1).cpu()
    for backend, name in ((INT8_ONNX_RUNTIME, MODEL_FILE), (ONNX_FP32, FLOAT_MODEL_FILE)):
        network = OnnxBackend(exported / name)
        seconds, failure = attempt(lambda network=network: bench.seconds(lambda: network(image)))
        yield Speed(backend, 1, image_seconds=seconds, failure=failure)


def stage_times(bench: Bench) -> Iterator[StageTime]:
    """Yield the time of every stage of scoring a batch, as the evaluation loop makes it, and of FP32 to compare."""
    allow_tf32(False)
    device, batch_size = bench.settings.device, bench.settings.stage_batch_size
    repeated = ConcatDataset([bench.images] * -(-batch_size // len(bench.images)))
    with contextlib.closing(load_batches(repeated, Runtime(device, batch_size=batch_size))) as batches:
        batch = next(batches)
    images, labels = (tensor.to(device) for tensor in batch)
    inputs = normalize(images)
    network = bench.model.to(memory_format=torch.contiguous_format)
    logits = network(inputs)
    ids = predict(logits, labels.shape[1:])
    others = ids.clone()
    stages: list[tuple[str, int, Callable[[], Any]]] = [
        ("copy to the device", 1, lambda: [tensor.to(device, non_blocking=True) for tensor in batch]),
        ("normalize", 1, lambda: normalize(images)),
        (f"network, {FP32}", 1, lambda: network(inputs)),
        ("check that logits are finite", 2, lambda: bool(logits.sum().isfinite())),
        ("upsample and argmax", 2, lambda: predict(logits, labels.shape[1:])),
        ("confusion matrices", 2, lambda: confusion_matrices(labels, ids)),
        ("prediction agreement", 1, lambda: agreeing_pixels(ids, others)),
    ]
    for name, calls, call in stages:
        yield StageTime(name, calls, *attempt(lambda call=call: bench.seconds(call)))


def program_times(bench: Bench) -> Iterator[ProgramTime]:
    """Yield the times of whole runs of the program, in processes of their own.

    `Settings.programs` holds for each run the number of calibration images, None for all, and of decoding threads. The
    first is what the program does by default.
    """
    release_memory(bench.settings.device)  # the other processes need it
    checkpoint = bench.folder / "weights.pth"
    torch.save(speed.random_model(bench.settings.model_name).state_dict(), checkpoint)
    speed.link_images(bench.images, bench.settings.program_images)
    for calibration_images, threads in bench.settings.programs:
        row = ProgramTime(threads, calibration_images, bench.settings.program_images)
        yield time_program(bench, checkpoint, row)


def time_program(bench: Bench, checkpoint: Path, row: ProgramTime) -> ProgramTime:
    """Run the program as `row` says and return the row with the times."""
    options: list[str | Path] = ["--dataset-path", bench.images.root, "--limit", str(row.images)]
    options += ["--checkpoint", checkpoint, "--model-name", bench.settings.model_name]
    options += ["--num-workers", str(row.decoding_threads)]
    if row.calibration_images is not None:
        options += ["--calibration-images", str(row.calibration_images)]
    cuda = bench.settings.device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=bench.folder) as output:
        run, failure = attempt(lambda: run_program([*options, "--output-dir", output], cuda=cuda))
        if run is None:
            return ProgramTime(row.decoding_threads, row.calibration_images, row.images, failure=failure)
        stages = read_stage_seconds(Path(output))
    return ProgramTime(row.decoding_threads, row.calibration_images, row.images, run.seconds, stages)


def release_memory(device: torch.device) -> None:
    """Return the GPU's memory that torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
