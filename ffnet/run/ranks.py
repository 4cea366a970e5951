"""Several processes on several devices, started by `torchrun --nproc-per-node=8 ffnet_quanteval.py ...`."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ffnet.system.errors import UserError
from ffnet.system.text import count

ENVIRONMENT = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
TIMEOUT = datetime.timedelta(hours=12)  # for the main process's work; torchrun ends the others if it fails

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; the only one without torchrun."""

    rank: int
    world_size: int
    device: str  # device of this process

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def once(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function on the main process; return its result, or raise its error, on every rank."""
        if self.world_size == 1:
            return function(*arguments)
        outcome: list[Any] = [None, None]  # result, error
        if self.is_main:
            try:
                outcome[0] = function(*arguments)
            except BaseException as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        result, failure = outcome
        if failure:
            raise failure
        return result

    def main_first(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function on the main process, then on the others, which find the files that it cached."""
        result = self.once(function, *arguments)
        return result if self.is_main else function(*arguments)

    def share_of(self, indices: np.ndarray) -> np.ndarray:
        """Return every `world_size`-th index from `rank` on; some ranks have one more than others, or none."""
        return indices[self.rank :: self.world_size]

    def all_gather(self, item: T) -> list[T]:
        """Return the items of all ranks, on every rank."""
        items: list[T] = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items


@contextlib.contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    If `device` is "cuda", each process gets the GPU with its local rank.

    Raises:
        UserError: If the environment is incomplete, or if there are more processes than GPUs.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(0, 1, device)
        return
    _check_environment()
    if device != "cpu":
        device = _local_gpu(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=TIMEOUT)  # gloo for all: only small objects on the CPU are exchanged
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _check_environment() -> None:
    values = {name: os.environ.get(name, "") for name in ENVIRONMENT}
    world_size, rank, local_rank, *_ = values.values()
    numeric = all(map(str.isdecimal, (world_size, rank, local_rank)))
    if not all(values.values()) or not numeric or int(rank) >= int(world_size):
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"WORLD_SIZE: the variables that torchrun sets are incomplete or contradict each other ({given}). Start "
            "the program with torchrun, or unset WORLD_SIZE."
        )


def _local_gpu(local_rank: int) -> str:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"--nproc-per-node: this machine has {count(gpus, 'GPU')}. Start at most one process per GPU.")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"
