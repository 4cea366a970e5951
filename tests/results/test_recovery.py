"""The sentences on accuracy recovery, and what became of each step."""

import dataclasses

import pytest

from tests.helpers.results import small_recovery, unlabelled_recovery

CHOSEN = "Accuracy recovery: mixed precision, 1 of 10 raised, with an mIoU drop of 0.88 percentage points"


def test_the_chosen_configuration_is_described_with_its_drop_and_the_images():
    assert small_recovery().describe() == f"{CHOSEN} on 4 selection images."
    assert small_recovery(selection_images=["a"]).describe() == f"{CHOSEN} on 1 selection image."
    assert unlabelled_recovery().describe() == (
        "Accuracy recovery: mixed precision, 1 of 10 raised, with an unknown mIoU drop on 4 selection images."
    )


def test_a_drop_that_rounds_to_zero_has_no_sign():
    recovery = small_recovery()
    exact = dataclasses.replace(recovery.steps[-1], drop=-0.001)
    assert "drop of 0.00 percentage" in dataclasses.replace(recovery, steps=[exact]).describe()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"target": 0.5}, "No configuration met --max-drop 0.5: this is the one with the smallest drop."),
        ({"target": 0.5, "interrupted": True}, "The search was interrupted; this is the best configuration that it "
         "had found."),
        ({"scored_too": True}, "The selection images belong to the split that is scored, so the mIoU may be too "
         "favorable; with --calibration-split train they do not."),
    ),
)  # fmt: skip
def test_what_limits_the_result_is_said(changes, sentence):
    assert small_recovery(**changes).describe() == f"{CHOSEN} on 4 selection images. {sentence}"


@pytest.mark.parametrize(("target", "met"), ((None, None), (0.875, True), (0.87, False)))
def test_the_target_is_met_by_a_drop_of_the_same_size(target, met):
    assert small_recovery(target=target).met is met
    assert dataclasses.replace(unlabelled_recovery(), target=target).met is (None if target is None else False)


def test_the_outcome_of_a_step_is_whether_it_is_chosen_or_later_steps_started_from_it():
    recovery = small_recovery()
    assert [recovery.outcome(step) for step in recovery.steps] == ["kept", "kept", "not kept", "not kept", "chosen"]
