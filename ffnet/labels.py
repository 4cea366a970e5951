"""Label sets: the classes that a network predicts, their colors, and the ids that label files hold for them.

Needs no torch.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8
from ffnet.system.schema import parse

IGNORED = 255  # train id of every pixel that is not scored
UNKNOWN = 254  # entry of LabelSet.train_ids for an id that the label set does not have


@dataclass(frozen=True)
class ClassLabel:
    """One class that a network predicts."""

    name: str
    color: tuple[int, int, int]  # RGB
    ids: tuple[int, ...]  # values of its pixels in label files; the first is the one in saved predictions


@dataclass(frozen=True)
class LabelSet:
    """The classes in the order of a network's channels. The position of a class is its train id."""

    name: str
    classes: tuple[ClassLabel, ...]
    ignored: tuple[int, ...] = (IGNORED,)  # values of pixels in label files that are not scored

    def __post_init__(self) -> None:
        """Check the values."""
        for problem in (self._problem_of_classes(), self._problem_of_ids()):
            if problem:
                raise ValueError(problem)

    def _problem_of_classes(self) -> str | None:
        if not 2 <= len(self.classes) <= UNKNOWN:
            return f"`classes` has {len(self.classes)} entries, and must have 2 to {UNKNOWN}"
        name, uses = Counter(self.names).most_common(1)[0]
        if uses > 1 or "" in (*self.names, self.name):
            return f"{uses} classes are named {name!r}" if uses > 1 else "a `name` is empty"
        wrong = [label for label in self.classes if not (label.ids and all(0 <= value <= 255 for value in label.color))]
        return f"class {wrong[0].name!r} needs `ids`, and a `color` of three numbers from 0 to 255" if wrong else None

    def _problem_of_ids(self) -> str | None:
        owners = [(each, f"class {label.name!r}") for label in self.classes for each in label.ids]
        owners += [(each, "`ignored`") for each in self.ignored]
        for each, uses in Counter(each for each, _ in owners).items():
            places = " and ".join(owner for value, owner in owners if value == each)
            if uses > 1 or not 0 <= each <= 255:
                return f"id {each} of {places} must be a number from 0 to 255 that occurs once"
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(label.name for label in self.classes)

    @cached_property
    def colors(self) -> np.ndarray:
        """The color of each class, (classes, 3) uint8 RGB."""
        return np.array([label.color for label in self.classes], np.uint8)

    @cached_property
    def label_ids(self) -> np.ndarray:
        """The id of each class in saved predictions, (classes,) uint8."""
        return np.array([label.ids[0] for label in self.classes], np.uint8)

    @cached_property
    def train_ids(self) -> np.ndarray:
        """The train id of each label id, (256,) uint8; IGNORED if it is not scored, UNKNOWN if it is no label id."""
        table = np.full(256, UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORED
        for train_id, label in enumerate(self.classes):
            table[list(label.ids)] = train_id
        return table


def read_label_set(path: Path) -> LabelSet:
    """Return the label set in a JSON file, whose fields are those of LabelSet and ClassLabel.

    Raises:
        UserError: If the file can't be read, or if an entry is wrong.
    """
    try:
        return parse(LabelSet, json.loads(read_utf8(path)))
    except OSError as error:
        raise UserError(f"{path}: this label set can't be read ({error.strerror}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is not a label set: {error}. docs/data.md describes the file.") from error


def _cityscapes(train_ids: bool = False) -> LabelSet:
    """Return the classes of Cityscapes; in label files are their label ids or their train ids."""
    rows: tuple[tuple[str, tuple[int, int, int], int], ...] = (
        ("road", (128, 64, 128), 7),
        ("sidewalk", (244, 35, 232), 8),
        ("building", (70, 70, 70), 11),
        ("wall", (102, 102, 156), 12),
        ("fence", (190, 153, 153), 13),
        ("pole", (153, 153, 153), 17),
        ("traffic light", (250, 170, 30), 19),
        ("traffic sign", (220, 220, 0), 20),
        ("vegetation", (107, 142, 35), 21),
        ("terrain", (152, 251, 152), 22),
        ("sky", (70, 130, 180), 23),
        ("person", (220, 20, 60), 24),
        ("rider", (255, 0, 0), 25),
        ("car", (0, 0, 142), 26),
        ("truck", (0, 0, 70), 27),
        ("bus", (0, 60, 100), 28),
        ("train", (0, 80, 100), 31),
        ("motorcycle", (0, 0, 230), 32),
        ("bicycle", (119, 11, 32), 33),
    )
    classes = [ClassLabel(name, color, (i if train_ids else id_,)) for i, (name, color, id_) in enumerate(rows)]
    others = (IGNORED,) if train_ids else tuple(sorted(set(range(34)) - {id_ for *_, id_ in rows}))
    return LabelSet("Cityscapes", tuple(classes), others)


CITYSCAPES = _cityscapes()  # source: cityscapesScripts, cityscapesscripts/helpers/labels.py
CITYSCAPES_TRAIN_IDS = _cityscapes(train_ids=True)  # as in BDD100K
