"""What an ONNX file takes as its image: the range of the values and the order of the channels.

The evaluation loop hands normalized RGB images to every backend; for other files they are converted back. What a file
takes is given by options, or by the metadata of this project's exports, or is found by a trial on a few images.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch

from ffnet.config import CHANNEL_ORDERS, VALUE_RANGES
from ffnet.evaluation.loading import denormalize

NORMALIZED, ZERO_TO_ONE, ZERO_TO_255 = VALUE_RANGES
RGB, BGR = CHANNEL_ORDERS
OPTIONS = ("--onnx-input", "--onnx-channels")
CHOICES = (VALUE_RANGES, CHANNEL_ORDERS)
METADATA = ("ffnet.input", "ffnet.channels")  # keys of an ONNX file's metadata
METADATA_OF_EXPORTS = dict(zip(METADATA, (NORMALIZED, RGB), strict=True))
CLEAR_MARGIN = 5.0  # percentage points of mIoU by which a choice must exceed the others in the trial
LEAST_MIOU = 20.0  # percent; below this mIoU the trial is inconclusive


@dataclass(frozen=True)
class InputFormat:
    """What a file takes, and how this was found."""

    value_range: str = NORMALIZED  # one of VALUE_RANGES
    channels: str = RGB  # one of CHANNEL_ORDERS
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
        return f"The file is fed images in {self.short_name()}. {self.reason}"

    def short_name(self) -> str:
        """Return channels and value range as a phrase."""
        values = {NORMALIZED: "normalized", ZERO_TO_ONE: "0..1", ZERO_TO_255: "0..255"}[self.value_range]
        return f"{self.channels.upper()}, {values}"


NORMALIZED_RGB = InputFormat()


def choose_input(
    proto: onnx.ModelProto, given: Sequence[str | None], trial: Callable[[InputFormat], float]
) -> InputFormat:
    """Return what a file takes.

    Args:
        proto: The file.
        given: Value range and channels that options name; None for what is not given.
        trial: Returns the mIoU of a format on a few images, in percent; called only if a choice is left.
    """
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    values: list[str | None] = []
    reasons = []
    for value, option, key, choices in zip(given, OPTIONS, METADATA, CHOICES, strict=True):
        saved = metadata.get(key) if metadata.get(key) in choices else None
        values.append(value or saved)
        if value or saved:
            reasons.append(f"{option} says so." if value else "Its metadata says so.")
    if None in values:
        values, reason = _try_formats(values, trial)
        reasons.append(reason)
    return InputFormat(values[0] or NORMALIZED, values[1] or RGB, " ".join(dict.fromkeys(reasons)))


def _try_formats(known: Sequence[str | None], trial: Callable[[InputFormat], float]) -> tuple[list[str | None], str]:
    """Try all formats with what is known of value range and channels; return what is known or clear, and the reason."""
    ranges, orders = ((value,) if value else choices for value, choices in zip(known, CHOICES, strict=True))
    mious = {pair: trial(InputFormat(*pair)) for pair in itertools.product(ranges, orders)}
    found = [value or choice for value, choice in zip(known, decide(mious), strict=True)]
    shown = "; ".join(f"{InputFormat(*pair).short_name()}: {miou:.2f}" for pair, miou in mious.items())
    unclear = [option for option, value in zip(OPTIONS, found, strict=True) if value is None]
    remedy = f" This is inconclusive; if the choice is wrong, give {' and '.join(unclear)}." if unclear else ""
    return found, f"mIoU on a few images, in percent: {shown}.{remedy}"


def decide(mious: Mapping[tuple[str, str], float]) -> tuple[str | None, str | None]:
    """Return the value range and the channels that are clearly right by the mIoU of {(value range, channels): mIoU}.

    None for what is not clear. Channels are compared only for a clear range, because without it neither is right.
    """
    finite = {pair: 0.0 if math.isnan(miou) else miou for pair, miou in mious.items()}
    best = max(finite, key=finite.__getitem__)

    def is_clear(others: Sequence[float]) -> bool:
        return not others or (finite[best] >= LEAST_MIOU and finite[best] - max(others) >= CLEAR_MARGIN)

    if not is_clear([miou for (value_range, _), miou in finite.items() if value_range != best[0]]):
        return None, None
    channels_clear = is_clear([miou for pair, miou in finite.items() if pair[0] == best[0] and pair != best])
    return best[0], best[1] if channels_clear else None
