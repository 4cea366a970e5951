"""Run the program on pretended GPUs or on the CPU, in the process that calls."""

import contextlib
import io
import os

import ffnet_quanteval
from ffnet.report import delivery  # noqa: F401
from ffnet.run import pipeline  # noqa: F401  # what the program imports late: processes are forked from one that has it
from ffnet.variants import VARIANTS
from tests.helpers.networks import TOY
from tests.helpers.pretend_gpu.device import pretend_gpu
from tests.helpers.pretend_gpu.kernels import UNLIMITED
from tests.helpers.two_models import SMOOTHED


def run_program(options, guard=None, count=1, memory=UNLIMITED):
    """Run the program on `count` pretended GPUs, or on the CPU without a `guard`; return the exit status."""
    VARIANTS.update({variant.name: variant for variant in (TOY, SMOOTHED)})
    options = list(map(str, options))
    if guard is None:
        return ffnet_quanteval.main(options)
    options[options.index("--use-cuda") + 1] = "true"
    with pretend_gpu(guard, count, memory):
        return ffnet_quanteval.main(options)


def run_rank(options, guard, environment):
    """Run the program as one of two processes on two pretended GPUs, with torchrun's environment."""
    os.environ.update(environment)
    return run_program(options, guard, count=2)


def failure_of(options, guard, mistakes=(), memory=UNLIMITED):
    """Run the program with mistakes on a pretended GPU; return what it writes to stderr, and its error.

    The mistakes stay in the process.
    """
    for mistake in mistakes:
        mistake.plant()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            run_program(options, guard, memory=memory)
        except (RuntimeError, TypeError) as error:
            print(error, file=stderr)
    return stderr.getvalue()
