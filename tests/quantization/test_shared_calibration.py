"""Which batches each process runs, and that processes calibrate as one process does."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ffnet.config import Runtime
from ffnet.quantization import shared_calibration
from ffnet.quantization.shared_calibration import calibrate_on_ranks, own_batches
from ffnet.quantization.tf_enhanced import MESSAGE_LENGTH
from ffnet.system.errors import UserError
from tests.helpers.exchange import Threads


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


def calibrate_in_threads(monkeypatch, limits, images):
    """Calibrate in threads; return batch sizes.

    Args:
        monkeypatch: pytest's.
        limits: of each thread's GPU: the largest batch that it holds, and at which of its batches it runs out of memory
            with a larger one.
        images: their number.
    """
    threads = Threads(len(limits))

    def calibrate(exchanges, batches):
        largest, position = limits[exchanges[0]]
        for index, batch in enumerate(batches):
            if len(batch) > largest and index == position:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            for _ in range(3 if exchanges[1] else 0):  # quantizers
                exchanges[1].gather(torch.zeros(MESSAGE_LENGTH))

    def share_batches(exchanges, exchange):
        exchanges[1] = exchange

    monkeypatch.setattr(shared_calibration, "calibrate", calibrate)
    monkeypatch.setattr(shared_calibration, "share_batches", share_batches)
    data = torch.utils.data.TensorDataset(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), torch.zeros(images, 8, 8))
    runtime = Runtime(batch_size=4, progress=False)

    def run(rank):
        return calibrate_on_ranks([rank, None], data, runtime, threads.exchange(rank), len(limits))

    with ThreadPoolExecutor(len(limits)) as executor:
        return list(executor.map(run, range(len(limits))))


@pytest.mark.parametrize("position", (0, 1, 2, 3))
def test_all_processes_take_the_batch_size_of_the_smallest_gpu(monkeypatch, position):
    """Its memory ends in the first batch, in one that is shared, or in one of the last, which every process runs."""
    assert calibrate_in_threads(monkeypatch, ((2, position), (4, 0)), 24) == [2, 2]
    assert calibrate_in_threads(monkeypatch, ((4, 0), (1, position)), 24) == [1, 1]
    assert calibrate_in_threads(monkeypatch, ((2, position), (1, position), (4, 0)), 24) == [1, 1, 1]


def test_too_little_memory_for_one_image_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="memory does not suffice for one image"):
        calibrate_in_threads(monkeypatch, ((0, 0), (4, 0)), 4)
