"""Load images in batches. Threads decode ahead of the networks: decoders release Python's global lock."""

import contextlib
import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ffnet.evaluation.runtime import Runtime
from ffnet.system.errors import UserError
from ffnet.system.memory import is_out_of_memory

MOST_THREADS = {
    "cpu": 4,
    "cuda": 16,
}  # that decode, by device: a GPU evaluates an image faster than one thread decodes it

Sample = tuple[torch.Tensor, torch.Tensor]  # image uint8 (3, H, W), train ids uint8 (H, W); or a batch of both


@contextlib.contextmanager
def open_batches(images: Dataset[Sample], runtime: Runtime, title: str) -> Iterator["tqdm[Sample]"]:
    """Open what `load_batches` yields, with a progress bar; at the end, also an early one, its threads end."""
    total = math.ceil(len(images) / runtime.batch_size)  # type: ignore[arg-type]
    with (
        contextlib.closing(load_batches(images, runtime)) as batches,
        tqdm(batches, title, total, unit="batch", dynamic_ncols=True, disable=not runtime.progress) as bar,
    ):
        yield bar


def load_batches(images: Dataset[Sample], runtime: Runtime) -> Generator[Sample, None, None]:
    """Yield batches (images uint8 (N, 3, H, W), train ids uint8 (N, H, W)) in the order of `images`.

    The batches are in pinned memory if the device is a GPU.

    Raises:
        DatasetError: if an image or a label is wrong, once its batch is due.
        UserError: if the memory does not suffice, or if the threads can't be started.
    """
    load = _load_in_threads if runtime.num_workers else _load_one_by_one
    try:
        with contextlib.closing(load(images, runtime)) as samples:
            while batch := list(islice(samples, runtime.batch_size)):
                yield _stack(batch, pin=runtime.device.type == "cuda")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--batch-size {runtime.batch_size} and --num-workers {runtime.num_workers}: the memory does not suffice "
            "for decoding the images. Give smaller numbers, or run on a machine or in a container with more memory."
        ) from error


def decoding_threads(device: torch.device, requested: int | None = None) -> int:
    """Return the number of threads that decode images in this process.

    It is the requested number or, if that is None, up to MOST_THREADS; all processes of torchrun on this machine
    together take at most one per processor.
    """
    if requested is not None:
        return requested
    processors = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS[device.type], processors))


def evenly_spaced(number: int, wanted: int | Literal["all"]) -> np.ndarray:
    """Return the indices of `wanted` of `number` images, from the first to the last."""
    return np.linspace(0, number - 1, number if wanted == "all" else min(number, wanted)).round().astype(np.int64)


def _load_one_by_one(images: Dataset[Sample], runtime: Runtime) -> Generator[Sample, None, None]:
    """Yield every sample, decoded by this thread."""
    for index in range(len(images)):  # type: ignore[arg-type]
        yield images[index]


def _load_in_threads(images: Dataset[Sample], runtime: Runtime) -> Generator[Sample, None, None]:
    """Yield every sample, decoded by threads that are one batch, and one image per thread, ahead."""
    pending: deque[Future[Sample]] = deque()
    executor = ThreadPoolExecutor(runtime.num_workers, "decode")
    try:
        for index in range(len(images)):  # type: ignore[arg-type]
            pending.append(_submit(executor, images, index))
            if len(pending) > runtime.batch_size + runtime.num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # an interrupted run does not wait for images


def _submit(executor: ThreadPoolExecutor, images: Dataset[Sample], index: int) -> Future[Sample]:
    try:
        return executor.submit(images.__getitem__, index)
    except RuntimeError as error:
        raise UserError(
            f"--num-workers: a thread that decodes images can't be started ({error}). Give a smaller number, or 0."
        ) from error


def _stack(samples: Sequence[Sample], pin: bool) -> Sample:
    """Return a batch, the images in the channels-last layout of decoded PNGs: other layouts take a slower copy.

    A single sample is not copied.
    """
    images, labels = zip(*samples, strict=True)
    if len(samples) == 1:
        batch = images[0][None], labels[0][None]
    else:
        batch = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.stack(labels)
    return (batch[0].pin_memory(), batch[1].pin_memory()) if pin else batch
