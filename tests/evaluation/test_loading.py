"""Batches are those of torch's DataLoader, whatever decodes the images, and threads neither outlive a run nor hang."""

import itertools
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from datasets import DatasetError
from ffnet.config import Runtime
from ffnet.evaluation.loading import (
    decoding_threads,
    denormalize,
    evenly_spaced,
    every_nth,
    load_batches,
    normalize,
    open_batches,
)
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
    return load_batches(images, Runtime(batch_size=batch_size, num_workers=workers))


def assert_threads_end():
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("decode") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", (0, 3))
def test_batches_equal_those_of_torchs_loader_in_the_same_order(cityscapes, workers):
    found, expected = list(loader(cityscapes, workers, 3)), list(DataLoader(cityscapes, 3))
    assert [len(images) for images, _ in found] == [3, 3, 1]
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, reference) for tensor, reference in zip(batch, other, strict=True))


def test_a_subset_is_a_dataset_of_its_own():
    batches = loader(Subset(Recorder(9), [7, 2, 4]), 2)
    assert [images.flatten(1)[:, 0].tolist() for images, _ in batches] == [[7, 2], [4]]


def test_every_nth_image_is_chosen_as_ai_hub_chooses_them():
    assert every_nth(500, 50).tolist() == list(range(0, 500, 10))
    assert every_nth(24, 5).tolist() == [0, 4, 8, 12, 16] and every_nth(3, 5).tolist() == [0, 1, 2]


def test_evenly_spaced_images_include_the_first_and_the_last():
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8] and evenly_spaced(9, 1).tolist() == [0]
    assert evenly_spaced(3, 5).tolist() == evenly_spaced(3, "all").tolist() == [0, 1, 2]


def test_threads_decode_at_most_one_batch_and_one_image_each_ahead():
    images = Recorder(60)
    for number, (batch, _) in enumerate(loader(images, 3, batch_size=4), start=1):
        assert batch.flatten(1)[:, 0].tolist() == list(range(4 * number - 4, 4 * number))
        time.sleep(0.02)
        assert len(images.decoded) <= 4 * number + 4 + 3
    assert sorted(images.decoded) == list(range(60))


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
def test_too_little_memory_is_an_error_that_says_what_to_do(failure):
    with pytest.raises(UserError, match="the memory does not suffice for decoding .* Give smaller numbers"):
        list(loader(Recorder(9, failure), 2))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(loader(Recorder(9, RuntimeError("shape mismatch")), 2))


def test_threads_end_with_a_run_that_ends_early():
    images = Recorder(1000)
    runtime = Runtime(batch_size=2, num_workers=2)
    with pytest.raises(KeyboardInterrupt) as caught, open_batches(images, runtime, "x") as (batches, _):
        for _ in batches:
            raise KeyboardInterrupt
    assert caught.tb is not None  # a traceback that keeps the generator alive keeps no thread alive
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


@pytest.mark.cuda
def test_batches_for_a_gpu_are_in_pinned_memory(cityscapes):
    batches = load_batches(cityscapes, Runtime("cuda:0", batch_size=3))
    assert all(tensor.is_pinned() for batch in batches for tensor in batch)


def test_as_many_threads_decode_as_the_device_needs_and_the_machine_has(monkeypatch):
    for device, requested, processors, processes, threads in (
        ("cpu", None, 64, "1", 4),
        ("cuda:0", None, 64, "1", 16),
        ("cuda:0", None, 64, "8", 8),
        ("cuda:0", None, 4, "8", 1),
        ("cuda:0", 0, 64, "8", 0),
    ):
        monkeypatch.setattr("os.cpu_count", lambda number=processors: number)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert decoding_threads(Runtime(device, num_workers=requested)) == threads


def test_images_are_normalized_with_the_published_mean_and_deviation():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert torch.allclose(normalize(image).flatten(), torch.tensor(expected), atol=1e-6)


def test_normalized_bytes_are_restored_exactly():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(denormalize(normalize(image)), image.float())
