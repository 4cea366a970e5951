"""The sentences on accuracy recovery, and what became of each step."""

import dataclasses

import pytest

from tests.helpers.results import small_recovery, unlabelled_recovery

TRIED = "Accuracy recovery tried 5 configurations and chose mixed precision, 1 of 10 raised, with an"
CHOSEN = f"{TRIED} mIoU drop of 0.88 percentage points"
WITH_ERROR = dataclasses.replace(small_recovery().steps[-1], change_interval=(-1.0, -0.75))
MEASURED = [*small_recovery().steps[:-1], WITH_ERROR]
MISSED = [dataclasses.replace(step, met=False) for step in MEASURED]


def test_the_chosen_configuration_is_described_with_its_drop_and_the_images():
    assert small_recovery(steps=MEASURED).describe() == f"{CHOSEN} on 4 selection images."
    assert small_recovery(steps=MEASURED, selection_images=["a"]).describe() == f"{CHOSEN} on 1 selection image."
    assert small_recovery(steps=[WITH_ERROR]).describe().startswith("Accuracy recovery tried 1 configuration and chose")
    assert unlabelled_recovery().describe() == f"{TRIED} unknown mIoU drop on 4 selection images."


def test_a_drop_that_rounds_to_zero_has_no_sign():
    recovery = small_recovery()
    exact = dataclasses.replace(recovery.steps[-1], change=0.001)
    assert "drop of 0.00 percentage" in dataclasses.replace(recovery, steps=[exact]).describe()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"target": 0.5, "steps": MISSED}, "No configuration met --max-drop 0.5: this is the one with the smallest "
         "drop."),
        ({"steps": MISSED, "interrupted": True}, "The search was interrupted; this is the best configuration that it "
         "had found."),
        ({"steps": small_recovery().steps}, "The images are too few for a standard error, so the estimate alone met "
         "--max-drop."),
        ({"target": 0.0}, "With --max-drop 0 the estimate decides, without allowing for its standard error."),
        ({"scored_too": True}, "The selection images belong to the split that is scored, so the mIoU may be too "
         "favorable; with --calibration-split train they do not."),
    ),
)  # fmt: skip
def test_what_limits_the_result_is_said(changes, sentence):
    assert small_recovery(**{"steps": MEASURED} | changes).describe() == f"{CHOSEN} on 4 selection images. {sentence}"


@pytest.mark.parametrize(
    ("target", "steps", "met"), ((None, MISSED, None), (1.0, MEASURED, True), (1.0, MISSED, False))
)
def test_the_target_is_met_if_the_chosen_configuration_meets_it(target, steps, met):
    assert small_recovery(target=target, steps=steps).met is met


def test_the_outcome_of_a_step_is_whether_it_is_chosen_or_later_steps_started_from_it():
    recovery = small_recovery()
    assert [recovery.outcome(step) for step in recovery.steps] == ["kept", "kept", "not kept", "not kept", "chosen"]
