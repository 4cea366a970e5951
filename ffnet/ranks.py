"""Several devices or machines, by PyTorch's own launcher: `torchrun --nproc-per-node=8 ffnet_quanteval.py ...`."""

import dataclasses
import datetime
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset

from ffnet.errors import UserError
from ffnet.quantize import quantizers

LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside WORLD_SIZE
PATIENCE = datetime.timedelta(hours=12)  # the others wait while rank 0 calibrates; torchrun ends them if it fails


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self):
        """Whether this process prints and writes."""
        return self.rank == 0


def join(device):
    """The Ranks that torchrun's environment tells of, connected; and the device of this one.

    UserError where that environment is not whole, or there are more processes than GPUs.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return Ranks(), device
    lacking = [name for name in LAUNCHED if not os.environ.get(name)]
    numbers = [world, *(os.environ.get(name, "") for name in LAUNCHED[:2])]
    if lacking or not all(map(str.isdecimal, numbers)) or int(numbers[1]) >= int(world):
        wrong = f"{lacking[0]} is not set" if lacking else f"it is {world!r} and RANK is {numbers[1]!r}"
        raise UserError(f"WORLD_SIZE is set, but {wrong}: start by torchrun, or unset WORLD_SIZE")
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: only {torch.cuda.device_count()} GPUs here; start at most so many")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # gloo for all: what is exchanged are a few small objects on the CPU.
    dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def leave(ranks):
    """Ends the connection."""
    if ranks.world > 1:
        dist.destroy_process_group()


def first_first(ranks, work):
    """`work()` of every rank, the first one's before the others': what it caches they find."""
    result = work() if ranks.is_first else None
    if ranks.world > 1:
        dist.barrier()
    return result if ranks.is_first else work()


def shard(dataset, ranks):
    """Every `world`-th image from `rank` on, without padding: some ranks have one more than others, or none."""
    if ranks.world == 1:
        return dataset
    return Subset(dataset, range(ranks.rank, len(dataset), ranks.world))


def share_encodings(sim, ranks):
    """Gives every rank's simulation the encodings of the first one's."""
    if ranks.world == 1:
        return
    holder = [{name: _on_cpu(quantizer.state_dict()) for name, quantizer in quantizers(sim)}]
    dist.broadcast_object_list(holder, src=0)
    if not ranks.is_first:
        for name, quantizer in quantizers(sim):
            quantizer.load_state_dict(holder[0][name])


def _on_cpu(state):
    """A state_dict that can be unpickled without a GPU context of its sender's."""
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def gather(scores, ranks):
    """The Scores of all ranks' images, in the order of the images, for the first rank; None for the others."""
    if ranks.world == 1:
        return scores
    parts = [None] * ranks.world if ranks.is_first else None
    dist.gather_object(scores, parts, dst=0)
    return merged(parts) if ranks.is_first else None


def merged(parts):
    """One Scores of strided shards; time is the slowest rank's."""
    first = parts[0]
    sizes = [part.batch_size for part in parts if part.batch_size]
    return dataclasses.replace(
        first,
        confusions={name: _woven([part.confusions[name] for part in parts]) for name in first.confusions},
        agreements={pair: _woven([part.agreements[pair] for part in parts]) for pair in first.agreements},
        pixels=max(part.pixels for part in parts),
        seconds={name: max(part.seconds[name] for part in parts) for name in first.seconds},
        scoring_seconds=max(part.scoring_seconds for part in parts),
        batch_size=min(sizes) if sizes else None,
        unsaved=next((part.unsaved for part in parts if part.unsaved), None),
    )


def _woven(shards):
    """Arrays of strided shards as the one array that they were cut from."""
    whole = np.empty((sum(map(len, shards)), *shards[0].shape[1:]), shards[0].dtype)
    for rank, rows in enumerate(shards):
        whole[rank :: len(shards)] = rows
    return whole
