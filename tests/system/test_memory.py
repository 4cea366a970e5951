"""The memory of the machine; and a lack of memory: each of its errors is recognized, and the user learns what to do."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

import ffnet_quanteval
from ffnet.system import memory
from ffnet.system.memory import first_sentence, is_out_of_gpu_memory, is_out_of_memory, memory_bytes

ON_A_GPU = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.cuda.OutOfMemoryError(),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
)
ON_A_CPU = (
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 9"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
)
OTHERS = (
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("CUDA out of memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object: Operation not permitted"),
)


def test_each_error_is_recognized():
    assert all(is_out_of_gpu_memory(error) and is_out_of_memory(error) for error in ON_A_GPU)
    assert all(is_out_of_memory(error) and not is_out_of_gpu_memory(error) for error in ON_A_CPU)
    assert not any(is_out_of_memory(error) for error in OTHERS)


def test_the_error_of_torch_itself_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_first_sentence_of_an_error_is_one_line():
    expected = "CUDA out of memory", "OutOfMemoryError", str(ON_A_GPU[2]), str(ON_A_GPU[3]), "CUDA error: out of memory"
    assert tuple(map(first_sentence, ON_A_GPU)) == expected


@pytest.mark.parametrize("error", (*ON_A_CPU, ON_A_GPU[0]))
def test_a_lack_of_memory_anywhere_is_one_line_with_its_remedy(error, capsys, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr("ffnet.run.preflight.check", fail)
    assert ffnet_quanteval.main(["--demo"]) == 2
    shown = capsys.readouterr().err
    place = "GPU's memory" if error is ON_A_GPU[0] else "memory"
    assert shown.startswith(f"ffnet_quanteval.py: error: The {place} does not suffice") and shown.count("\n") == 1
    assert shown.endswith("Use --use-cuda false.\n" if error is ON_A_GPU[0] else "that `ulimit -v` shows.\n")
    assert ("(libtorch_cpu.so: failed to map" in shown and "noexec" in shown) == isinstance(error, ImportError)
    error = OTHERS[2]
    with pytest.raises(ImportError, match="Operation not permitted"):
        ffnet_quanteval.main(["--demo"])


def test_the_memory_is_that_of_the_machine_or_less_if_a_container_has_less(monkeypatch, tmp_path):
    unlimited, limited = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    unlimited.write_text("max\n")
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (unlimited, limited))
    kilobytes = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert memory_bytes() == 1024 * kilobytes
    limited.write_text("1000000\n")
    assert memory_bytes() == 1_000_000
    limited.write_text(f"{2**63}\n")  # how version 1 writes that there is no limit
    assert memory_bytes() == 1024 * kilobytes
