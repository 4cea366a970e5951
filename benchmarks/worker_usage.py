"""What a process has used so far. Needs no torch: processes of the NPU import this. Linux only."""

import re
import resource
from dataclasses import dataclass
from pathlib import Path

from ffnet.npu.worker import NpuTarget


@dataclass(frozen=True)
class Usage:
    """Resources of a process since its start."""

    processor_seconds: float  # of all its threads
    peak_bytes: int  # largest resident memory


def measure_usage(_target: NpuTarget, log: Path) -> Usage:
    """Return the usage of the process that calls this; the arguments are those that NpuProcess passes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(used.ru_utime + used.ru_stime, peak_bytes())


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far.

    The memory that getrusage says of a child includes its parent's at the fork.
    """
    return memory_bytes(Path("/proc/self/status").read_text(), "VmHWM")


def memory_bytes(status: str, entry: str) -> int:
    """Return an entry of a process's status, such as VmHWM; 0 if there is none, because the process has ended."""
    found = re.search(rf"^{entry}:\s*(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
