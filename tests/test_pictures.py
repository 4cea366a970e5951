"""The rows of pictures, pixel by pixel, against labels and predictions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation

from datasets.cityscapes import COLORS, CityscapesSplit
from ffnet import evaluate, pictures
from ffnet.evaluate import Scores
from ffnet.pictures import BROKEN, MENDED, OTHER, SAME
from tests.conftest import write_tree
from tests.test_tables import labels_and_predictions, scores_of

CPU = torch.device("cpu")


def pixels(panel):
    return np.array(Image.open(io.BytesIO(panel.data)).convert("RGB"))


def stub(noise):
    """A network that sees something in the image: logits at an eighth of its size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(19, 3, 1, 1, generator=generator)
    weight += noise * torch.randn(19, 3, 1, 1, generator=generator)
    return lambda x: torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(x, 8), weight)


def test_worst_images_are_those_whose_own_miou_falls_furthest():
    labels, passes = labels_and_predictions()
    passes["INT8"][2] = (labels[2] + 1) % 19  # all wrong
    passes["INT8"][0] = passes["FP32"][0]  # nothing lost
    worst = pictures.worst_images(scores_of(labels, passes), 10)
    assert worst[0] == 2 and worst[-1] == 0
    assert sorted(worst) == [0, 1, 2, 3]  # the fourth has nothing that is scored
    assert pictures.worst_images(scores_of(labels, passes), 2) == worst[:2]


def test_of_images_that_fall_alike_the_one_with_fewer_pixels_alike_comes_first():
    matrices = np.zeros((3, 19, 19), np.int64)
    matrices[:, 0, 0] = 10
    scores = Scores({"FP32": matrices, "INT8": matrices}, {("FP32", "INT8"): np.array([9, 3, 5])}, 10, {})
    assert pictures.worst_images(scores, 3) == [1, 2, 0]


def test_disagreement_tells_what_broke_from_what_mended():
    labels = np.array([[0, 0, 0, 0, 255, 255]], np.uint8)
    before = np.array([[0, 0, 1, 1, 3, 3]], np.uint8)
    after = np.array([[0, 1, 0, 2, 3, 4]], np.uint8)
    codes = pictures.disagreement(labels, before, after)
    assert codes.tolist() == [[SAME, BROKEN, MENDED, OTHER, SAME, OTHER]]


def test_rows_show_label_predictions_and_disagreement(tree):
    images = CityscapesSplit(tree, "val")
    passes = {"FP32": stub(0), "INT8": stub(0.5)}
    scores = evaluate.sweep(passes, evaluate.loader(images, 2, 0, CPU), CPU)
    rows = pictures.render_rows([3, 1], images, passes, scores, CPU)
    for row, index in zip(rows, (3, 1), strict=True):
        image, labels = images[index]
        labels = labels.numpy()
        ids = {
            name: evaluate.predict(p(evaluate.normalize(image[None])), labels.shape)[0] for name, p in passes.items()
        }
        before, after = (ids[name].numpy() for name in passes)
        shown = {panel.title: pixels(panel) for panel in row.panels}
        colors = np.vstack([COLORS, np.zeros((237, 3), np.uint8)])  # what is not scored is black
        for title, expected in (("label", labels), ("FP32", before), ("INT8", after)):
            assert np.array_equal(shown[title], colors[expected])
        marked = shown["where they disagree"]
        broken = (before != after) & (before == labels)
        assert broken.any() and (marked[broken] == pictures.MARKS[BROKEN][1]).all()
        assert (marked[(before != after) & (after == labels)] == pictures.MARKS[MENDED][1]).all()
        assert (marked[(before != after) & (before != labels) & (after != labels)] == pictures.MARKS[OTHER][1]).all()
        same = marked[~binary_dilation(before != after, np.ones((3, 3)))].astype(int)
        assert len(same) and (np.ptp(same, 1) <= 1).all() and same.max() <= 255 * pictures.DIMMED + 1  # grey and dimmed
        seen, given = shown["image"].mean(2), image.numpy().mean(0)  # a JPEG, of noise
        assert np.corrcoef(seen.ravel(), given.ravel())[0, 1] > 0.8

        assert row.name in images.images[index]
        assert row.agreement == pytest.approx(100 * (before == after).mean())
        assert row.broken == pytest.approx(100 * broken.sum() / (labels != 255).sum())
        assert row.mious["FP32"] == pytest.approx(100 * np.mean([
            ((labels == c) & (before == c)).sum() / ((labels == c) | (before == c) & (labels != 255)).sum()
            for c in np.unique(labels[labels != 255])
        ]))  # fmt: skip
        assert [fall[1] - fall[2] for fall in row.falls] == sorted((f[1] - f[2] for f in row.falls), reverse=True)


def test_big_images_are_made_smaller_and_no_mark_is_lost(tmp_path):
    write_tree(tmp_path, count=1, size=(512, 2048))
    images = CityscapesSplit(tmp_path, "val")
    image, labels = (tensor.numpy() for tensor in images[0])
    predictions = {"FP32": np.zeros_like(labels), "INT8": np.zeros_like(labels)}
    labels[7, 9] = 0
    predictions["INT8"][7, 9] = 1
    factor = pictures.reduction(images.height, images.width, 1)
    panels = pictures.draw(image.transpose(1, 2, 0), labels, predictions, factor)
    assert {pixels(panel).shape for panel in panels} == {(256, 1024, 3)}
    marked = (pixels(panels[-1]) == pictures.MARKS[BROKEN][1]).all(2)
    assert marked.sum() == 9 and marked[2:5, 3:6].all()


@pytest.mark.parametrize("size", ((1024, 2048), (512, 1024), (64, 128), (1080, 1919)))
@pytest.mark.parametrize("count", (1, 6, 12, 100, 500))
def test_pictures_of_a_page_are_bounded(size, count):
    factor = pictures.reduction(*size, count)
    assert size[1] / factor <= pictures.WIDTH
    assert size[0] * size[1] * count / factor**2 <= pictures.PIXELS
    assert factor == 1 or size[1] / (factor - 1) > pictures.WIDTH or count > 12
