"""When two backends differ, and the notes on the scores, against cases worked by hand."""

from dataclasses import replace

import pytest

from ffnet.evaluation.scores import FP32, no_scores
from ffnet.run.scoring import differ, scoring_notes

NAN = float("nan")


@pytest.mark.parametrize(
    ("mious", "agreement", "expected"),
    (
        ((83.75, 100.0), 100.0, True),  # far apart in mIoU alone
        ((80.0, 80.0), 93.75, True),  # far apart in predictions alone
        ((80.0, 79.9), 99.5, False),
        ((NAN, NAN), 100.0, False),  # no pixel is labelled
        ((NAN, NAN), 93.75, True),
        ((NAN, 80.0), 100.0, True),
    ),
)
def test_backends_differ_if_miou_or_predictions_are_far_apart(mious, agreement, expected):
    assert differ(mious, agreement) is expected


def test_notes_explain_missing_labels_and_backoff():
    unlabelled, backoff = scoring_notes(replace(no_scores([FP32], 19), batch_size=1))
    assert "no pixel has the label of a class that is scored" in unlabelled
    assert backoff == "The GPU ran out of memory: the last batches had 1 image."
