"""Streams that can't show or hold everything, signals that end the program, and a missing home folder."""

import io
import logging
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

import ffnet_quanteval
from ffnet.system import process
from ffnet.system.process import (
    Terminated,
    interrupt_status,
    log_to_stderr,
    prepared_streams,
    print_lines,
    signals_as_interrupts,
)
from tests.helpers.networks import DEMO, demo_checkpoint
from tests.helpers.program import SCRIPT, arguments

FULL = Path("/dev/full")  # every write to it fails as on a full disk
NOT_A_FOLDER = "/dev/null/none"  # no user, not even root, can create it
LIBRARY_FILES = {".ses", "torchinductor_root"}  # left behind by ONNX Runtime and torch in every run
PROGRAM = f"""
import os, pwd, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import ffnet_quanteval
{{change}}
sys.exit(ffnet_quanteval.main(sys.argv[1:]))
"""
UNKNOWN_USER = """
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""
TERMINATED_TWICE = """
from ffnet.onnx.runtime import OnnxBackend
def end(*_):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
OnnxBackend.__call__ = end
"""

needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def run(*options, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    return subprocess.run([sys.executable, SCRIPT, *options], stdout=stdout, stderr=stderr, timeout=300)


def run_changed(change, folder, *options, **environment):
    """Run the program in `folder` after some code, with nothing but `environment`."""
    variables = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ} | environment
    command = [sys.executable, "-c", PROGRAM.format(change=change), *map(str, options)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def work(tree):
    """An empty folder."""
    folder = tree / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def short_run(tree):
    """The options of a run on one image."""
    return arguments(tree, demo_checkpoint(DEMO), "--limit", "1", model=DEMO)


@pytest.mark.slow
@needs_dev_full
def test_streams_on_a_full_disk_cost_no_file(tree, short_run):
    with FULL.open("w") as full:
        done = run(*short_run, "--output-dir", str(tree / "out"), stdout=full, stderr=full)
    assert done.returncode == 2
    assert (tree / "out" / "result.json").exists() and (tree / "out" / "report.html").exists()


@needs_dev_full
def test_a_full_disk_on_stdout_is_an_error_of_one_line():
    with FULL.open("w") as full:
        done = run("--help", stdout=full)
    message = b"ffnet_quanteval.py: error: stdout can't be written (No space left on device). Free some space, or "
    assert (done.returncode, done.stderr) == (2, message + b"redirect it elsewhere.\n")


@needs_dev_full
def test_an_error_that_stderr_cannot_hold_keeps_its_exit_status():
    with FULL.open("w") as full:
        assert run("--no-such-option", stderr=full).returncode == 2


def test_streams_that_were_closed_are_no_error():
    command = f'exec "{sys.executable}" "{SCRIPT}" --help >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], timeout=300).returncode == 0


def test_a_reader_may_close_the_pipe(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert ffnet_quanteval.main(["--npu", "list"]) == 0


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch):
    buffer, before = io.BytesIO(), sys.stderr
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "latin-1"))
    with prepared_streams():
        print_lines("ü 日 \udcff")
    assert buffer.getvalue() == b"\xfc \\u65e5 \\udcff\n" and sys.stderr is before


HOSTILE = "a\nb\x1b[2J\u202e"
ESCAPED = r"a\nb\x1b[2J\u202e"


def test_each_name_with_control_characters_stays_in_its_line(capsys):
    with prepared_streams():
        print_lines("\x1b[2J1", "2\n3")
        log = logging.Logger("ffnet.test")
        log_to_stderr(log, quiet=False)
        log.warning(HOSTILE)
        sys.stderr.write("\tof a library \x1b[31m\r\n")
    printed = capsys.readouterr()
    assert printed.out == "\\x1b[2J1\n2\n3\n"
    assert printed.err == f"{ESCAPED}\n\tof a library \\x1b[31m\\r\n"
    for words in (["--batch-size", HOSTILE], [HOSTILE], ["--demo", "--onnx", HOSTILE]):
        assert ffnet_quanteval.main(words) == 2
        error = capsys.readouterr().err
        assert ESCAPED in error and error.count("\n") == 1


def show_progress():
    """Show two bars, a message within the second one, and a bar that disappears at its end."""
    with prepared_streams():
        for title, leave in (("calibrate", True), ("evaluate", True), ("search", False)):
            for index in (bar := tqdm(range(3), title, leave=leave)):
                if (title, index) == ("evaluate", 1):
                    print("message", file=sys.stderr)
                    tqdm.write("other message", file=sys.stderr)
                bar.set_postfix_str(f"mIoU {index}")


def test_a_progress_bar_in_a_file_is_a_line_at_its_end_and_lines_in_between_if_it_takes_long(capsys, monkeypatch):
    show_progress()
    shown = capsys.readouterr().err
    assert re.fullmatch("calibrate: 100%.*\nmessage\nother message\nevaluate: 100%.*3/3.*mIoU 2.*\n", shown)
    monkeypatch.setattr(process, "PROGRESS_SECONDS", 0)
    show_progress()
    assert "\r" not in (shown := capsys.readouterr().err) and "\n\n" not in shown
    assert "mIoU 1" in shown and "search" in shown


def test_a_progress_bar_stays_in_one_line_of_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    show_progress()
    assert terminal.getvalue().startswith("\rcalibrate:   0%") and terminal.getvalue().count("\rcalibrate: ") >= 3


def test_work_that_shows_nothing_says_that_it_goes_on_and_bars_are_redrawn(monkeypatch):
    shown, redrawn = queue.Queue(), threading.Event()
    monkeypatch.setattr(process, "SILENT_SECONDS", 0)
    monkeypatch.setattr(process.logger, "info", shown.put)
    with process.heartbeat("Exporting"):
        assert re.fullmatch(r"Exporting: \d+ s so far", shown.get(timeout=60))
    with tqdm(total=2, file=io.StringIO()) as bar, process.heartbeat("Calibrating"):
        bar.refresh = redrawn.set
        assert redrawn.wait(60) and shown.empty()


def test_a_temporary_folder_that_can_not_be_written_names_the_variable(capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [NOT_A_FOLDER])
    assert ffnet_quanteval.main(["--demo"]) == 2
    error = capsys.readouterr().err
    assert "error: TMPDIR: No usable temporary directory found in [" in error and error.count("\n") == 1
    assert error.endswith("Set it to a folder that can be written to.\n")


@pytest.mark.slow
def test_a_repeated_signal_during_the_evaluation_removes_the_temporary_export(tree, work, short_run):
    environment = {"TMPDIR": str(work), "TORCHINDUCTOR_CACHE_DIR": str(tree / "inductor"), "HOME": str(tree)}
    ran = run_changed(TERMINATED_TWICE, tree, *short_run, "--execute", **environment)
    assert ran.returncode == 143 and "Traceback" not in ran.stderr
    assert {path.name for path in work.iterdir()} <= LIBRARY_FILES


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


def test_the_handling_of_signals_is_restored_and_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals_as_interrupts():
            assert callable(signal.getsignal(signal.SIGTERM)) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_ends_by_the_signal():
    with signals_as_interrupts():
        process = os.fork()
        if not process:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM


def test_an_interrupt_keeps_its_signal_on_the_way_to_other_processes():
    assert pickle.loads(pickle.dumps(Terminated(signal.SIGTERM))).number == signal.SIGTERM


@pytest.mark.slow
def test_a_user_without_a_home_folder_is_told_to_set_one(work, short_run):
    ran = run_changed(UNKNOWN_USER, work, *short_run)
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.startswith("ffnet_quanteval.py: error: HOME is not")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "demo"), (("HOME", True), ("TORCH_HOME", False)))
def test_a_cache_folder_that_can_not_be_written_is_named_in_one_line(variable, demo, tree, work):
    options = ["--demo"] if demo else ["--dataset-path", tree, "--model-name", "segmentation_ffnet40S_dBBB_mobile"]
    ran = run_changed(
        UNKNOWN_USER, work, *options, "--use-cuda", "false", "--quiet", **{"HOME": str(tree), variable: NOT_A_FOLDER}
    )
    line = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert line.startswith("ffnet_quanteval.py: error: ") and NOT_A_FOLDER in line and "--cache-dir" in line
    assert list(work.iterdir()) == []
