"""Measure times alternately, and print medians and tables."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ffnet.system.text import count

Seconds = dict[Any, list[float]]  # {name of a call: seconds of the call in each round}
MOST_CALLS = 100  # per round


def measure_alternately(
    calls: Mapping[Any, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    least_seconds: float = 0,
    warm_up: bool = True,
) -> Seconds:
    """Make all calls in turn in every round, so that changes of the machine's speed concern all of them.

    Args:
        calls: Functions by name.
        rounds: Number of rounds.
        clock: Returns seconds.
        least_seconds: A call that takes less is repeated in each round for about this time, and its mean is taken.
        warm_up: Make each call once before the first round; required by `least_seconds`.
    """
    seconds: Seconds = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items() if warm_up else ():
        call()
        once = _mean_seconds(call, 1, clock) if least_seconds else 1
        repeats[name] = min(max(round(least_seconds / max(once, 1e-9)), 1), MOST_CALLS)
    for _ in tqdm(range(rounds), "measure", unit="round", disable=None):
        for name, call in calls.items():
            seconds[name].append(_mean_seconds(call, repeats[name], clock))
    return seconds


def _mean_seconds(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(repeats):
        call()
    return (clock() - begin) / repeats


def synchronized_clock(device: str) -> float:
    """Return the time in seconds once the device has finished all its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def medians(seconds: Mapping[Any, Sequence[float]]) -> dict[Any, float]:
    """Return the median of each name over its rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over all rounds of the ratio of two values that were measured in the same round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is the heading."""
    heading, *others = rows
    return [markdown_row(heading), markdown_row(["---"] * len(heading)), *map(markdown_row, others)]


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def describe_machine(device: str = "cpu") -> str:
    """Return one line about the processor or GPU, and the version of torch."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    instructions = " with AVX-512 VNNI" if "avx512_vnni" in cpuinfo else ""
    cpu = names[0] if names else platform.machine()
    return f"{cpu}{instructions}, {count(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"
