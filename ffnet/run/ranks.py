"""Several processes on several devices, started by `torchrun --nproc-per-node=8 ffnet_quanteval.py ...`."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.state import read_state, write_state
from ffnet.system.errors import UserError
from ffnet.system.text import count

ENVIRONMENT = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
TIMEOUT = datetime.timedelta(hours=12)  # the others wait while rank 0 calibrates; torchrun ends them if it fails

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class TensorExchange:
    """The processes that torchrun started, as `quantization.tf_enhanced.Exchange`."""

    rank: int
    world_size: int

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return the values, on the CPU, of all processes in the order of their ranks, in every process."""
        found = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(found, values.contiguous())
        return found


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; the only one without torchrun."""

    rank: int
    world_size: int
    device: torch.device  # of this process
    several_nodes: bool = False  # whether some of the processes are on other machines

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def main_process_first(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the main process first, then in the others, which find the files that it cached."""
        if self.is_main:
            result = function(*args, **kwargs)
        if self.world_size > 1:
            dist.barrier()
        return result if self.is_main else function(*args, **kwargs)

    def share_of(self, indices: np.ndarray) -> np.ndarray:
        """Return every `world_size`-th index from `rank` on; some ranks have one more than others, or none."""
        return indices[self.rank :: self.world_size]

    def share(self, item: T | None) -> T:
        """Return the main process's item in every process; the other processes' items are ignored."""
        items = [item]
        if self.world_size > 1:
            dist.broadcast_object_list(items, src=0)
        return cast(T, items[0])

    def share_state(self, sim: QuantizationSimModel) -> None:
        """Copy the encodings and weights of the main process's simulation to every other process's."""
        if self.world_size == 1:
            return
        state = self.share(read_state(sim) if self.is_main else None)
        if not self.is_main:
            write_state(sim, state)

    def gather(self, item: T) -> list[T] | None:
        """Return the items of all ranks in the main process, None in every other process."""
        if self.world_size == 1:
            return [item]
        items: list[T] | None = [item] * self.world_size if self.is_main else None
        dist.gather_object(item, items, dst=0)
        return items


@contextlib.contextmanager
def session(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    If `device` is "cuda", each process gets the GPU with its local rank.

    Raises:
        UserError: if the environment is incomplete, or if there are more processes than GPUs.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(0, 1, device)
        return
    _check_environment()
    if device.type == "cuda":
        device = _local_gpu(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=TIMEOUT)  # gloo for all: only small objects on the CPU are exchanged
    try:
        world_size = dist.get_world_size()
        several_nodes = world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        yield Ranks(dist.get_rank(), world_size, device, several_nodes)
    finally:
        dist.destroy_process_group()


def _check_environment() -> None:
    values = {name: os.environ.get(name, "") for name in ENVIRONMENT}
    world_size, rank, local_rank, *_ = values.values()
    numeric = all(map(str.isdecimal, (world_size, rank, local_rank)))
    if not all(values.values()) or not numeric or int(rank) >= int(world_size):
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        problem = f"WORLD_SIZE: the variables that torchrun sets are incomplete or contradict each other ({given})."
        raise UserError(f"{problem} Start the program with torchrun, or unset WORLD_SIZE.")


def _local_gpu(local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"--nproc-per-node: only {count(gpus, 'GPU')} found here. Start at most one process per GPU.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
