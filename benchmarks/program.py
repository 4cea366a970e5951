"""Run the program in a process of its own, and measure its time and its memory. Linux only."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.worker_usage import memory_bytes
from ffnet.file_names import RESULT_FILE

SAMPLING_SECONDS = 0.1  # between two looks at the processes of the NPU
SPAWNED = b"--multiprocessing-fork"  # in the command line of a process that multiprocessing has started


@dataclass(frozen=True)
class ProgramRun:
    """What a run of the program took."""

    seconds: float  # wall time, with the start of Python
    processor_seconds: float  # of all threads of the main process
    peak_bytes: int  # largest resident memory of the main process
    npu_bytes: int  # largest resident memory of the NPU's processes together; pages that they share count in each


def run_program(options: Sequence[str | Path], threads: int | None = None, cuda: bool = False) -> ProgramRun:
    """Run the program.

    Args:
        options: of its command line.
        threads: that compute a network on the CPU; None: as many as torch chooses.
        cuda: run on a GPU instead of the CPU.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.measured_program", *map(str, options)]
    command += ["--use-cuda", str(cuda).lower(), "--quiet"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        root = Path(__file__).parents[1]
        with subprocess.Popen(command, stdout=output, cwd=root, env=environment) as process:
            try:
                npu_bytes = watch_npu_processes(process)
            except BaseException:  # an interruption would wait for the end of the process
                process.kill()
                raise
        seconds = time.perf_counter() - begin
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        *_, processor_seconds, peak_bytes = output.read().split()
        return ProgramRun(seconds, float(processor_seconds), int(peak_bytes), npu_bytes)


def read_stage_seconds(output_dir: Path) -> dict[str, float]:
    """Return the wall time of each stage of a run, of the first of its models, from its `--output-dir`."""
    return json.loads(next(output_dir.rglob(RESULT_FILE)).read_text())["stage_seconds"]


def watch_npu_processes(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the end of a process, and return the largest memory of those that it has spawned, in bytes, together."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(memory_bytes(status, "VmRSS") for status in spawned_statuses(process.pid)))
        time.sleep(SAMPLING_SECONDS)
    return peak


def spawned_statuses(parent: int) -> Iterator[str]:
    """Yield the status of every process that multiprocessing has spawned from a process."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                if SPAWNED in Path(f"/proc/{child}/cmdline").read_bytes():
                    yield Path(f"/proc/{child}/status").read_text()
        except OSError:  # the process has ended
            continue
