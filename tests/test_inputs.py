"""The device of a run, and the precision of its arithmetic."""

import re
from pathlib import Path

import pytest
import torch

from ffnet import inputs
from ffnet.config import RuntimeConfig
from ffnet.inputs import memory_bytes, select_device


@pytest.mark.parametrize(("allowed", "precision"), ((True, "high"), (False, "highest")))
def test_tf32_is_set_where_torch_compile_reads_it(monkeypatch, allowed, precision):
    """Of torch's two interfaces, the one that torch.compile reads raises once the other was used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert select_device(RuntimeConfig(use_cuda=True, allow_tf32=allowed)) == torch.device("cuda")
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
        assert torch.get_float32_matmul_precision() == precision
    finally:
        select_device(RuntimeConfig(use_cuda=False))


def test_the_memory_is_that_of_the_machine_or_less_if_a_container_has_less(monkeypatch, tmp_path):
    unlimited, limited = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    unlimited.write_text("max\n")
    monkeypatch.setattr(inputs, "CONTAINER_LIMITS", (unlimited, limited))
    machine = memory_bytes()
    kilobytes = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert machine == 1024 * kilobytes
    limited.write_text("1000000\n")
    assert memory_bytes() == 1_000_000
    limited.write_text(f"{2**63}\n")  # how version 1 writes that there is no limit
    assert memory_bytes() == machine
