"""Several processes on several devices, started by `torchrun --nproc-per-node=8 ffnet_quanteval.py ...`."""

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ffnet.system.errors import UserError
from ffnet.system.text import count, list_names

ENVIRONMENT = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")  # set by torchrun
TIMEOUT = datetime.timedelta(hours=12)  # for the main process's work; torchrun ends the others if it fails

NOTICE_SECONDS = 10.0  # wait for other ranks before it is said for whom
MEETING_SECONDS = 600.0  # wait for other ranks before giving up
POLL_SECONDS = 0.1

T = TypeVar("T")

logger = logging.getLogger(__name__)


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
        with _lost_ranks_named():
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
            with _lost_ranks_named():
                dist.all_gather_object(items, item)
        return items


@contextlib.contextmanager
def _lost_ranks_named() -> Iterator[None]:
    """Raise a UserError if another rank has ended while this one exchanges values with it."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"WORLD_SIZE: another rank of the run has ended ({str(error).partition('. ')[0]}). Its own messages say "
            "why. Start all ranks again."
        ) from error


@contextlib.contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    If `device` is "cuda", each process gets the GPU with its local rank.

    Raises:
        UserError: If the environment is incomplete, if there are more processes than GPUs, or if not all processes
            arrive within MEETING_SECONDS.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(0, 1, device)
        return
    _check_environment()
    if device != "cpu":
        device = _local_gpu(int(os.environ["LOCAL_RANK"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _meet(rank, world_size)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _check_environment() -> None:
    values = {name: os.environ.get(name, "") for name in ENVIRONMENT}
    world_size, rank, local_rank, port, address = values.values()
    numeric = all(map(str.isdecimal, (world_size, rank, local_rank, port)))
    if not (address and numeric) or int(rank) >= int(world_size) or not 0 < int(port) < 1 << 16:
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"WORLD_SIZE: the variables that torchrun sets are incomplete or contradict each other ({given}). A rank "
            "is less than WORLD_SIZE, and a port at most 65535. Start the program with torchrun, or unset WORLD_SIZE."
        )


def _meet(rank: int, world_size: int) -> None:
    """Wait until all processes have arrived, and form their process group.

    The calls of torch ignore signals, so they run in another thread, which is left alone if this one gives up.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    missing, failures = [other for other in range(world_size) if other != rank], list[Exception]()

    def arrive() -> None:
        try:
            store = _open_store(rank, world_size)
            while missing:
                missing[:] = [other for other in missing if not store.check([str(other)])]
                time.sleep(POLL_SECONDS)
            # gloo for all: only small objects on the CPU are exchanged.
            dist.init_process_group("gloo", timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=arrive, daemon=True)
    thread.start()
    begin, reported = time.monotonic(), False
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        waited = time.monotonic() - begin
        others = list_names([*map(str, missing)]) or "all"
        waiting = f"{place}: rank {rank} of {world_size} is waiting for rank {others}"
        if waited > NOTICE_SECONDS and not reported:
            logger.warning(f"{waiting}.")
            reported = True
        if waited > MEETING_SECONDS:
            raise UserError(
                f"{waiting}, and gives up after {MEETING_SECONDS:.0f} s. Start {world_size} processes with the "
                "same WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            )
    if failures:
        reason = str(failures[0]).partition("\n")[0]
        raise UserError(
            f"{place}: ranks can't meet at this MASTER_ADDR and MASTER_PORT ({reason}). Give the host of rank 0 and "
            "a free port of it, the same for all ranks."
        ) from failures[0]


def _open_store(rank: int, world_size: int) -> dist.Store:
    """Connect to the store that all ranks share, and record in it that this one has arrived."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.getaddrinfo(address, port)  # an error at once, while torch tries an unknown host again and again
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served_by_torchrun
    server = dist.TCPStore(address, port, None, serves, TIMEOUT, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt} of {world_size}", server)
    if store.add(str(rank), 1) > 1:
        raise ValueError(f"another process is rank {rank}, too")
    return store


def _local_gpu(local_rank: int) -> str:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"--nproc-per-node: this machine has {count(gpus, 'GPU')}. Start at most one process per GPU.")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"
