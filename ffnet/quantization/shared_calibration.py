"""Calibrate one simulation on several processes, with the encodings that one process would find.

TF-Enhanced takes the range of its histograms from the first batch, which every process runs. Then each process runs
every n-th batch, and all of them add all counts in the order of the batches. The last batches, too few for all
processes, are run by every process again. Thus all processes end with the same histograms as a single one.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch.utils.data import Dataset, Subset

from ffnet.errors import UserError
from ffnet.evaluation.loading import Sample
from ffnet.evaluation.loop import calibration_batches, smaller_batch_size
from ffnet.evaluation.runtime import Runtime
from ffnet.memory import is_out_of_gpu_memory
from ffnet.quantization.quantsim import calibrate
from ffnet.quantization.tf_enhanced import Exchange, share_batches


def calibrate_on_ranks(
    sim: QuantizationSimModel, images: Dataset[Sample], runtime: Runtime, exchange: Exchange, processes: int
) -> int:
    """Calibrate a simulation, for which `can_share_batches` holds, in every process; return the batch size used.

    If a GPU runs out of memory in the first batch, calibration starts again with half the batch size everywhere.

    Raises:
        UserError: if its memory does not suffice for one image, or no longer for a later batch.
    """
    batch_size = runtime.batch_size
    while True:
        try:
            _calibrate(sim, images, dataclasses.replace(runtime, batch_size=batch_size), exchange, processes)
            return batch_size
        except _FirstBatchTooLargeError as error:
            batch_size = smaller_batch_size(batch_size, error)


class _FirstBatchTooLargeError(RuntimeError):
    """The memory of some process's GPU does not suffice for the first batch."""


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
    sim: QuantizationSimModel, images: Dataset[Sample], runtime: Runtime, exchange: Exchange, processes: int
) -> None:
    own, shared = own_batches(len(images), runtime.batch_size, exchange.rank, processes)  # type: ignore[arg-type]
    indices = [index for batch in own for index in batch]
    agreed = False

    def agree(fits: bool) -> None:
        """Tell the others whether the first batch fits, and raise an error if it does not fit everywhere."""
        nonlocal agreed
        agreed = True
        if any(exchange.gather(torch.tensor([0.0 if fits else 1.0]))):
            raise _FirstBatchTooLargeError("CUDA out of memory")

    def shared_in_turn(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for position, batch in enumerate(batches):
            if position == 1:
                agree(fits=True)
            share_batches(sim, exchange if 1 <= position <= shared else None)
            yield batch

    with contextlib.closing(calibration_batches(Subset(images, indices), runtime)) as batches:
        try:
            calibrate(sim, shared_in_turn(batches))
        except RuntimeError as error:
            if isinstance(error, _FirstBatchTooLargeError) or not is_out_of_gpu_memory(error):
                raise
            if agreed:
                raise UserError(
                    "GPU: its memory does not suffice for calibration. Give a smaller --batch-size."
                ) from error
            agree(fits=False)
        finally:
            share_batches(sim, None)
    if not agreed:
        agree(fits=True)
