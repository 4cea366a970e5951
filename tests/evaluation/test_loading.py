"""Batches are those of torch's DataLoader, whatever decodes the images, and threads neither outlive a run nor hang."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

from datasets import DatasetError
from datasets.cityscapes import CityscapesSplit
from ffnet.config import Runtime
from ffnet.evaluation.loading import decoding_threads, load_batches, open_batches
from ffnet.system.errors import UserError


class Recorder:
    """A dataset of one-pixel images that records which ones were decoded and raises `failure` for the sixth."""

    def __init__(self, length, failure=None):
        self.length, self.failure = length, failure
        self.decoded = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        time.sleep(0.01 * (index % 2))  # every other image is ready before the one ahead of it
        self.decoded.append(index)
        if self.failure and index == 5:
            raise self.failure
        return torch.full((3, 1, 1), index, dtype=torch.uint8), torch.full((1, 1), index, dtype=torch.uint8)


def loader(images, workers, batch_size=2):
    return load_batches(images, Runtime(batch_size=batch_size, num_workers=workers, progress=False))


def threads_that_decode():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def assert_threads_end():
    deadline = time.monotonic() + 5
    while threads_that_decode():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", (0, 1, 3))
def test_batches_equal_those_of_torchs_loader_in_the_same_order(cityscapes, workers):
    found, expected = list(loader(cityscapes, workers, 3)), list(DataLoader(cityscapes, 3))
    assert [len(images) for images, _ in found] == [3, 3, 1]
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, reference) for tensor, reference in zip(batch, other, strict=True))


def test_batches_of_one_image_are_not_copied(cityscapes):
    samples = [cityscapes[index] for index in range(2)]
    for batch, sample in zip(loader(samples, 0, batch_size=1), samples, strict=True):
        for tensor, single in zip(batch, sample, strict=True):
            assert tensor.data_ptr() == single.data_ptr() and torch.equal(tensor, single[None])


@pytest.mark.parametrize("workers", (1, 2, 5))
def test_threads_decode_at_most_one_batch_and_one_image_each_ahead(workers):
    images = Recorder(60)
    for number, (batch, _) in enumerate(loader(images, workers, batch_size=4), start=1):
        assert batch.flatten(1)[:, 0].tolist() == list(range(4 * number - 4, 4 * number))
        time.sleep(0.02)
        assert len(images.decoded) <= 4 * number + 4 + workers
    assert sorted(images.decoded) == list(range(60))


def test_images_are_decoded_by_as_many_threads_at_once_as_requested():
    together = threading.Barrier(3)

    class Waiting(Recorder):
        def __getitem__(self, index):
            together.wait(timeout=30)  # raises unless three images are decoded at the same time
            return super().__getitem__(index)

    assert len(list(loader(Waiting(6), 3))) == 3


@pytest.mark.parametrize("workers", (0, 2))
def test_an_error_of_an_image_is_raised_once_its_batch_is_due(workers):
    error = DatasetError("a.png: this PNG file is truncated.")
    batches = loader(Recorder(9, error), workers)
    assert len(list(itertools.islice(batches, 2))) == 2
    with pytest.raises(DatasetError) as caught:
        next(batches)
    assert caught.value is error
    assert_threads_end()


@pytest.mark.parametrize("failure", (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")))
@pytest.mark.parametrize("workers", (0, 2))
def test_too_little_memory_is_an_error_that_says_what_to_do(workers, failure):
    with pytest.raises(UserError, match="the memory does not suffice for decoding .* Give smaller numbers"):
        list(loader(Recorder(9, failure), workers))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(loader(Recorder(9, RuntimeError("shape mismatch")), 2))


def test_a_thread_that_cannot_be_started_is_an_error_that_says_what_to_do(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    with pytest.raises(UserError, match=r"--num-workers: .*can't start new thread.*Give a smaller number, or 0"):
        list(loader(Recorder(9), 2))


@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError))
def test_threads_end_with_a_run_that_ends_early(error):
    images = Recorder(1000)
    with pytest.raises(error) as kept, open_batches(images, Runtime(batch_size=2, num_workers=2), "x") as batches:
        for _ in batches:
            raise error
    assert kept.tb is not None  # a traceback that keeps the generator alive keeps no thread alive
    assert_threads_end()
    assert len(images.decoded) < 10


def test_an_interrupt_does_not_wait_for_images_that_are_being_decoded():
    release = threading.Event()

    class Stuck(Recorder):
        def __getitem__(self, index):
            if index > 1:
                release.wait(30)
            return super().__getitem__(index)

    batches = loader(Stuck(20), 2)
    next(batches)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 5
    release.set()
    assert_threads_end()


@pytest.mark.parametrize("workers", (0, 2))
def test_a_broken_image_is_named_in_one_line(tree, workers):
    path = sorted(tree.glob("leftImg8bit/val/*/*.png"))[1]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=f"^{path}: this PNG file is truncated") as error:
        list(loader(CityscapesSplit(tree, "val"), workers))
    assert "\n" not in str(error.value)


@pytest.mark.cuda
@pytest.mark.parametrize("workers", (0, 2))
def test_batches_for_a_gpu_are_in_pinned_memory(cityscapes, workers):
    runtime = Runtime(torch.device("cuda"), batch_size=3, num_workers=workers)
    for batch, other in zip(load_batches(cityscapes, runtime), DataLoader(cityscapes, 3), strict=True):
        for tensor, reference in zip(batch, other, strict=True):
            assert tensor.is_pinned() and torch.equal(tensor, reference)


@pytest.mark.parametrize(
    ("device", "requested", "processors", "processes", "threads"),
    (
        ("cpu", None, 2, None, 2),
        ("cpu", None, 64, None, 4),
        ("cuda", None, 64, None, 16),
        ("cuda", None, 64, "8", 8),
        ("cuda", None, 4, "8", 1),
        ("cuda", 0, 64, "8", 0),
        ("cpu", 9, 2, None, 9),
    ),
)
def test_as_many_threads_decode_as_the_device_needs_and_the_machine_has(
    monkeypatch, device, requested, processors, processes, threads
):
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert decoding_threads(torch.device(device), requested) == threads
