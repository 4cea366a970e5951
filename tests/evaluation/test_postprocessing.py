"""Predictions against upsampling and argmax, pixel for pixel, also for ties, edges and odd sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ffnet.evaluation import metrics, postprocessing

NOISE = {
    "noise": lambda x: x,
    "quantized to 8 bits": lambda x: torch.fake_quantize_per_tensor_affine(3 * x, 0.05, 128, 0, 255),
    "a few levels, ties everywhere": lambda x: (2 * x).round() * 0.1,
    "constant": lambda x: torch.zeros_like(x),
    "not finite": lambda x: torch.where(x > 3.5, torch.nan, x),
}


def reference(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize(("small", "factor"), (((12, 20), 8), ((3, 40), 4), ((16, 33), 4), ((2, 2), 8), ((1, 1), 8)))
def test_the_kernel_predicts_what_upsampling_and_argmax_do(kind, small, factor):
    logits = NOISE[kind](torch.randn(2, 19, *small, generator=torch.Generator().manual_seed(0)))
    size = (small[0] * factor, small[1] * factor)
    expected = reference(logits, size)
    for layout in (torch.contiguous_format, torch.channels_last):
        for kernel in (None, postprocessing.two_largest):
            found = postprocessing.predict(logits.to(memory_format=layout), size, kernel)
            assert found.dtype == torch.uint8 and torch.equal(found, expected)


def test_sizes_that_the_kernel_does_not_support_are_upsampled_by_torch():
    logits = torch.randn(1, 19, 13, 21)
    found = postprocessing.predict(logits, (100, 161), postprocessing.two_largest)
    assert torch.equal(found, reference(logits, (100, 161)))


def test_every_image_has_its_own_confusion_matrix():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice([0, 5, 18, 255], (3, 8, 9)).astype(np.uint8))
    predictions = torch.from_numpy(rng.integers(0, 19, (3, 8, 9)).astype(np.uint8))
    matrices = postprocessing.confusion_matrices(labels, predictions, 19)
    assert matrices.shape == (3, 19, 19) and matrices.dtype == torch.int64
    for matrix, label, prediction in zip(matrices, labels.numpy(), predictions.numpy(), strict=True):
        assert np.array_equal(matrix.numpy(), metrics.confusion_matrix(label, prediction, 19))


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.cuda)))
def test_the_operators_of_a_gpu_count_the_same_confusion_matrices(device):
    labels = torch.randint(0, 256, (3, 16, 9), dtype=torch.uint8)
    predictions = torch.randint(0, 19, (3, 16, 9), dtype=torch.uint8)
    found = postprocessing.bin_counts(labels.to(device), predictions.to(device), 19).cpu()
    assert torch.equal(found, postprocessing.confusion_matrices(labels, predictions, 19))
