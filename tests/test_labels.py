"""Cityscapes' label set against the official table, and label sets of files."""

import json

import pytest
from cityscapesscripts.helpers.labels import labels as official

from ffnet.labels import CITYSCAPES, CITYSCAPES_TRAIN_IDS, IGNORED, UNKNOWN, read_label_set
from ffnet.system.errors import UserError

TRAIL = {"name": "trail", "color": [128, 64, 0], "ids": [3, 7]}
GRASS = {"name": "grass", "color": [0, 200, 0], "ids": [1]}
FILE = {"name": "off-road", "classes": [TRAIL, GRASS], "ignored": [0, 255]}


def test_cityscapes_is_the_official_table():
    scored = sorted((label for label in official if 0 <= label.trainId < 255), key=lambda label: label.trainId)
    assert list(CITYSCAPES.names) == [label.name for label in scored]
    assert CITYSCAPES.label_ids.tolist() == [label.id for label in scored]
    assert CITYSCAPES.colors.tolist() == [list(label.color) for label in scored]
    assert CITYSCAPES.train_ids[:34].tolist() == [label.trainId for label in official if label.id >= 0]
    assert set(CITYSCAPES.train_ids[34:]) == {UNKNOWN}


def test_the_train_ids_of_cityscapes_stand_for_themselves():
    assert CITYSCAPES_TRAIN_IDS.names == CITYSCAPES.names
    assert CITYSCAPES_TRAIN_IDS.train_ids.tolist() == [*range(19), *[UNKNOWN] * 236, IGNORED]


def test_a_file_gives_names_colors_and_ids(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(FILE))
    found = read_label_set(tmp_path / "classes.json")
    assert (found.name, found.names, found.label_ids.tolist()) == ("off-road", ("trail", "grass"), [3, 1])
    assert found.colors.tolist() == [[128, 64, 0], [0, 200, 0]]
    assert found.train_ids[:8].tolist() == [IGNORED, 1, UNKNOWN, 0, UNKNOWN, UNKNOWN, UNKNOWN, 0]


FAULTS = {
    "no JSON": ("{", "Expecting property name"),
    "a list": ("[]", "the content can't be"),
    "a field too many": (FILE | {"void": 0}, "'void'"),
    "no classes": ({"name": "x", "ignored": []}, "'classes'"),
    "one class": (FILE | {"classes": [GRASS]}, "`classes` has 1 entries"),
    "the same name twice": (FILE | {"classes": [GRASS, GRASS | {"ids": [4]}]}, "2 classes are named 'grass'"),
    "an id twice": (FILE | {"classes": [TRAIL, GRASS | {"ids": [7]}]}, "id 7 of class 'trail' and class 'grass'"),
    "an id that is ignored": (FILE | {"ignored": [1]}, "id 1 of class 'grass' and `ignored`"),
    "a large id": (FILE | {"classes": [TRAIL, GRASS | {"ids": [256]}]}, "id 256 of class 'grass'"),
    "a word for an id": (FILE | {"classes": [TRAIL, GRASS | {"ids": ["1"]}]}, "ids can't be 1"),
    "a wrong color": (
        FILE | {"classes": [TRAIL, GRASS | {"color": [0, 0, 300]}]},
        "'grass' needs `ids`, and a `color`",
    ),
    "two numbers for a color": (FILE | {"classes": [TRAIL, GRASS | {"color": [0, 0]}]}, "color can't be"),
    "no ids": (FILE | {"classes": [TRAIL, GRASS | {"ids": []}]}, "class 'grass' needs `ids`"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_with_the_entry_that_is_wrong(tmp_path, fault):
    content, named = FAULTS[fault]
    path = tmp_path / "classes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        read_label_set(path)
    assert str(error.value).startswith(f"{path}: ") and named in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="classes.json: this label set can't be read"):
        read_label_set(tmp_path / "classes.json")
