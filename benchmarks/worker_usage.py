"""What a process has used so far, asked for in the process itself. Needs no torch: processes of the NPU import this."""

import re
import resource
from dataclasses import dataclass
from pathlib import Path

from ffnet.onnx.npu_worker import NpuTarget


@dataclass(frozen=True)
class Usage:
    """Resources of a process since its start."""

    processor_seconds: float  # of all its threads
    peak_bytes: int  # largest resident memory


def measure_usage(_target: NpuTarget, log: Path) -> Usage:
    """Return the usage of the process that calls this; the arguments are those that NpuProcess passes. Linux only."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The memory that getrusage says of a child includes its parent's at the fork.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    return Usage(used.ru_utime + used.ru_stime, 1024 * int(peak[1]))
