"""The device and the data loading options that calibration and evaluation share."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Runtime:
    """Where networks run and how images are loaded."""

    device: torch.device = torch.device("cpu")
    batch_size: int = 8
    num_workers: int = 0  # threads that decode images; 0: the main thread does
    progress: bool = True  # show progress bars on stderr
    allow_tf32: bool = False  # on a GPU


def synchronized_clock(device: torch.device) -> float:
    """Return the time in seconds once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
