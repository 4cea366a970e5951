"""The measurements of `benchmarks.npu`."""

import contextlib
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import speed
from benchmarks.worker_usage import Usage, measure_usage
from demo.streetscenes.render import render_scene
from ffnet.chips import CHIPS, DEFAULT_CHIP
from ffnet.config import QuantizationConfig
from ffnet.evaluation.loading import normalize
from ffnet.file_names import MODEL_FILE
from ffnet.npu import worker as npu_worker
from ffnet.npu.backend import NpuProcess
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.export import export
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.quantization.weighted_layers import raise_weight_scales


@dataclass(frozen=True)
class Costs:
    """What the NPU costs for one network; medians."""

    network: str
    size: tuple[int, int]  # height, width of the images
    compilation_seconds: float
    image_seconds: float  # with one process
    processor_seconds: float  # per image, with one process
    peak_gb: float  # resident memory of a process, in 10**9 bytes
    throughput: dict[int, float]  # number of processes -> their images per second over those of one process


@dataclass(frozen=True)
class Timings:
    """Seconds of every round."""

    wall: dict[int, list[float]]  # number of processes -> for an image in each
    processor: list[float]  # of one process, for an image


def measure_network(name: str, size: tuple[int, int], most: int, rounds: int) -> Costs:
    """Measure a network with random weights in one to `most` processes; each round runs an image in every process."""
    image = scene(size)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        target = NpuTarget(export_random(name, image, Path(folder) / "export"), CHIPS[DEFAULT_CHIP])
        processes = [stack.enter_context(NpuProcess(target)) for _ in range(most)]
        compilations = [compilation_seconds(process) for process in processes]
        timings = run_rounds(processes, image.numpy(), rounds, name)
        peak = max(usage(process).peak_bytes for process in processes)
    wall = {count: statistics.median(seconds) for count, seconds in timings.wall.items()}
    return Costs(
        network=name,
        size=size,
        compilation_seconds=statistics.median(compilations),
        image_seconds=wall[1],
        processor_seconds=statistics.median(timings.processor),
        peak_gb=peak / 1e9,
        throughput={count: count * wall[1] / seconds for count, seconds in wall.items()},
    )


def scene(size: tuple[int, int]) -> torch.Tensor:
    """Return a rendered scene, normalized (1, 3, H, W) float32."""
    pixels, _ = render_scene(0, *size)
    return normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None]).contiguous()


def export_random(name: str, image: torch.Tensor, folder: Path) -> Path:
    """Export a network with random weights that is calibrated on `image`, and return the path of the Q/DQ file."""
    sim = build_quantsim(equalize(speed.random_model(name)), QuantizationConfig())
    calibrate(sim, [image])
    raise_weight_scales(sim)
    _, _, height, width = image.shape
    return export(sim, (height, width), folder, {}) / MODEL_FILE


def compilation_seconds(process: NpuProcess) -> float:
    """Have a process compile its network and return the time, without that of the process's start."""
    usage(process)  # returns once the process has started
    return wall_seconds(lambda: process.call(npu_worker.describe_session))


def run_rounds(processes: Sequence[NpuProcess], image: np.ndarray, rounds: int, title: str) -> Timings:
    """Run an image in the first process, then in each of the first two at once, and so on; repeat it `rounds` times."""
    timings = Timings({count: [] for count in range(1, len(processes) + 1)}, [])
    for _ in tqdm(range(rounds), title, unit="round", disable=None):
        for count, seconds in timings.wall.items():
            before = usage(processes[0]).processor_seconds
            seconds.append(wall_seconds(lambda count=count: run_at_once(processes[:count], image)))
            if count == 1:
                timings.processor.append(usage(processes[0]).processor_seconds - before)
    return timings


def run_at_once(processes: Sequence[NpuProcess], image: np.ndarray) -> None:
    """Run an image in each of the processes at the same time."""
    for process in processes:
        process.send(npu_worker.run, image)
    for process in processes:
        process.receive()


def usage(process: NpuProcess) -> Usage:
    """Return what a process has used so far."""
    return process.call(measure_usage)


def wall_seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def machine() -> str:
    """Return one line about the processor, the plugin and the chip."""
    plugin = f"onnxruntime-qnn {importlib.metadata.version('onnxruntime-qnn')}"
    return f"{speed.machine(torch.device('cpu'))}, {plugin} for {DEFAULT_CHIP}"
