"""The labels of Cityscapes: names, colors, and the map from label ids to the ids that networks are trained with.

Source: cityscapesScripts, `cityscapesscripts/helpers/labels.py`. Needs no torch.
"""

from dataclasses import dataclass

import numpy as np

IGNORED = 255  # train id of every pixel that is not scored


@dataclass(frozen=True)
class Label:
    """One label of the ground truth."""

    id: int
    name: str
    color: tuple[int, int, int]  # RGB
    train_id: int = IGNORED


LABELS = (
    Label(0, "unlabeled", (0, 0, 0)),
    Label(1, "ego vehicle", (0, 0, 0)),
    Label(2, "rectification border", (0, 0, 0)),
    Label(3, "out of roi", (0, 0, 0)),
    Label(4, "static", (0, 0, 0)),
    Label(5, "dynamic", (111, 74, 0)),
    Label(6, "ground", (81, 0, 81)),
    Label(7, "road", (128, 64, 128), 0),
    Label(8, "sidewalk", (244, 35, 232), 1),
    Label(9, "parking", (250, 170, 160)),
    Label(10, "rail track", (230, 150, 140)),
    Label(11, "building", (70, 70, 70), 2),
    Label(12, "wall", (102, 102, 156), 3),
    Label(13, "fence", (190, 153, 153), 4),
    Label(14, "guard rail", (180, 165, 180)),
    Label(15, "bridge", (150, 100, 100)),
    Label(16, "tunnel", (150, 120, 90)),
    Label(17, "pole", (153, 153, 153), 5),
    Label(18, "polegroup", (153, 153, 153)),
    Label(19, "traffic light", (250, 170, 30), 6),
    Label(20, "traffic sign", (220, 220, 0), 7),
    Label(21, "vegetation", (107, 142, 35), 8),
    Label(22, "terrain", (152, 251, 152), 9),
    Label(23, "sky", (70, 130, 180), 10),
    Label(24, "person", (220, 20, 60), 11),
    Label(25, "rider", (255, 0, 0), 12),
    Label(26, "car", (0, 0, 142), 13),
    Label(27, "truck", (0, 0, 70), 14),
    Label(28, "bus", (0, 60, 100), 15),
    Label(29, "caravan", (0, 0, 90)),
    Label(30, "trailer", (0, 0, 110)),
    Label(31, "train", (0, 80, 100), 16),
    Label(32, "motorcycle", (0, 0, 230), 17),
    Label(33, "bicycle", (119, 11, 32), 18),
)

_SCORED = sorted((label for label in LABELS if label.train_id != IGNORED), key=lambda label: label.train_id)
CLASSES = tuple(label.name for label in _SCORED)  # the position is the train id
NUM_CLASSES = len(CLASSES)
COLORS = np.array([label.color for label in _SCORED], np.uint8)  # (19, 3) RGB
LABEL_IDS = np.array([label.id for label in _SCORED], np.uint8)  # train id -> label id
TRAIN_IDS = np.array([label.train_id for label in LABELS], np.uint8)  # label id -> train id
