"""Calibrate one simulation on several processes, with the encodings that one process would find.

TF-Enhanced takes the range of its histograms from the first batch, which every process runs. Then each process runs
every n-th batch, and all of them add all counts in the order of the batches. The remaining batches, fewer than the
processes, are run by every process. Thus all processes end with the same histograms as a single one.

A process that runs out of memory tells the others, wherever they are: it sends NaN when they next exchange values.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch.utils.data import Dataset, Subset

from ffnet.config import Runtime
from ffnet.evaluation.loading import Sample
from ffnet.evaluation.loop import calibration_batches, smaller_batch_size
from ffnet.quantization.quantsim import calibrate
from ffnet.quantization.tf_enhanced import MESSAGE_LENGTH, Exchange, share_batches
from ffnet.system.memory import is_out_of_gpu_memory


class _OutOfMemoryError(RuntimeError):
    """The memory of some process's GPU does not suffice for a batch."""


@dataclass(frozen=True)
class _FailureSharing:
    """An exchange in which a process whose GPU runs out of memory sends NaN in place of its next values."""

    exchange: Exchange

    @property
    def rank(self) -> int:
        return self.exchange.rank

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return the values of all processes; raise an _OutOfMemoryError in all of them if one has failed."""
        found = self.exchange.gather(values)
        if any(each.isnan().any() for each in found):
            raise _OutOfMemoryError("CUDA out of memory")
        return found


def calibrate_on_ranks(
    sim: QuantizationSimModel, images: Dataset[Sample], runtime: Runtime, exchange: Exchange, processes: int
) -> int:
    """Calibrate a simulation, for which `can_share_batches` holds, in every process; return the batch size used.

    If a GPU runs out of memory, calibration starts again with half the batch size everywhere.

    Raises:
        UserError: if its memory does not suffice for one image.
    """
    batch_size, sharing = runtime.batch_size, _FailureSharing(exchange)
    while True:
        try:
            _calibrate(sim, images, dataclasses.replace(runtime, batch_size=batch_size), sharing, processes)
            return batch_size
        except _OutOfMemoryError as error:
            batch_size = smaller_batch_size(batch_size, error)


def own_batches(images: int, batch_size: int, rank: int, processes: int) -> tuple[list[Sequence[int]], int]:
    """Return the batches that a process runs, as indices of images, and how many of them, after the first, are shared.

    Args:
        images: their number.
        batch_size: of all batches but the last one.
        rank: of the process.
        processes: their number.
    """
    batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
    shared = (len(batches) - 1) // processes
    stop = 1 + shared * processes
    return [batches[0], *batches[1 + rank : stop : processes], *batches[stop:]], shared


def _calibrate(
    sim: QuantizationSimModel, images: Dataset[Sample], runtime: Runtime, sharing: _FailureSharing, processes: int
) -> None:
    own, shared = own_batches(len(images), runtime.batch_size, sharing.rank, processes)  # type: ignore[arg-type]
    indices = [index for batch in own for index in batch]

    def shared_in_turn(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for position, batch in enumerate(batches):
            share_batches(sim, sharing if 1 <= position <= shared else None)
            yield batch

    with contextlib.closing(calibration_batches(Subset(images, indices), runtime)) as batches:
        try:
            calibrate(sim, shared_in_turn(batches))
        except _OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                raise
            sharing.gather(torch.full((MESSAGE_LENGTH,), torch.nan))
        finally:
            share_batches(sim, None)
    sharing.gather(torch.zeros(MESSAGE_LENGTH))  # no process ends while another one may fail
