"""Signals that ask the program to end, sent to a process of its own."""

import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest
import torch

from ffnet.system.process import Terminated, interrupt_status, signals_as_interrupts
from tests.helpers.networks import DEMO, golden_model, golden_state
from tests.helpers.program import SCRIPT, arguments

LIBRARY_FILES = {".ses", "torchinductor_root"}  # that ONNX Runtime and torch leave behind in every run
# Runs the program, which sends a signal to itself when it scores the exported file.
SIGNAL_IN_EVALUATION = """
import os, sys, signal
sys.path.insert(0, {folder!r})
import ffnet_quanteval
from ffnet.onnx.runtime import OnnxBackend
def end(*_):
    for _ in range({times}):
        os.kill(os.getpid(), {number})
OnnxBackend.__call__ = end
sys.exit(ffnet_quanteval.main(sys.argv[1:]))
"""


def run_until_signal(tree, number, times=1):
    """Run with --execute in a process that gets the signal during the evaluation; return it and its temporary files."""
    checkpoint, temporary = tree / "weights.pth", tree / "temporary"
    torch.save(golden_state(golden_model(DEMO)), checkpoint)
    temporary.mkdir()
    code = SIGNAL_IN_EVALUATION.format(folder=str(SCRIPT.parent), number=int(number), times=times)
    options = arguments(tree, checkpoint, "--execute", "--limit", "1", model=DEMO)
    process = subprocess.run(
        [sys.executable, "-c", code, *options],
        env=os.environ | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tree / "inductor")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process, {path.name for path in temporary.iterdir()} - LIBRARY_FILES


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times", "status"), ((signal.SIGTERM, 2, 143), (signal.SIGHUP, 1, 129)))
def test_a_signal_during_the_evaluation_removes_the_temporary_export(tree, number, times, status):
    process, left = run_until_signal(tree, number, times)
    assert process.returncode == status and "Traceback" not in process.stderr
    assert left == set()


def test_sigterm_and_sighup_end_what_runs_as_ctrl_c_does():
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with pytest.raises(KeyboardInterrupt) as interrupt, signals_as_interrupts():
            os.kill(os.getpid(), number)
        assert interrupt_status(interrupt.value) == status
    assert interrupt_status(KeyboardInterrupt()) == 130


def test_a_repeated_signal_does_not_interrupt_the_cleaning_up():
    cleaned = False
    with pytest.raises(Terminated), signals_as_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_the_handling_of_signals_is_restored():
    with signals_as_interrupts():
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals_as_interrupts():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_changes_no_handler():
    found = []

    def look():
        with signals_as_interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_a_forked_process_ends_by_the_signal():
    with signals_as_interrupts():
        process = os.fork()
        if not process:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM


def test_an_interrupt_reaches_the_main_process_of_several():
    assert pickle.loads(pickle.dumps(Terminated(signal.SIGTERM))).number == signal.SIGTERM
