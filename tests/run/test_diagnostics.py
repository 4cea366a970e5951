"""When two backends differ, against cases worked by hand."""

import pytest

from ffnet.run.diagnostics import differ

NAN = float("nan")


@pytest.mark.parametrize(
    ("mious", "agreement", "expected"),
    (
        ((100.0, 83.75), 93.75, True),
        ((83.75, 100.0), 100.0, True),  # far apart in mIoU alone
        ((80.0, 80.0), 93.75, True),  # far apart in predictions alone
        ((80.0, 80.0), 100.0, False),
        ((80.0, 79.9), 99.5, False),
        ((NAN, NAN), 100.0, False),  # no pixel is labelled
        ((NAN, NAN), 93.75, True),
        ((NAN, 80.0), 100.0, True),
    ),
)
def test_backends_differ_if_miou_or_predictions_are_far_apart(mious, agreement, expected):
    assert differ(mious, agreement) is expected
