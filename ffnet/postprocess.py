"""Logits to train ids at the label's size, and on to confusion matrices, on the device where the model runs.

The predictions are those of bilinear upsampling (align_corners=False) and argmax, pixel for pixel. Eager, they are made
just so. Compiled, one kernel interpolates and keeps the two largest logits of a pixel, so that no full-size logits are
written; where these two are so close that rounding decides, torch's own upsampling has the word.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ffnet import metrics
from ffnet.variants import NUM_CLASSES

FACTORS = (4, 8)  # of upsampling, for which the kernel's weights are exact in float32
NEAR = 2e-6  # of the largest logit: more than two orders of rounding can differ by
MOST_UNDECIDED = 1 / 256  # of the pixels: settling one takes 256 times the memory of upsampling one
UNDECIDED = 128  # added to the train id of a pixel whose two largest logits are that near
SMALL = 128  # rows and columns together up to which torch upsamples by other code, which rounds otherwise
MIN_PATCHES = 16  # side by side they are upsampled to more than that


def predict(logits, size, top_two=None):
    """Train ids (N, H, W) uint8 of logits (N, 19, h, w) float32 at `size` (H, W). `top_two`: the compiled kernel."""
    logits = logits.contiguous()
    factor = _factor(logits.shape[2:], size) if top_two else None
    largest = logits.abs().amax() if factor else None
    if not factor or not largest.isfinite():
        return _plainly(logits, size)
    # An image at a time, and `near` as a tensor: the kernel is compiled for one shape and no value.
    padded = F.pad(logits, (1, 1, 1, 1), mode="replicate")
    ids = torch.cat([_woven(top_two(image, factor, NEAR * largest)) for image in padded.split(1)])
    if (ids >= UNDECIDED).sum() > MOST_UNDECIDED * ids.numel():
        return _plainly(logits, size)
    return _settle(logits, ids, factor)


def _plainly(logits, size):
    return upsample(logits, size).max(1).indices.to(torch.uint8)


def upsample(logits, size):
    """Logits at the label's size, as published."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _factor(small, size):
    """The upsampling factor if it is one of FACTORS and the same in both directions, else None."""
    factor = size[0] // small[0]
    fits = factor in FACTORS and tuple(size) == (small[0] * factor, small[1] * factor)
    return factor if fits and min(small) > 1 and sum(size) > SMALL else None


def top_two(padded, factor, near):
    """Train ids, plus UNDECIDED where the second largest logit is less than `near` below; to compile.

    `padded`: logits (N, 19, h + 2, w + 2), their border repeated. A cell lies between the centres of four logits; its
    factor x factor pixels are planes of their own, (factor, factor, N, h + 1, w + 1) uint8, so that every plane is a
    weighted sum of four shifted copies of the logits, contiguous and without gathers. Padding and weaving stay outside:
    with either of them in the kernel it takes five times as long.
    """
    weight = (torch.arange(factor, device=padded.device) + 0.5) / factor
    lower, right = weight.view(-1, 1, 1, 1, 1), weight.view(-1, 1, 1, 1)
    best = second = index = None
    for k in range(padded.shape[1]):
        plane = padded[:, k]
        rows = plane[:, :-1] * (1 - lower) + plane[:, 1:] * lower
        value = rows[..., :-1] * (1 - right) + rows[..., 1:] * right
        if best is None:
            best, second, index = value, torch.full_like(value, -math.inf), torch.zeros_like(value)
        else:
            second = torch.maximum(second, torch.minimum(best, value))
            index = torch.where(value > best, k, index)
            best = torch.maximum(best, value)
    return index.to(torch.uint8) + (best - second <= near).to(torch.uint8) * UNDECIDED


def _woven(planes):
    """The pixels (N, H, W) of top_two's planes, without the half cells beyond the border."""
    factor, _, n, rows, columns = planes.shape
    half = factor // 2
    ids = planes.permute(2, 3, 0, 4, 1).reshape(n, rows * factor, columns * factor)
    return ids[:, half:-half, half:-half].contiguous()


def _settle(logits, ids, factor):
    """`ids` with its undecided pixels predicted by torch's own upsampling of the four logits around each."""
    undecided = (ids >= UNDECIDED).nonzero()
    if not len(undecided):
        return ids
    image, y, x = undecided.unbind(1)
    top, down = _cell(y, factor, logits.shape[2])
    left, across = _cell(x, factor, logits.shape[3])
    pair = torch.arange(2, device=ids.device)
    patches = logits[image[:, None, None], :, (top[:, None] + pair)[:, :, None], (left[:, None] + pair)[:, None, :]]
    patches = patches.permute(0, 3, 1, 2)  # (K, 19, 2, 2)
    # Left of the first and right of the last logit, torch repeats it: such a patch has to end where its row ends.
    at_edge = (across < factor // 2) | (across >= 3 * factor // 2)
    for chosen, values_of in ((~at_edge, _inner_values), (at_edge, _edge_values)):
        if chosen.any():
            values = values_of(patches[chosen], down[chosen], across[chosen], factor)
            ids[image[chosen], y[chosen], x[chosen]] = values.argmax(1).to(torch.uint8)
    return ids


def _cell(position, factor, count):
    """The first of the two logits that a pixel lies between, and the pixel's place in their 2 * factor pixels."""
    first = ((position - factor // 2).div(factor, rounding_mode="floor")).clamp(0, count - 2)
    return first, position - first * factor


def _inner_values(patches, down, across, factor):
    """Logits (K, 19) of a pixel of each patch, all patches upsampled side by side."""
    count = len(patches)
    patches = torch.cat([patches, patches[:1].expand(max(0, MIN_PATCHES - count), -1, -1, -1)])
    wide = upsample(
        patches.permute(1, 2, 0, 3).reshape(1, patches.shape[1], 2, -1), (2 * factor, 2 * factor * len(patches))
    )
    column = torch.arange(count, device=patches.device) * 2 * factor + across
    return wide[0][:, down, column].T


def _edge_values(patches, down, across, factor):
    """Logits (K, 19) of a pixel of each patch, which stands at both ends of a row of its own."""
    width = 2 * MIN_PATCHES
    rows = patches.new_zeros((*patches.shape[:3], width))
    rows[..., :2], rows[..., -2:] = patches, patches
    wide = upsample(rows, (2 * factor, width * factor))
    column = torch.where(across < factor, across, across + (width - 2) * factor)
    return wide[torch.arange(len(patches), device=patches.device), :, down, column]


def confusion_matrices(labels, predictions):
    """Counts (N, 19, 19) int64 on the CPU, an image each, row = label; both uint8 (N, H, W) on one device."""
    if labels.device.type == "cpu":
        return np.stack(list(map(metrics.confusion_matrix, labels.numpy(), predictions.numpy())))
    size = 256 * NUM_CLASSES
    offset = torch.arange(len(labels), device=labels.device).view(-1, 1, 1) * size
    codes = labels.long() * NUM_CLASSES + predictions + offset
    counts = torch.bincount(codes.flatten(), minlength=len(labels) * size).view(-1, 256, NUM_CLASSES)
    return counts[:, :NUM_CLASSES].cpu().numpy()
