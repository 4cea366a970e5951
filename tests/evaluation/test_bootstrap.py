"""Confidence intervals against plain loops over the resamples, and against a simulated population."""

import statistics

import numpy as np
import pytest

from ffnet.evaluation import metrics
from ffnet.evaluation.bootstrap import (
    RESAMPLES,
    MiouIntervals,
    difference_interval,
    miou_intervals,
    resampled_mious,
    resampling_weights,
)

CLASSES = 4  # number of classes in the random matrices


def random_matrices(seed, images=6):
    """Confusion matrices of few classes; the last class occurs in one image only."""
    matrices = np.zeros((images, 19, 19), np.int64)
    matrices[:, :CLASSES, :CLASSES] = np.random.default_rng(seed).integers(0, 20, (images, CLASSES, CLASSES))
    matrices[1:, CLASSES - 1] = matrices[1:, :, CLASSES - 1] = 0
    return matrices


def miou_of(weights, matrices):
    """Return the mIoU in percent of images that are drawn `weights` times, in plain Python."""
    total = [[sum(w * m[i][j] for w, m in zip(weights, matrices, strict=True)) for j in range(19)] for i in range(19)]
    ious = []
    for c in range(CLASSES):
        union = sum(total[c]) + sum(row[c] for row in total) - total[c][c]
        ious += [total[c][c] / union] if union else []
    return 100 * sum(ious) / len(ious)


def percentiles(values):
    """Return the 2.5th and the 97.5th percentile."""
    cuts = statistics.quantiles(values, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def test_every_resample_draws_as_many_images_as_there_are_and_each_equally_often():
    weights = resampling_weights(50)
    assert weights.shape == (RESAMPLES, 50) and (weights.sum(1) == 50).all()
    assert np.abs(weights.mean(0) - 1).max() < 0.1  # four standard deviations
    assert np.abs((weights == 0).mean() - (1 - 1 / 50) ** 50) < 0.01


def test_intervals_equal_those_of_plain_loops_over_the_resamples():
    matrices = {"FP32": random_matrices(0), "INT8": random_matrices(1)}
    weights = resampling_weights(6).astype(int).tolist()
    mious = {name: [miou_of(row, counts.tolist()) for row in weights] for name, counts in matrices.items()}
    drops = [before - after for before, after in zip(*mious.values(), strict=True)]

    assert np.allclose([resampled_mious(counts) for counts in matrices.values()], list(mious.values()), atol=1e-9)
    found = miou_intervals(matrices, "FP32")
    assert found["FP32"].miou == pytest.approx(percentiles(mious["FP32"]), abs=1e-9)
    assert found["INT8"].miou == pytest.approx(percentiles(mious["INT8"]), abs=1e-9)
    assert found["INT8"].drop == pytest.approx(percentiles(drops), abs=1e-9)


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


def test_the_baseline_and_backends_without_a_baseline_have_no_drop():
    assert miou_intervals({"FP32": random_matrices(0)}, "FP32")["FP32"].drop is None
    alone = miou_intervals({"ONNX file": random_matrices(0)}, "FP32")["ONNX file"]
    assert alone.drop is None and alone.miou is not None


def test_images_without_a_labelled_pixel_change_nothing():
    matrices = random_matrices(0)
    padded = np.concatenate([np.zeros((3, 19, 19), np.int64), matrices])
    assert miou_intervals({"FP32": padded}, "FP32") == miou_intervals({"FP32": matrices}, "FP32")


@pytest.mark.parametrize("labelled", (0, 1))
def test_fewer_than_two_labelled_images_have_no_interval(labelled):
    matrices = np.concatenate([random_matrices(0)[:labelled], np.zeros((2, 19, 19), np.int64)])
    undefined = MiouIntervals(None, None)
    assert miou_intervals({"FP32": matrices, "INT8": matrices}, "FP32") == {"FP32": undefined, "INT8": undefined}
    assert resampled_mious(matrices).size == 0


def population(rng, images):
    """Matrices of two classes for two backends that fail on the same images; INT8 is slightly worse."""
    correct = rng.beta(8, 2, images)
    matrices = {}
    for name, loss in (("FP32", 0), ("INT8", 0.02)):
        hits = rng.binomial(1000, (1 - loss) * correct[:, None], (images, 2))
        matrices[name] = np.zeros((images, 19, 19), np.int64)
        matrices[name][:, [0, 1], [0, 1]], matrices[name][:, [0, 1], [1, 0]] = hits, 1000 - hits
    return matrices


def test_about_95_percent_of_the_intervals_cover_the_value_of_the_population():
    rng = np.random.default_rng(0)
    before, after = (100 * metrics.mean_iou(m.sum(0)) for m in population(rng, 20_000).values())
    covered = []
    for _ in range(100):
        samples = population(rng, 50)
        found = miou_intervals(samples, "FP32")
        (low, high), (drop_low, drop_high) = found["FP32"].miou, found["INT8"].drop
        assert low < 100 * metrics.mean_iou(samples["FP32"].sum(0)) < high
        assert drop_high - drop_low < (high - low) / 3  # because images are paired
        covered.append((low < before < high, drop_low < before - after < drop_high))
    assert all(88 <= count <= 99 for count in np.sum(covered, 0))
