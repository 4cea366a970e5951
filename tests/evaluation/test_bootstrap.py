"""Confidence intervals against scipy's bootstrap, and cases worked by hand."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from ffnet.evaluation import metrics
from ffnet.evaluation.metrics import (
    RESAMPLES,
    MiouIntervals,
    difference_interval,
    miou_intervals,
    resampled_mious,
    resampling_weights,
)

IMAGES = 40


def random_matrices(seed):
    """Confusion matrices of four classes, the last of which occurs in one image only."""
    matrices = np.zeros((IMAGES, 19, 19), np.int64)
    matrices[:, :4, :4] = np.random.default_rng(seed).integers(0, 20, (IMAGES, 4, 4))
    matrices[1:, 3] = matrices[1:, :, 3] = 0
    return matrices


def scipys_interval(statistic):
    """Return scipy's 95 % percentile interval of a statistic of the indices of drawn images."""
    images = (np.arange(IMAGES),)
    found = bootstrap(images, statistic, n_resamples=4000, method="percentile", vectorized=False, random_state=1)
    return found.confidence_interval


def test_every_resample_draws_as_many_images_as_there_are_and_each_equally_often():
    weights = resampling_weights(50)
    assert weights.shape == (RESAMPLES, 50) and (weights.sum(1) == 50).all()
    assert np.abs(weights.mean(0) - 1).max() < 0.1  # four standard deviations
    assert np.abs((weights == 0).mean() - (1 - 1 / 50) ** 50) < 0.01


def test_intervals_are_those_of_scipy_but_for_the_draw():
    first, second = random_matrices(0), random_matrices(1)
    found = miou_intervals({"FP32": first, "INT8": second}, "FP32")
    assert found["FP32"].drop is None

    def miou(matrices):
        return lambda indices: 100 * metrics.mean_iou(matrices[indices].sum(0))

    def drop(indices):
        return miou(first)(indices) - miou(second)(indices)

    pairs = ((found["FP32"].miou, miou(first)), (found["INT8"].miou, miou(second)), (found["INT8"].drop, drop))
    for limits, statistic in pairs:
        expected = scipys_interval(statistic)
        assert limits == pytest.approx(tuple(expected), abs=0.08 * (expected.high - expected.low))


def test_two_models_are_paired_by_the_images_that_both_resample():
    """The second model has half a percent fewer hits of one class on each image, however hard the image is."""
    right = np.random.default_rng(0).integers(500, 900, 9)
    matrices = np.zeros((2, 9, 19, 19), np.int64)
    for model, hits in zip(matrices, (right, right - 5), strict=True):
        model[:, 0, 0], model[:, 0, 1] = hits, 1000 - hits
    low, high = difference_interval(*map(resampled_mious, matrices))
    assert (low, high) == pytest.approx((0.25, 0.25))  # the mean over two classes, of which one has no hits
    own_low, own_high = miou_intervals({"FP32": matrices[0]}, "FP32")["FP32"].miou
    assert own_high - own_low > 1


def test_images_without_a_labelled_pixel_change_nothing():
    matrices = random_matrices(0)
    padded = np.concatenate([np.zeros((3, 19, 19), np.int64), matrices])
    assert miou_intervals({"FP32": padded}, "FP32") == miou_intervals({"FP32": matrices}, "FP32")


@pytest.mark.parametrize("labelled", (0, 1))
def test_fewer_than_two_labelled_images_have_no_interval(labelled):
    matrices = np.concatenate([random_matrices(0)[:labelled], np.zeros((2, 19, 19), np.int64)])
    undefined = MiouIntervals(None, None)
    assert miou_intervals({"FP32": matrices, "INT8": matrices}, "FP32") == {"FP32": undefined, "INT8": undefined}
