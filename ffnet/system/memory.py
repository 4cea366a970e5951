"""The size of the memory, and the errors that report a lack of it. Needs no torch, whose import may fail for it."""

import contextlib
import os
import re
from pathlib import Path

# Files in which Linux states the memory limit of a container: control groups of version 2 and of version 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
CPU_MESSAGES = (
    re.compile(  # messages of torch, Python, C++, ONNX Runtime and the linker, which have no class for these errors
        r"(can't|cannot|failed to) allocate memory|can't start new thread|bad_alloc|bad allocation|"
        r"failed to map segment from shared object$",
        re.IGNORECASE | re.MULTILINE,
    )
)
GPU_MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, if no engine's workspace fits
)


def memory_bytes() -> int:
    """Return the memory of the machine or, if that is less, the limit of the container; 0 if both are unknown."""
    known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
            known.append(int(path.read_text()))
    return min(known, default=0)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Return whether a GPU has run out of memory; only torch's own allocator raises its OutOfMemoryError."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in GPU_MESSAGES)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch or a GPU has run out of memory."""
    on_cpu = isinstance(error, MemoryError) or CPU_MESSAGES.search(str(error)) is not None
    return on_cpu or is_out_of_gpu_memory(error)


def describe_lack(error: BaseException, purpose: str = "") -> str:
    """Return the message for an error that `is_out_of_memory` recognizes; `purpose` follows "does not suffice"."""
    if is_out_of_gpu_memory(error):
        return f"The GPU's memory does not suffice{purpose}. Use --use-cuda false."
    if "map segment" in str(error):
        purpose += f" ({error}), or the library is on a file system from which nothing may be executed (noexec)"
    return (
        f"The memory does not suffice{purpose}. Run on a machine or in a container with more memory, or raise the "
        "limit that `ulimit -v` shows."
    )


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error in one line, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
