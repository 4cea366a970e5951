"""A sample of the random command lines of tests/soak.py."""

import pytest

from tests.soak import soak


@pytest.mark.slow
def test_random_command_lines_end_with_a_status_and_leave_nothing_half_written(toy_variant):
    statuses, failures = soak(24, seed=1)
    assert statuses.total() == 24 and statuses[0] >= 2 and failures == 0
