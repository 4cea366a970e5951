"""What an ONNX file takes as its image: the range of the values and the order of the channels, and how this is found.

The evaluation loop hands normalized RGB images to every backend. A file that normalizes inside gets them converted
back. What it takes is given by options, or read from its first operations, or found by a trial on a few images.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ffnet.config import CHANNEL_ORDERS, VALUE_RANGES
from ffnet.evaluation.loading import MEAN, denormalize
from ffnet.onnx.input_operations import FirstOperations

NORMALIZED, ZERO_TO_ONE, ZERO_TO_255 = VALUE_RANGES
RGB, BGR = CHANNEL_ORDERS
OPTIONS = ("--onnx-input", "--onnx-channels")
CLEAR_MARGIN = 5.0  # percentage points of mIoU by which a choice must exceed the others in the trial
LEAST_MIOU = 20.0  # percent; a network that is worse with every choice tells nothing
MEAN_TOLERANCE = 0.012  # of a mean in 0..1; more than 8 bits round, and less than half of what the channels differ by


@dataclass(frozen=True)
class InputFormat:
    """What a file takes, and why it is thought to."""

    value_range: str = NORMALIZED  # of VALUE_RANGES
    channels: str = RGB  # of CHANNEL_ORDERS
    reason: str = ""  # one or more sentences

    def convert(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalized RGB images (N, 3, H, W) float32 as the file takes them, float32.

        The images must be those of `normalize`: their bytes are restored exactly.
        """
        if self.value_range != NORMALIZED:
            images = denormalize(images)
        if self.value_range == ZERO_TO_ONE:
            images = images / 255
        return images.flip(1) if self.channels == BGR else images

    def describe(self) -> str:
        """Return a sentence on what the file is fed, and the reason."""
        return f"The file is fed images in {self.short_name()}. {self.reason}".rstrip()

    def short_name(self) -> str:
        """Return channels and value range as a phrase."""
        values = {NORMALIZED: "normalized", ZERO_TO_ONE: "0..1", ZERO_TO_255: "0..255"}[self.value_range]
        return f"{self.channels.upper()}, {values}"


NORMALIZED_RGB = InputFormat()


@dataclass(frozen=True)
class Finding:
    """A choice, with a sentence that says why; no choice if the value is None."""

    value: str | None = None
    reason: str = ""


def find_value_range(first: FirstOperations) -> Finding:
    """Return which range the first operations of a file are made for."""
    mean = _mean(first)
    names = ", ".join(first.nodes)
    unit = None if mean is None else _unit(mean)
    if mean is not None and unit:
        shown = ", ".join(f"{value:.4g}" for value in mean)
        return Finding(unit, f"Its first operations ({names}) subtract a mean of {shown}.")
    if mean is None and np.allclose(first.scale * 255, 1, atol=0.02):
        return Finding(ZERO_TO_255, f"Its first operations ({names}) divide by 255.")
    if first.quantized_range is None:
        return Finding()
    low, high = first.quantized_range
    return Finding(_quantized_for(low, high), f"Its input is quantized for {low:.3g} to {high:.3g}.")


def _mean(first: FirstOperations) -> np.ndarray | None:
    """Return what the first operations subtract from the channels, in units of the input; None if nothing."""
    if not first.nodes or np.any(first.scale == 0) or np.allclose(first.offset, 0, atol=1e-3):
        return None
    return -first.offset / first.scale


def _unit(mean: np.ndarray) -> str | None:
    """Return the range whose images have about this mean; None if none has."""
    bounds = {ZERO_TO_ONE: (0.2, 0.8), ZERO_TO_255: (51, 204)}
    return next((name for name, (low, high) in bounds.items() if np.all((low < mean) & (mean < high))), None)


def _quantized_for(low: float, high: float) -> str | None:
    """Return the range for which the quantizer of an input is made; None if that is not clear."""
    symmetric = abs(low + high) < 0.02 * high
    if 100 < high < 280 and (symmetric or low > -5):
        return ZERO_TO_255
    if 0.5 < high < 1.15 and (symmetric or low > -0.05):
        return ZERO_TO_ONE
    return NORMALIZED if -3.2 < low < -0.8 and 0.8 < high < 3.2 and not (symmetric and high < 1.5) else None


def find_channels(first: FirstOperations) -> Finding:
    """Return which order of channels the first operations of a file are made for."""
    mean = _mean(first)
    unit = None if mean is None else _unit(mean)
    if mean is not None and unit is not None:
        mean = mean / (255 if unit == ZERO_TO_255 else 1)
        for order, expected in ((RGB, MEAN), (BGR, MEAN[::-1])):
            if np.allclose(mean, expected, atol=MEAN_TOLERANCE, rtol=0):
                return Finding(order, f"The mean's channels are those of ImageNet in the order {order.upper()}.")
    if first.reversed_by:
        return Finding(BGR, f"It reverses the channels ({first.reversed_by}), and FFNets take RGB.")
    return Finding()


def choose_input(
    first: FirstOperations, given: tuple[str | None, str | None], trial: Callable[[InputFormat], float]
) -> InputFormat:
    """Return what a file takes.

    Args:
        first: the file's first operations.
        given: value range and channels that options name.
        trial: returns the mIoU of a format on a few images, in percent.
    """
    findings = [
        Finding(value, f"{option} says so.") if value else find(first)
        for value, option, find in zip(given, OPTIONS, (find_value_range, find_channels), strict=True)
    ]
    if all(finding.value for finding in findings):
        return _format(*findings)
    ranges, orders = (
        (finding.value,) if finding.value else every
        for finding, every in zip(findings, (VALUE_RANGES, CHANNEL_ORDERS), strict=True)
    )
    choices = [InputFormat(*pair) for pair in itertools.product(ranges, orders)]
    mious = {choice: trial(choice) for choice in choices}
    decided = decide({(choice.value_range, choice.channels): miou for choice, miou in mious.items()})
    shown = "; ".join(f"{choice.short_name()}: {_percent(miou)}" for choice, miou in mious.items())
    return _tried(findings, decided, shown)


def _percent(miou: float) -> str:
    return "undefined" if math.isnan(miou) else f"{miou:.2f}"


def decide(mious: Mapping[tuple[str, str], float]) -> tuple[str | None, str | None]:
    """Return the value range and the channels that are clearly right by the mIoU of {(value range, channels): mIoU}.

    None for what is not clear. Channels are compared only for a clear range, because without it neither is right.
    """
    ranges, orders = (dict.fromkeys(pair[position] for pair in mious) for position in (0, 1))
    best = {name: max(mious[name, order] for order in orders) for name in ranges}
    value_range = _clearly_largest(best)
    if value_range is None:
        return None, None
    return value_range, _clearly_largest({order: mious[value_range, order] for order in orders})


def _clearly_largest(mious: Mapping[str, float]) -> str | None:
    """Return the name with the largest value if it is clearly above all others and not useless; None otherwise."""
    name = max(mious, key=lambda key: -1 if math.isnan(mious[key]) else mious[key])
    others = [0 if math.isnan(value) else value for key, value in mious.items() if key != name]
    if len(mious) == 1:
        return name
    clear = mious[name] >= LEAST_MIOU and all(mious[name] - value >= CLEAR_MARGIN for value in others)
    return name if clear else None


def _tried(findings: Iterable[Finding], decided: tuple[str | None, str | None], shown: str) -> InputFormat:
    """Return the format that findings and trial leave, and normalized RGB for what neither tells."""
    told, untold = [], []
    for finding, value, usual, option in zip(findings, decided, (NORMALIZED, RGB), OPTIONS, strict=True):
        if finding.value:
            told.append(finding)
        elif value:
            told.append(Finding(value))
        else:
            told.append(Finding(usual))
            untold.append(option)
    trial = f"mIoU on a few images, in percent: {shown}."
    if untold:
        trial += f" This does not tell clearly; if it is wrong, give {' and '.join(untold)}."
    value_range, channels = (finding.value or "" for finding in told)
    reasons = [finding.reason for finding in told if finding.reason]
    return InputFormat(value_range, channels, " ".join([*reasons, trial]))


def _format(value_range: Finding, channels: Finding) -> InputFormat:
    reasons = dict.fromkeys((value_range.reason, channels.reason))
    return InputFormat(value_range.value or "", channels.value or "", " ".join(reasons))
