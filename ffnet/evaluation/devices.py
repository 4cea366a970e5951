"""Copy batches to a device and measure the time of work on it, on a GPU without waiting for that work."""

import time
from collections.abc import Iterable, Iterator

import torch

from ffnet.evaluation.loading import Sample

Mark = float | torch.cuda.Event  # a moment: seconds on a CPU, an event in the stream of a GPU


def mark(device: str) -> Mark:
    """Mark the moment at which the device has finished the work that was queued until now."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Return the seconds between two marks; on a GPU, wait until the second one is reached."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def moved(batches: Iterable[Sample], device: str) -> Iterator[Sample]:
    """Yield batches on a device. On a GPU, the next one is copied, in a stream of its own, while this one is used."""
    if device == "cpu":
        yield from batches
        return
    stream, waiting = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            arrival = torch.cuda.Event()
            arrival.record()
        if waiting:
            yield _arrived(*waiting)
        waiting = (images, labels), arrival
    if waiting:
        yield _arrived(*waiting)


def _arrived(batch: Sample, arrival: torch.cuda.Event) -> Sample:
    """Let the current stream wait for a batch, and keep its memory until that stream has used it."""
    current = torch.cuda.current_stream(batch[0].device)
    current.wait_event(arrival)
    for tensor in batch:
        tensor.record_stream(current)
    return batch
