"""Metrics against a case worked by hand and against the official Cityscapes evaluation of the same predictions."""

import numpy as np
import pytest
import scipy.stats
from skimage.io import imread, imsave

from ffnet.evaluation import metrics
from ffnet.labels import CITYSCAPES
from tests.helpers.official_evaluation import official_evaluation

NUM_CLASSES = 19


def test_metrics_equal_those_worked_by_hand():
    labels = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    predictions = np.array([[0, 1, 1], [1, 3, 0]], np.uint8)
    matrix = metrics.confusion_matrix(labels, predictions, NUM_CLASSES)

    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[2, 0] = 1, 1, 2, 1
    assert matrix.dtype == np.int64 and np.array_equal(matrix, expected)
    # Class 0: TP 1, FN 1, FP 1. Class 1: TP 2, FP 1. Class 2: FN 1. Class 3: predicted only where nothing is scored.
    assert metrics.iou(matrix)[:3].tolist() == [1 / 3, 2 / 3, 0]
    assert np.isnan(metrics.iou(matrix)[3:]).all()
    assert metrics.mean_iou(matrix) == pytest.approx(1 / 3, abs=1e-15)
    assert metrics.pixel_accuracy(matrix) == 3 / 5
    assert np.isnan(metrics.mean_iou(0 * matrix)) and np.isnan(metrics.pixel_accuracy(0 * matrix))


def test_the_miou_of_an_image_is_over_the_classes_in_its_label():
    matrices = np.zeros((2, NUM_CLASSES, NUM_CLASSES), np.int64)
    matrices[0, 0, 0], matrices[0, 0, 5], matrices[0, 1, 1] = 3, 1, 2
    assert metrics.image_ious(matrices)[0, :2].tolist() == [3 / 4, 1] and np.isnan(metrics.image_ious(matrices)[0, 5])
    assert metrics.image_mious(matrices)[0] == 7 / 8 and np.isnan(metrics.image_mious(matrices)[1])


def test_the_official_evaluation_gives_the_same_metrics(tree):
    """Two classes are absent from labels and predictions, one from the labels alone."""
    rng = np.random.default_rng(0)
    results = tree / "results"
    results.mkdir()
    total = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for path in (tree / "gtFine" / "val").glob("*/*_gtFine_labelIds.png"):
        labels = imread(path)
        labels[np.isin(labels, CITYSCAPES.label_ids[[3, 14, 16]])] = 0
        imsave(path, labels, check_contrast=False)
        truth = CITYSCAPES.train_ids[labels]
        guess = rng.integers(0, NUM_CLASSES, labels.shape)
        guess[np.isin(guess, [3, 14])] = 0
        predictions = np.where((rng.random(labels.shape) < 0.7) & (truth < NUM_CLASSES), truth, guess).astype(np.uint8)
        imsave(
            results / path.name.replace("_gtFine_labelIds", "_pred"),
            CITYSCAPES.label_ids[predictions],
            check_contrast=False,
        )
        total += metrics.confusion_matrix(truth, predictions, NUM_CLASSES)

    official = official_evaluation(tree, results)
    ours = dict(zip(CITYSCAPES.names, metrics.iou(total), strict=True))
    assert np.isnan([ours["wall"], ours["truck"]]).all() and ours["train"] == 0
    for name, value in ours.items():
        assert np.isclose(value, official["classScores"][name], atol=1e-14, rtol=0, equal_nan=True), name
    assert official["averageScoreClasses"] == pytest.approx(metrics.mean_iou(total), abs=1e-14)


def matrices(*images):
    """Confusion matrices of images, each given as {(label, prediction): pixels}."""
    counts = np.zeros((len(images), NUM_CLASSES, NUM_CLASSES), np.int64)
    for index, pixels in enumerate(images):
        for cell, number in pixels.items():
            counts[index][cell] = number
    return counts


FIRST = {(0, 0): 6, (1, 1): 3, (1, 0): 1}
SECOND = {(0, 0): 8, (0, 1): 2}
STRAY = {(2, 2): 5, (0, 0): 4, (0, 5): 1}  # one pixel is predicted as a class that no label has
RIGHT = {(2, 2): 5, (0, 0): 5}


def test_the_estimates_of_three_images_and_three_classes_equal_those_worked_by_hand():
    found = metrics.statistics(matrices(FIRST, SECOND, STRAY))
    assert found.miou.value == pytest.approx(100 * (18 / 22 + 3 / 6 + 1 + 0) / 4)
    assert found.labelled_miou.value == pytest.approx(100 * (18 / 22 + 3 / 6 + 1) / 3)
    # Without the first image no label has class 1, without the last none has class 2, and no prediction class 5.
    assert found.miou.replicates == pytest.approx(
        [100 * (12 / 15 + 0 + 1 + 0) / 4, 100 * (10 / 12 + 3 / 4 + 1 + 0) / 4, 100 * (14 / 17 + 3 / 6) / 2]
    )
    assert found.labelled_miou.replicates == pytest.approx(
        [100 * (12 / 15 + 1) / 2, 100 * (10 / 12 + 3 / 4 + 1) / 3, 100 * (14 / 17 + 3 / 6) / 2]
    )
    assert [estimate.images for estimate in found.ious[:6]] == [3, 1, 1, 0, 0, 0]
    assert found.ious[0].replicates == pytest.approx([100 * 12 / 15, 100 * 10 / 12, 100 * 14 / 17])


def test_a_stray_pixel_of_a_class_that_no_label_has_hardly_changes_a_change():
    """Class 5 would count with an IoU of 0 for one of the two only: a change of 20 points for one pixel."""
    before, after = (metrics.statistics(matrices(FIRST, SECOND, last)) for last in (RIGHT, STRAY))
    change = after.labelled_miou - before.labelled_miou
    assert change.value == pytest.approx(100 * (18 / 22 - 19 / 22) / 3)
    assert after.miou.value - before.miou.value < -20
    assert change.replicates[2] == 0  # without the image in which they differ


def test_an_interval_is_that_of_a_jackknife_with_students_t():
    estimate = metrics.Estimate(80.0, np.array([79.0, 80.0, 80.0, 81.0]), 4)
    assert estimate.standard_error == pytest.approx((3 / 4 * 2) ** 0.5)
    reach = 3.182446305 * (3 / 4 * 2) ** 0.5  # the quantile of three degrees of freedom, from a table
    assert estimate.interval == pytest.approx((80 - reach, 80 + reach))
    assert metrics.Estimate(99.0, estimate.replicates + 19, 4).share_interval[1] == 100
    assert metrics.Estimate(80.0, estimate.replicates[:3], 3).interval is None


def test_images_without_labels_have_no_influence_and_a_rare_class_has_no_interval():
    images = (FIRST, SECOND, STRAY, FIRST, {})
    found, without = metrics.statistics(matrices(*images)), metrics.statistics(matrices(*images[:4]))
    assert found.miou.interval == without.miou.interval and found.miou.images == 4
    assert found.ious[0].interval and found.ious[1].interval is None  # in four images, and in two
    assert metrics.statistics(matrices({})).miou.interval is None


def test_cells_change_for_certain_if_a_paired_t_test_says_so():
    before, after = np.random.default_rng(0).poisson(20, (2, 6, 5, 5))
    expected = scipy.stats.ttest_rel(after, before).pvalue < 0.05
    assert expected.any() and not expected.all()
    assert np.array_equal(metrics.changed_cells(before, after), expected)
    assert not metrics.changed_cells(before[:3], after[:3] + 100).any()  # too few images
