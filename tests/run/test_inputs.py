"""The device of a run, and the precision of its arithmetic."""

import pytest
import torch

from ffnet.config import Runtime
from ffnet.run.inputs import select_device


@pytest.mark.parametrize(("allowed", "precision"), ((True, "high"), (False, "highest")))
def test_tf32_is_set_where_torch_compile_reads_it(monkeypatch, allowed, precision):
    """Of torch's two interfaces, the one that torch.compile reads raises once the other was used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert select_device(Runtime(use_cuda=True, allow_tf32=allowed)) == torch.device("cuda")
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
        assert torch.get_float32_matmul_precision() == precision
    finally:
        select_device(Runtime(use_cuda=False))
