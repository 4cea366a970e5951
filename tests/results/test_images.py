"""Image comparisons, pixel by pixel, against labels and predictions."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Runtime
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.postprocessing import predict
from ffnet.evaluation.scores import FP32, SIMULATED
from ffnet.labels import CITYSCAPES
from ffnet.results import images as report_images
from ffnet.results.images import (
    IMPROVED,
    MARKS,
    OTHER,
    REGRESSED,
    SAME,
    KeptPredictions,
    compare_images,
    worst_images,
)
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.results import CPU, PAIR, labels_and_predictions, noisy_backend, scores_of, small_scores


def pixels(panel):
    return np.array(Image.open(io.BytesIO(panel.data)).convert("RGB"))


def test_worst_images_are_those_with_the_largest_drop_of_their_own_miou():
    labels, predictions = labels_and_predictions()
    predictions[SIMULATED][2] = (labels[2] + 1) % 19  # all wrong
    predictions[SIMULATED][0] = predictions[FP32][0]  # no drop
    worst = worst_images(scores_of(labels, predictions), 10)
    assert worst[0] == 2 and worst[-1] == 0
    assert sorted(worst) == [0, 1, 2, 3]  # no pixel of the fifth is scored
    assert worst_images(scores_of(labels, predictions), 2) == worst[:2]


def test_of_images_with_the_same_drop_the_one_with_lower_agreement_comes_first():
    matrices = np.zeros((3, 19, 19), np.int64)
    matrices[:, 0, 0] = 10
    scores = small_scores(
        confusion_matrices=dict.fromkeys(PAIR, matrices),
        agreeing_pixels={PAIR: np.array([9, 3, 5])},
        pixels=np.full(3, 10),
    )
    assert worst_images(scores, 3) == [1, 2, 0]


def test_disagreement_separates_regressed_improved_and_other_pixels():
    labels = np.array([[0, 0, 0, 0, 255, 255]], np.uint8)
    before = np.array([[0, 0, 1, 1, 3, 3]], np.uint8)
    after = np.array([[0, 1, 0, 2, 3, 4]], np.uint8)
    codes = report_images.disagreement(labels, before, after)
    assert codes.tolist() == [[SAME, REGRESSED, IMPROVED, OTHER, SAME, OTHER]]


def test_the_enlarged_part_has_most_regressed_pixels():
    codes = np.full((32, 64), IMPROVED)
    codes[9:12, 40:46] = REGRESSED
    top, left = report_images.most_regressed(codes)
    assert 8 <= top <= 9 and 38 <= left <= 40  # of 4x8 pixels
    codes[:] = SAME
    assert report_images.most_regressed(codes) == (0, 0)


def test_comparisons_show_label_predictions_and_disagreement(tree):
    images = CityscapesSplit(tree, "val")
    backends = {FP32: noisy_backend(0), SIMULATED: noisy_backend(0.5)}
    scores = evaluate(backends, images, Runtime(batch_size=2, quiet=True))
    comparisons = compare_images([3, 1], images, images.names, backends, scores, CPU)
    for comparison, index in zip(comparisons, (3, 1), strict=True):
        image, labels = images[index]
        labels = labels.numpy()
        before, after = (predict(b(normalize(image[None])), labels.shape)[0].numpy() for b in backends.values())
        shown = {panel.title: pixels(panel) for panel in comparison.panels}
        colors = np.vstack([CITYSCAPES.colors, np.zeros((237, 3), np.uint8)])  # what is not scored is black
        for title, expected in (("label", labels), (FP32, before), (SIMULATED, after)):
            assert np.array_equal(shown[title], colors[expected])
        marked = shown["disagreement"]
        regressed = (before != after) & (before == labels)
        assert regressed.any() and (marked[regressed] == MARKS[REGRESSED][1]).all()
        assert (marked[(before != after) & (after == labels)] == MARKS[IMPROVED][1]).all()
        assert (marked[(before != after) & (before != labels) & (after != labels)] == MARKS[OTHER][1]).all()
        same = marked[~binary_dilation(before != after, np.ones((3, 3)))].astype(int)
        assert len(same) and (np.ptp(same, 1) <= 1).all()  # grey
        assert same.max() <= 255 * report_images.DIMMED + 1
        seen, given = shown["image"].mean(2), image.numpy().mean(0)  # a JPEG of noise
        assert np.corrcoef(seen.ravel(), given.ravel())[0, 1] > 0.8

        assert comparison.name == images.names[index]
        assert comparison.agreement == pytest.approx(100 * (before == after).mean())
        assert comparison.regressed == pytest.approx(100 * regressed.sum() / (labels != 255).sum())
        assert comparison.mious[FP32] == pytest.approx(100 * np.mean([
            ((labels == c) & (before == c)).sum() / ((labels == c) | (before == c) & (labels != 255)).sum()
            for c in np.unique(labels[labels != 255])
        ]))  # fmt: skip
        drops = [before - after for _, before, after in comparison.largest_drops]
        assert drops == sorted(drops, reverse=True)


def test_kept_predictions_are_those_of_the_worst_images():
    labels, predictions = labels_and_predictions()
    scores, kept = scores_of(labels, predictions), KeptPredictions(2)
    tensors = {name: torch.from_numpy(ids) for name, ids in predictions.items()}
    for first in (0, 2, 4):  # in batches of two
        batch = slice(first, first + 2)
        part = replace(scores, confusion_matrices={n: m[batch] for n, m in scores.confusion_matrices.items()})
        kept.add(range(first, len(labels))[:2], part, {name: ids[batch] for name, ids in tensors.items()})
    assert sorted(kept.predictions) == sorted(worst_images(scores, 2))
    assert all(np.array_equal(ids[name], predictions[name][i]) for i, ids in kept.predictions.items() for name in PAIR)


def test_large_images_are_reduced_and_no_mark_is_lost(tmp_path):
    write_tree(tmp_path, count=1, size=(512, 2048))
    images = CityscapesSplit(tmp_path, "val")
    image, labels = (tensor.numpy() for tensor in images[0])
    predictions = {FP32: np.zeros_like(labels), SIMULATED: np.zeros_like(labels)}
    labels[7, 9] = 0
    predictions[SIMULATED][7, 9] = 1
    factor = report_images.reduction_factor(*images.size, 1)
    panels = report_images.draw_panels(image.transpose(1, 2, 0), labels, predictions, CITYSCAPES, factor)
    assert {pixels(panel).shape for panel in panels} == {(256, 1024, 3)}
    marked = (pixels(panels[-1]) == MARKS[REGRESSED][1]).all(2)
    assert marked.sum() == 9 and marked[2:5, 3:6].all()


@pytest.mark.parametrize("size", ((1024, 2048), (512, 1024), (64, 128), (1080, 1919)))
@pytest.mark.parametrize("count", (1, 6, 12, 100, 500))
def test_the_panels_of_a_page_are_bounded(size, count):
    factor = report_images.reduction_factor(*size, count)
    assert size[1] / factor <= report_images.MAX_WIDTH
    assert size[0] * size[1] * count / factor**2 <= report_images.MAX_PIXELS
    assert factor == 1 or size[1] / (factor - 1) > report_images.MAX_WIDTH or count > 12
