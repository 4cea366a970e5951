"""Which batches each process runs, and that processes calibrate as one process does."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from ffnet.errors import UserError
from ffnet.evaluation.runtime import Runtime
from ffnet.quantization import shared_calibration
from ffnet.quantization.shared_calibration import calibrate_on_ranks, own_batches


@pytest.mark.parametrize(
    ("images", "batch_size", "rank", "processes", "batches", "shared"),
    (
        (10, 2, 0, 2, [[0, 1], [2, 3], [6, 7]], 2),
        (10, 2, 1, 2, [[0, 1], [4, 5], [8, 9]], 2),
        (11, 2, 1, 2, [[0, 1], [4, 5], [8, 9], [10]], 2),
        (5, 2, 0, 3, [[0, 1], [2, 3], [4]], 0),
        (3, 8, 1, 2, [[0, 1, 2]], 0),
        (7, 1, 2, 3, [[0], [3], [6]], 2),
    ),
)
def test_every_process_runs_the_first_batch_its_share_and_what_remains(
    images, batch_size, rank, processes, batches, shared
):
    own, number = own_batches(images, batch_size, rank, processes)
    assert [list(batch) for batch in own] == batches and number == shared


def calibrate_in_threads(monkeypatch, limits, images=4):
    """Calibrate in threads whose GPUs hold batches of so many images; return batch sizes, or an error's message."""
    from tests.quantization.test_tf_enhanced import Threads

    threads = Threads(len(limits))

    def calibrate(limit, batches):
        for batch in batches:
            if len(batch) > limit:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared_calibration, "calibrate", calibrate)
    monkeypatch.setattr(shared_calibration, "share_batches", lambda sim, exchange: None)
    data = torch.utils.data.TensorDataset(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), torch.zeros(images, 8, 8))
    runtime = Runtime(batch_size=4, progress=False)

    def run(rank):
        return calibrate_on_ranks(limits[rank], data, runtime, threads.exchange(rank), len(limits))

    with ThreadPoolExecutor(len(limits)) as executor:
        return list(executor.map(run, range(len(limits))))


def test_all_processes_take_the_batch_size_of_the_smallest_gpu(monkeypatch):
    assert calibrate_in_threads(monkeypatch, (4, 2)) == [2, 2]
    assert calibrate_in_threads(monkeypatch, (1, 4), images=9) == [1, 1]


def test_a_lack_of_memory_after_the_first_batch_is_an_error(monkeypatch):
    def calibrate(sim, batches):
        for number, _ in enumerate(batches):
            if number == 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared_calibration, "calibrate", calibrate)
    monkeypatch.setattr(shared_calibration, "share_batches", lambda sim, exchange: None)
    data = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8))
    exchange = SimpleNamespace(rank=0, gather=lambda values: [values])
    with pytest.raises(UserError, match="Give a smaller --batch-size"):
        calibrate_on_ranks(None, data, Runtime(batch_size=2, progress=False), exchange, 1)
