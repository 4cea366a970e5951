"""The labels against the tables of torchvision and of the official cityscapesScripts."""

from cityscapesscripts.helpers.labels import labels as official
from torchvision.datasets import Cityscapes

from ffnet.labels import CLASSES, COLORS, LABEL_IDS, LABELS, TRAIN_IDS


def test_the_labels_equal_torchvisions():
    expected = [
        (c.id, c.name, c.color, 255 if c.ignore_in_eval else c.train_id) for c in Cityscapes.classes if c.id >= 0
    ]
    assert [(label.id, label.name, label.color, label.train_id) for label in LABELS] == expected


def test_the_arrays_equal_the_official_tables():
    scored = sorted((label for label in official if 0 <= label.trainId < 255), key=lambda label: label.trainId)
    assert list(CLASSES) == [label.name for label in scored]
    assert LABEL_IDS.tolist() == [label.id for label in scored]
    assert COLORS.tolist() == [list(label.color) for label in scored]
    assert TRAIN_IDS.tolist() == [label.trainId for label in official if label.id >= 0]
