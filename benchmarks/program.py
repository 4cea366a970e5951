"""Run the program in a process of its own, and measure its time and memory. Linux only."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnet.config import RESULT_FILE

ROOT = Path(__file__).parents[1]
SAMPLING_SECONDS = 0.05  # interval at which memory is read
SPAWNED = b"--multiprocessing-fork"  # in the command line of a process that multiprocessing has started


@dataclass(frozen=True)
class ProgramRun:
    """A run of the program and its resources."""

    seconds: float  # wall time, including the start of Python
    processor_seconds: float  # all threads of the main process, and processes that it waited for
    peak_bytes: int  # largest resident memory of the main process
    npu_bytes: int  # largest resident memory of the NPU's processes together; shared pages count in each
    results: list[dict[str, Any]]  # contents of result.json, one per model

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Wall time per stage, of the first model."""
        return self.results[0]["stage_seconds"]


def run_program(options: Sequence[str | Path], threads: int | None = None, cuda: bool = False) -> ProgramRun:
    """Run the program.

    Args:
        options: Command-line options, without those that say where to run and to write.
        threads: Number of threads that run a network on the CPU; None leaves the choice to torch.
        cuda: Run on a GPU instead of the CPU.

    Raises:
        subprocess.CalledProcessError: If the program fails.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "ffnet_quanteval.py", *map(str, options), "--quiet", "--output-dir", output]
        command += ["--use-cuda", str(cuda).lower()]
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment) as process:
            try:
                processor_seconds, peak, npu_peak = watch(process)
            except BaseException:  # an interruption would wait for the end of the process
                process.kill()
                raise
        seconds = time.perf_counter() - begin
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        results = [json.loads(path.read_text()) for path in sorted(Path(output).rglob(RESULT_FILE))]
    return ProgramRun(seconds, processor_seconds, peak, npu_peak, results)


def watch(process: "subprocess.Popen[bytes]") -> tuple[float, int, int]:
    """Wait for the end of a process and return its processor time, its peak memory and that of its NPU processes."""
    peak = npu_peak = 0
    while True:
        # getrusage's peak would include the memory that the parent had at the fork.
        peak = max(peak, memory_bytes(process.pid, "VmHWM"))
        npu_peak = max(npu_peak, sum(memory_bytes(child, "VmRSS") for child in npu_processes(process.pid)))
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return used.ru_utime + used.ru_stime, peak, npu_peak
        time.sleep(SAMPLING_SECONDS)


def npu_processes(parent: int) -> Iterator[int]:
    """Yield the id of every process that multiprocessing has spawned from a process."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in _read(children).split():
            if SPAWNED in _read(Path(f"/proc/{child.decode()}/cmdline")):
                yield int(child)


def memory_bytes(pid: int, entry: str) -> int:
    """Return an entry of a process's status, such as VmHWM; 0 if the process has ended."""
    found = re.search(rb"^%b:\s*(\d+) kB" % entry.encode(), _read(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def processor_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process since its start."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()  # the name in parentheses may have spaces
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""
