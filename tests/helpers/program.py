"""Runs of the program inside the test's process."""

import json
import os
import sys
from pathlib import Path

import torch

import ffnet_quanteval
from tests.helpers.networks import TOY

SCRIPT = Path(ffnet_quanteval.__file__)


def arguments(tree, checkpoint, *more, model=TOY.name):
    """The options of a small run on a CPU, and `more` of them."""
    return ["--model-name", model, "--dataset-path", str(tree), "--checkpoint", str(checkpoint),
            "--use-cuda", "false", "--batch-size", "2", "--num-workers", "0", *map(str, more)]  # fmt: skip


def run_with_result(options, folder):
    """Run the program with --output-dir `folder`, check that it succeeds, and return what result.json holds."""
    status = ffnet_quanteval.main([*map(str, options), "--output-dir", str(folder)])
    assert status == 0
    return json.loads((Path(folder) / "result.json").read_text())


def run_in_fork(options, log, before=lambda: None):
    """Run the program in a fork of this process; return its exit status, or minus the signal that ended it.

    The fork calls `before` first, for example to have itself killed, and writes what it prints to the file `log`.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with open(log, "w") as file:  # noqa: PTH123
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            torch.set_num_threads(torch.get_num_threads())  # a fork breaks torch's pool of threads
            before()
            status = ffnet_quanteval.main([*map(str, options)])
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
