"""A sample of the random command lines of tests/soak.py."""

import subprocess
import sys

import pytest

from tests.helpers.program import SCRIPT


@pytest.mark.slow
def test_random_command_lines_end_with_a_status_and_leave_nothing_half_written():
    command = [sys.executable, "-m", "tests.soak", "--count", "60", "--seed", "1"]
    run = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert run.stdout.startswith("60 command lines: ") and run.stdout.endswith(", 0 with faults\n")
