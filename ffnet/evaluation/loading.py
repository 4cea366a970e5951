"""Load images in batches. Threads decode ahead of the networks: decoders release Python's global lock."""

import contextlib
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from tqdm import tqdm

from ffnet.config import Runtime
from ffnet.labels import CITYSCAPES, LabelSet
from ffnet.system.errors import UserError, check_type
from ffnet.system.memory import is_out_of_memory

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, for RGB in 0..1; the published weights were trained with them
STD = (0.229, 0.224, 0.225)
MOST_THREADS, MOST_THREADS_GPU = 4, 16  # decoding threads; a GPU evaluates an image faster than one decodes it

# Image uint8 (3, h, w) and train ids uint8 (H, W), to whose size logits are upsampled; or a batch of both.
Sample = tuple[torch.Tensor, torch.Tensor]


@runtime_checkable
class Images(Protocol):
    """A map-style dataset, such as a CityscapesSplit or any torch Dataset with a length."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Return image uint8 (3, H, W) RGB and train ids uint8 or int64 (H, W), 255 if not scored."""
        ...


def label_set_of(images: Images) -> LabelSet:
    """Return the label set of a data set, its attribute `label_set`; that of Cityscapes if it has none."""
    return getattr(images, "label_set", CITYSCAPES)


@contextlib.contextmanager
def open_batches(images: Images, runtime: Runtime, title: str) -> Iterator[tuple[Iterator[Sample], "tqdm[Any]"]]:
    """Open `load_batches` with a progress bar of images. Worker threads stop on exit, even after an error."""
    check_type("images", images, Images, "Give a data set with a length, such as a CityscapesSplit")
    with (
        contextlib.closing(load_batches(images, runtime)) as batches,
        tqdm(None, title, len(images), unit="image", dynamic_ncols=True, disable=runtime.quiet) as bar,
    ):
        yield _advancing(batches, bar), bar


def _advancing(batches: Iterator[Sample], bar: "tqdm[Any]") -> Iterator[Sample]:
    """Yield batches, and advance the progress bar when the next one is asked for."""
    for batch in batches:
        yield batch
        bar.update(len(batch[0]))


def load_batches(images: Images, runtime: Runtime) -> Generator[Sample, None, None]:
    """Yield batches (images uint8 (N, 3, h, w), train ids uint8 (N, H, W)) in the order of `images`.

    A batch ends early if the next image or its label has another size. Batches are in pinned memory if the device is a
    GPU.

    Raises:
        DatasetError: If an image or a label is wrong, once its batch is due.
        UserError: If the memory does not suffice.
    """
    threads = decoding_threads(runtime)
    try:
        with contextlib.closing(_load_samples(images, threads, runtime.batch_size)) as samples:
            for _, neighbors in groupby(samples, describe_tensors):
                while batch := list(islice(neighbors, runtime.batch_size)):
                    yield _stack(batch, pin=runtime.on_gpu)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--batch-size {runtime.batch_size} and --num-workers {threads}: the memory does not suffice "
            "for decoding the images. Give smaller numbers, or run on a machine or in a container with more memory."
        ) from error


def decoding_threads(runtime: Runtime) -> int:
    """Return the number of threads that decode images in this process.

    Without `runtime.num_workers` it is up to MOST_THREADS. All processes of torchrun on this machine together take at
    most one thread per processor.
    """
    if runtime.num_workers is not None:
        return runtime.num_workers
    processors = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS_GPU if runtime.on_gpu else MOST_THREADS, processors))


def evenly_spaced(number: int, wanted: int | Literal["all"]) -> np.ndarray:
    """Return the indices of `wanted` of `number` images, from the first to the last."""
    return np.linspace(0, number - 1, number if wanted == "all" else min(number, wanted)).round().astype(np.int64)


def every_nth(number: int, wanted: int | Literal["all"]) -> np.ndarray:
    """Return the indices of `wanted` of `number` images at equal distances from 0, as Qualcomm AI Hub chooses them."""
    chosen = number if wanted == "all" else min(number, wanted)
    return np.arange(chosen) * (number // chosen)


def _load_samples(images: Images, threads: int, batch_size: int) -> Generator[Sample, None, None]:
    """Yield every sample, decoded one batch ahead by `threads` threads, or by the caller's thread if there are 0."""
    if not threads:
        yield from (images[index] for index in range(len(images)))
        return
    pending: deque[Future[Sample]] = deque()
    executor = ThreadPoolExecutor(threads, "decode")
    try:
        for index in range(len(images)):
            pending.append(executor.submit(images.__getitem__, index))
            if len(pending) > batch_size + threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # an interrupted run does not wait for images


def _stack(samples: Sequence[Sample], pin: bool) -> Sample:
    """Return a batch, the images in the channels-last layout of decoded PNGs: other layouts take a slower copy.

    A single image is not copied.
    """
    if not _is_sample(samples[0]):
        raise UserError(
            f"images: a sample is {describe_tensors(samples[0])}. Each must be an image and its train ids, uint8 "
            "[3, H, W] and uint8 [H, W]."
        )
    images, labels = zip(*samples, strict=True)
    batch = images[0][None], torch.stack(labels).byte()
    if len(images) > 1:
        batch = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), batch[1]
    return (batch[0].pin_memory(), batch[1].pin_memory()) if pin else batch


def _is_sample(value: Any) -> bool:
    """Return whether a value is an image and its train ids."""
    if not isinstance(value, tuple | list) or [isinstance(each, torch.Tensor) for each in value] != [True, True]:
        return False
    image, labels = value
    types = image.dtype == torch.uint8 and labels.dtype in (torch.uint8, torch.int64)
    return types and labels.dim() == 2 and image.dim() == 3 and len(image) == 3


def describe_tensors(value: object) -> str:
    """Return the dtype and shape of a tensor, or those of several in parentheses; the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe_tensors, value))})"
    return type(value).__name__


def normalize(images: torch.Tensor, allow_tf32: bool = False) -> torch.Tensor:
    """Return uint8 RGB images (N, 3, H, W) as normalized float32 on the same device, in its `memory_format`."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    # A new tensor: the strides of a single image would not say channels_last, and convolutions would convert it.
    inputs = torch.empty_like(images, dtype=torch.float32, memory_format=memory_format(images.device, allow_tf32))
    return inputs.copy_(images).div_(255).sub_(mean).div_(std)


def denormalize(inputs: torch.Tensor) -> torch.Tensor:
    """Return the bytes of normalized images, as whole numbers float32: the inverse of `normalize`."""
    mean, std = (torch.tensor(values, device=inputs.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((inputs * std + mean) * 255).round()


def memory_format(device: torch.device, allow_tf32: bool = False) -> torch.memory_format:
    """Return the memory format for fast convolutions.

    On a CPU, channels_last saves a third of their time. On a GPU it is faster on the tensor cores, which compute in
    TF32, and slower without them.
    """
    return torch.channels_last if device.type == "cpu" or allow_tf32 else torch.contiguous_format
