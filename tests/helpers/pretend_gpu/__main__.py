"""The program on pretended GPUs: `python -m tests.helpers.pretend_gpu GUARD COUNT OPTIONS...`, also under torchrun."""

import sys

from tests.helpers.pretend_gpu.program import run_program

guard, count, *options = sys.argv[1:]
sys.exit(run_program(options, guard, int(count)))
