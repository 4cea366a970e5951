"""The table of chips: names, numbers, and what users learn whose chip or package is missing."""

import importlib.util
import json

import pytest

from ffnet.chips import ALIASES, CHIPS, check_npu_package, find_chip, format_chips
from ffnet.results import ai_hub
from ffnet.results.published import devices_with
from ffnet.system.errors import UserError

# Numbers that Qualcomm's QAIRT documentation and onnxruntime-qnn list, copied by hand.
NUMBERS = {"sm8350": 30, "qcs6490": 35, "sm8450": 36, "sm8650": 57, "sc8380xp": 60, "sm8750": 69, "sm8850": 87}
# The soc_model of chips in the devices_and_chipsets.yaml of AI Hub Models 0.65.0, copied by hand.
AI_HUB_NUMBERS = {"qcm6690": 78, "qcs7181": 60, "qcs7790": 86, "qcs8275": 82, "qcs8450": 36, "qcs8750": 69,
                  "qcs9075": 77, "sa7255p": 67, "sa8295p": 39, "sa8650p": 52, "sc8480xp": 88, "sm7750": 86,
                  "sm8950": 113}  # fmt: skip


def test_chips_have_the_numbers_that_the_runtime_expects():
    assert {part: CHIPS[part].soc_model for part in NUMBERS} == NUMBERS
    assert len({chip.soc_model for chip in CHIPS.values()}) == len(CHIPS) == 32
    assert {part: find_chip(part).soc_model for part in AI_HUB_NUMBERS} == AI_HUB_NUMBERS


def test_every_device_on_which_ai_hub_measured_has_a_chip():
    devices = json.loads(ai_hub.TABLE_FILE.read_text())["devices"]
    assert all(devices_with(chip) for chip in ("qcs8550", "sa7255", "sm7750"))
    assert sorted(device for chip in CHIPS for device in devices_with(chip)) == sorted(devices)


@pytest.mark.parametrize("name", ["SM8750", " snapdragon-8-elite ", "Snapdragon 8 Elite"])
def test_a_chip_is_found_by_part_or_marketing_name_in_any_case(name):
    chip = find_chip(name)
    assert (chip.part, chip.soc_model, chip.architecture) == ("sm8750", 69, "v79")


def test_aliases_are_no_names_of_the_table():
    marketing = {chip.name.lower().replace(" ", "-") for chip in CHIPS.values()}
    assert not ALIASES.keys() & (CHIPS.keys() | marketing)
    assert find_chip("SM7325") == find_chip("Snapdragon 778G") == CHIPS["qcs6490"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("sm8570", "sm8750"), ("snapdragon-8-elit", "snapdragon-8-elite"), ("8 Elite Gen 5", "snapdragon-8-elite-gen-5")],
)
def test_the_closest_names_are_suggested_for_a_typo(typo, meant):
    message = rf"^{typo!r} is not a known chip. Did you mean .*\b{meant}\b.*\? --npu list prints the table.$"
    with pytest.raises(ValueError, match=message):
        find_chip(typo)


@pytest.mark.parametrize("name", ["", "automotive", "\u2603" * 1000])
def test_names_that_resemble_nothing_are_refused_without_a_suggestion(name):
    with pytest.raises(ValueError, match="--npu list prints the table") as error:
        find_chip(name)
    assert "Did you mean" not in str(error.value) and len(str(error.value)) < 200


def test_the_table_lists_every_chip():
    heading, *rows = format_chips().splitlines()
    assert heading.split() == ["part", "name", "soc_model", "architecture", "also"]
    assert [row.split()[0] for row in rows] == list(CHIPS)
    assert ["sm7750", "Snapdragon", "7", "Gen", "4", "86", "v73", "dragonwing-q-7790", "qcs7790"] in map(
        str.split, rows
    )


def test_a_missing_npu_package_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--npu: .*not installed.*pip install -r requirements-npu.txt"):
        check_npu_package()
