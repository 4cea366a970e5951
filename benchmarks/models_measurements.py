"""The measurements of `benchmarks.models`."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import speed
from benchmarks.measured_program import SMALL_VARIANTS
from benchmarks.program import read_stage_seconds, run_program
from datasets.cityscapes import CityscapesSplit
from ffnet.config import Runtime
from ffnet.evaluation.loading import decoding_threads, load_batches
from ffnet.variants import VARIANTS

SMALL_SIZE = (64, 128)  # height, width of the images for the measurement of memory
# For the measurement of time, with the scheme that finds ranges fastest: the start is a small part of a long run.
QUICK_CALIBRATION = ("--quant-scheme", "tf", "--calibration-images", "1")
MEMORY_CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class Seconds:
    """Times of a run of the program, or sums of those of two."""

    run: float  # wall time, with the start of Python
    evaluation: float  # wall time of the stage in which the images run through the backends
    processor: float  # of all threads of the run

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.run + other.run, self.evaluation + other.evaluation, self.processor + other.processor)


@dataclass(frozen=True)
class Round:
    """Two models, each in a run of its own and then both in one."""

    two_runs: Seconds
    one_run: Seconds


@dataclass(frozen=True)
class Sharing:
    """What one run of two models saves."""

    models: tuple[str, ...]
    images: int
    rounds: tuple[Round, ...]
    decoding_seconds: tuple[float, ...]  # wall time of decoding all images once, with nothing else; one per round


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of a run, in bytes."""

    images: int
    main: int  # of the main process
    npu: int | None  # of all processes of the NPU together; None if it ran without


def measure_sharing(
    models: tuple[str, ...], images: CityscapesSplit, folder: Path, rounds: int, threads: int
) -> Sharing:
    """Run two models with random weights in runs of their own and in one, alternately.

    Args:
        models: two names.
        images: that are scored.
        folder: to create for the weights.
        rounds: number of times that everything is measured.
        threads: see `run_program`.
    """
    checkpoints = write_checkpoints(folder, models)
    measured, decoding = [], []
    for _ in tqdm(range(rounds), " and ".join(models), unit="round", disable=None):
        decoding.append(decoding_seconds(images))
        first, second = (time_program(images, checkpoints, [model], threads) for model in models)
        measured.append(Round(first + second, time_program(images, checkpoints, models, threads)))
    return Sharing(models, len(images), tuple(measured), tuple(decoding))


def write_checkpoints(folder: Path, models: Sequence[str]) -> Path:
    """Write random weights of every model to a new folder and return it."""
    folder.mkdir()
    for model in models:
        torch.save(speed.random_model(model).state_dict(), folder / f"{model}.pth")
    return folder


def decoding_seconds(images: CityscapesSplit) -> float:
    """Return the wall time of decoding all images with as many threads as the program uses by default."""
    begin = time.perf_counter()
    for _ in load_batches(images, Runtime(batch_size=1, num_workers=decoding_threads(torch.device("cpu")))):
        pass
    return time.perf_counter() - begin


def time_program(images: CityscapesSplit, checkpoints: Path, models: Sequence[str], threads: int) -> Seconds:
    """Run the program on models whose weights are in the folder `checkpoints`, and return its times."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        options: list[str | Path] = [
            "--dataset-path",
            images.root,
            "--checkpoint",
            checkpoints,
            "--model-name",
            *models,
        ]
        options += [*QUICK_CALIBRATION, "--output-dir", output]
        run = run_program(options, threads)
        evaluation = read_stage_seconds(output)["evaluate"]  # the same in all models
    return Seconds(run.seconds, evaluation, run.processor_seconds)


def measure_memory(counts: Sequence[int], npu: bool) -> list[Memory]:
    """Return the peak memory of runs of the five small networks in all backends, each on so many images."""
    VARIANTS.update(SMALL_VARIANTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints = write_checkpoints(folder / "weights", tuple(SMALL_VARIANTS))
        images = speed.write_images(folder, max(counts), SMALL_SIZE)
        return [
            memory_of_program(images, checkpoints, count, npu)
            for count in tqdm(counts, "memory", unit="run", disable=None)
        ]


def memory_of_program(images: CityscapesSplit, checkpoints: Path, count: int, npu: bool) -> Memory:
    """Return the peak memory of a run on the first `count` images.

    One thread computes the networks: of layers this small, two threads spend most time waiting for each other if other
    programs are running.
    """
    with tempfile.TemporaryDirectory() as output:
        options: list[str | Path] = ["--dataset-path", images.root, "--limit", str(count), "--checkpoint", checkpoints]
        options += ["--model-name", *SMALL_VARIANTS, "--execute", "--output-dir", output]
        options += ["--calibration-images", str(MEMORY_CALIBRATION_IMAGES)]
        options += ["--npu", "--npu-images", "all"] if npu else []
        run = run_program(options, threads=1)
    return Memory(count, run.peak_bytes, run.npu_bytes if npu else None)
