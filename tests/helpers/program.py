"""Runs of the program inside the test's process, and in forks of it, which need not import torch again."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

import ffnet_quanteval
from tests.helpers.networks import TOY

SCRIPT = Path(ffnet_quanteval.__file__)


def arguments(tree, checkpoint, *more, model=TOY.name):
    """Return the options of a small run on a CPU, followed by `more`."""
    return ["--model-name", model, "--dataset-path", str(tree), "--checkpoint", str(checkpoint),
            "--use-cuda", "false", "--batch-size", "2", "--num-workers", "0", *map(str, more)]  # fmt: skip


def run_with_result(options, folder):
    """Run the program with --output-dir `folder`, check that it succeeds, and return the content of result.json."""
    assert ffnet_quanteval.main([*map(str, options), "--output-dir", str(folder)]) == 0
    return json.loads((Path(folder) / "result.json").read_text())


def start_fork(function, log):
    """Start a fork of this process that prints to the file `log` and exits with the function's return value."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with open(log, "w") as file:  # noqa: PTH123
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            torch.set_num_threads(torch.get_num_threads())  # a fork breaks torch's pool of threads
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def run_in_fork(options, log, before=lambda: None):
    """Call `before` and the program in a fork; return its exit status, or minus the signal that ended it."""

    def run():
        before()
        return ffnet_quanteval.main([*map(str, options)])

    return os.waitstatus_to_exitcode(os.waitpid(start_fork(run, log), 0)[1])


def run_on_ranks(count, function, folder):
    """Call `function(rank)` in forks with torchrun's environment; return the status of the first failure, 0 if none.

    As torchrun does, end all ranks once one fails. Rank N prints to the file `log-N`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": count}

    def run(rank):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in (shared | own).items()})
        return function(rank)

    running = {start_fork(lambda rank=rank: run(rank), folder / f"log-{rank}") for rank in range(count)}
    deadline, status = time.monotonic() + 300, 0
    while running and not status:
        for child in list(running):
            pid, code = os.waitpid(child, os.WNOHANG)
            if pid:
                running.remove(child)
                status = status or os.waitstatus_to_exitcode(code)
        assert time.monotonic() < deadline, "the ranks do not end"
        time.sleep(0.01)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status
