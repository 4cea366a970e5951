"""Measure what the emulated NPU costs: compilation, time per image, memory, and what more processes gain.

    python -m benchmarks.npu [--model-name NAME] [--rounds N]

A network at 1024x2048 and the demo's at 512x1024, W8A8, with random weights, calibrated on one rendered scene. Numbers
of processes are compared alternately in one run; medians over the rounds. Needs onnxruntime-qnn, and Linux.
"""

import importlib.metadata
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.inputs import first_image, option_parser, random_model, write_images
from benchmarks.program import memory_bytes, npu_processes, processor_seconds
from benchmarks.timing import describe_machine, markdown, measure_alternately, median_ratio
from ffnet.chips import CHIPS, DEFAULT_CHIP, check_npu_package
from ffnet.config import MODEL_FILE, Runtime
from ffnet.npu.backend import NpuBackend
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.export import export
from ffnet.quantization.quantize import quantize
from ffnet.variants import DEMO_VARIANTS, INPUT_SIZE

COLUMNS = (
    "network", "input", "start and compilation, s", "per image, s", "processor time per image, s",
    "peak memory of a process, GB", "2 processes over 1", "3 processes over 1",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print the costs of both networks as a Markdown table."""
    parser = option_parser("npu", __doc__, "segmentation_ffnet40S_dBBB_mobile")
    parser.add_argument("--rounds", type=int, default=2, help="four times as many at 512x1024; default %(default)s")
    args = parser.parse_args(argv)
    check_npu_package()
    plugin = f"onnxruntime-qnn {importlib.metadata.version('onnxruntime-qnn')}"
    rows = [
        measure_network(args.model_name, INPUT_SIZE, 2, args.rounds),
        measure_network(DEMO_VARIANTS[0], (512, 1024), 3, 4 * args.rounds),
    ]
    print("\n".join([f"{describe_machine()}, {plugin} for {DEFAULT_CHIP}", "", *markdown([COLUMNS, *rows])]))


def measure_network(name: str, size: tuple[int, int], most: int, rounds: int) -> list[str]:
    """Measure a network in one to `most` processes at the same time, and return the cells of its row."""
    with tempfile.TemporaryDirectory() as folder:
        path, image = export_random(name, size, Path(folder))
        begin = time.perf_counter()
        with NpuBackend(NpuTarget(path, CHIPS[DEFAULT_CHIP])) as backend:
            start = time.perf_counter() - begin
            (process,) = npu_processes(os.getpid())
            used = processor_seconds_of(process, backend, image)
            backend.start_processes(most)
            calls = {str(n): lambda n=n: backend(image.repeat(n, 1, 1, 1)) for n in range(1, most + 1)}
            seconds = measure_alternately(calls, rounds)
            peak = max(memory_bytes(pid, "VmHWM") for pid in npu_processes(os.getpid()))
    costs = [f"{value:.1f}" for value in (start, statistics.median(seconds["1"]), used)]
    gains = [f"{n * median_ratio(seconds['1'], seconds[str(n)]):.2f}" for n in range(2, most + 1)]
    return [name, "x".join(map(str, size)), *costs, f"{peak / 1e9:.2f}", *gains, *[""] * (3 - most)]


def export_random(name: str, size: tuple[int, int], folder: Path) -> tuple[Path, torch.Tensor]:
    """Export a network with random weights, calibrated on a scene; return the path of the file and the scene."""
    images = write_images(folder / "scenes", 1, size)
    network = quantize(random_model(name), images, runtime=Runtime(quiet=True))
    return export(network.sim, size, folder / "export", {}) / MODEL_FILE, first_image(images)


def processor_seconds_of(process: int, backend: NpuBackend, image: torch.Tensor) -> float:
    """Return the processor time that a process takes for its second image."""
    backend(image)
    before = processor_seconds(process)
    backend(image)
    return processor_seconds(process) - before


if __name__ == "__main__":
    __spec__ = __file__ = None  # keeps the NPU's processes from importing this module, and torch with it
    main()
