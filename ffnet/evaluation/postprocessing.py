"""Convert logits to train ids at the label's size, and count confusion matrices, on the device of the network.

The predictions are those of bilinear upsampling (align_corners=False) and argmax, pixel for pixel. The compiled kernel
interpolates and keeps the two largest logits per pixel, so that full-size logits are never written. Pixels at which
these two are so close that rounding decides (near ties) are computed again with torch's own upsampling.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ffnet.evaluation import metrics

Kernel = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]  # `two_largest`, compiled

FACTORS = (4, 8)  # upsampling factors for which the kernel's weights are exact in float32
TOLERANCE = 2e-6  # for a near tie, relative to the largest logit: above the rounding errors of upsampling
MAX_NEAR_TIES = 1 / 256  # share of pixels; with more of them, everything is upsampled
NEAR_TIE = 128  # added to the train id of a pixel that is a near tie
SMALL = 128  # output rows plus columns up to which torch upsamples by other code, which rounds differently


def predict(logits: torch.Tensor, size: Sequence[int], kernel: Kernel | None = None) -> torch.Tensor:
    """Return train ids (N, H, W) uint8 of logits (N, classes, h, w) float32 at `size` (H, W)."""
    logits = logits.contiguous()
    height, width = logits.shape[2:]
    factor = size[0] // height
    supported = factor in FACTORS and tuple(size) == (height * factor, width * factor) and min(height, width) > 1
    supported = supported and logits.shape[1] <= NEAR_TIE
    if kernel and supported and size[1] > SMALL and (largest := logits.abs().amax()).isfinite():
        # One image at a time, and the tolerance as a tensor: the kernel is compiled for one shape and no value.
        padded = F.pad(logits, (1, 1, 1, 1), mode="replicate")
        ids = torch.cat([_assemble(kernel(image, factor, TOLERANCE * largest)) for image in padded.split(1)])
        if (ids >= NEAR_TIE).sum() <= MAX_NEAR_TIES * ids.numel():
            return _resolve_near_ties(logits, ids, factor)
    return upsample(logits, size).max(1).indices.to(torch.uint8)


def upsample(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return logits (N, classes, H, W) at `size` (H, W), upsampled as in the published evaluation."""
    return F.interpolate(logits, list(size), mode="bilinear", align_corners=False)


def two_largest(padded: torch.Tensor, factor: int, tolerance: torch.Tensor) -> torch.Tensor:
    """Return the train id per pixel, plus NEAR_TIE if the second largest logit is within `tolerance`; to be compiled.

    A cell lies between the centers of four logits. Its factor x factor pixels are separate planes, so that every plane
    is a weighted sum of four shifted copies of the logits, contiguous and without gathers. Padding and assembling the
    planes stay outside: with either of them in the kernel it takes five times as long. `padded` holds logits
    (N, classes, h + 2, w + 2) with their border repeated; the planes are (factor, factor, N, h + 1, w + 1) uint8.
    """
    weight = (torch.arange(factor, device=padded.device) + 0.5) / factor
    lower, right = weight.view(-1, 1, 1, 1, 1), weight.view(-1, 1, 1, 1)

    def logits_of_class(k: int) -> torch.Tensor:
        plane = padded[:, k]
        rows = plane[:, :-1] * (1 - lower) + plane[:, 1:] * lower
        return rows[..., :-1] * (1 - right) + rows[..., 1:] * right

    best = logits_of_class(0)
    second, index = torch.full_like(best, -math.inf), torch.zeros_like(best)
    for k in range(1, padded.shape[1]):
        value = logits_of_class(k)
        second = torch.maximum(second, torch.minimum(best, value))
        index = torch.where(value > best, k, index)
        best = torch.maximum(best, value)
    return index.to(torch.uint8) + (best - second <= tolerance).to(torch.uint8) * NEAR_TIE


def _assemble(planes: torch.Tensor) -> torch.Tensor:
    """Return the pixels (N, H, W) of the kernel's planes, without the half cells beyond the border."""
    factor, _, n, rows, columns = planes.shape
    half = factor // 2
    ids = planes.permute(2, 3, 0, 4, 1).reshape(n, rows * factor, columns * factor)
    return ids[:, half:-half, half:-half].contiguous()


def _resolve_near_ties(logits: torch.Tensor, ids: torch.Tensor, factor: int) -> torch.Tensor:
    """Return `ids` with near ties replaced by the argmax of torch's upsampling of the rows of logits around each."""
    image, y, x = (ids >= NEAR_TIE).nonzero().unbind(1)
    top = (y - factor // 2).div(factor, rounding_mode="floor").clamp(0, logits.shape[2] - 2)
    pairs = torch.stack([image, top], 1)
    for pair in pairs.unique(dim=0):
        chosen = (pairs == pair).all(1)
        rows = logits[pair[0], :, pair[1] : pair[1] + 2][None].contiguous()
        values = upsample(rows, (2 * factor, ids.shape[2]))[0, :, y[chosen] - pair[1] * factor, x[chosen]]
        ids[image[chosen], y[chosen], x[chosen]] = values.argmax(0).to(torch.uint8)
    return ids


def confusion_matrices(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> torch.Tensor:
    """Return counts (N, classes, classes) int64 per image, row = label, of train ids (N, H, W) uint8 on one device."""
    if labels.device.type == "cpu":
        pairs = zip(labels.numpy(), predictions.numpy(), strict=True)
        return torch.from_numpy(np.stack([metrics.confusion_matrix(*pair, classes) for pair in pairs]))
    return bin_counts(labels, predictions, classes)


def bin_counts(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> torch.Tensor:
    """Return what `confusion_matrices` does by one call of torch.bincount.

    It has one bin per image for all pixels that do not count: with few bins, a GPU counts in its shared memory.
    """
    images, bins = len(labels), classes**2 + 1
    codes = torch.where(labels < classes, labels.long() * classes + predictions, bins - 1)
    codes += torch.arange(images, device=labels.device).view(-1, 1, 1) * bins
    counts = torch.bincount(codes.flatten(), minlength=images * bins).view(images, bins)
    return counts[:, :-1].reshape(images, classes, classes)


def agreeing_pixels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the number of pixels (N,) int64 with the same train id per image, of two predictions (N, H, W)."""
    return (a == b).sum((1, 2))
