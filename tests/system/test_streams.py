"""Results come out of streams that can't show or hold everything: run as a process of its own, with such streams."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ffnet_quanteval
from ffnet.system.errors import UserError
from ffnet.system.process import prepared_streams, print_lines
from tests.helpers.networks import DEMO, golden_model, golden_state
from tests.helpers.program import SCRIPT, arguments

FULL = Path("/dev/full")  # every write to it fails as on a full disk

needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def run(*options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, stdout=stdout, stderr=stderr, env=os.environ | environment, timeout=300)


@pytest.fixture
def run_options(tree):
    """The options of a short run, whose dataset and checkpoint have names beyond ASCII."""
    checkpoint = tree / "Gewichte-ü-日本.pth"
    torch.save(golden_state(golden_model(DEMO)), checkpoint)
    return arguments(tree, checkpoint, "--limit", "1", model=DEMO)


@pytest.mark.slow
def test_the_report_and_the_progress_come_out_of_streams_that_know_ascii_only(tree, run_options):
    out = tree / "Ergebnis-ü"
    done = run(*run_options, "--output-dir", out, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert b"mIoU %" in done.stdout and rb"/Ergebnis-\xfc: result.json" in done.stdout and done.stdout.isascii()
    assert b"evaluate: 100%|##########| 1/1" in done.stderr and done.stderr.isascii()
    assert json.loads((out / "result.json").read_text())["checkpoint"]["path"].endswith("Gewichte-ü-日本.pth")


@pytest.mark.slow
@needs_dev_full
def test_streams_on_a_full_disk_cost_no_file(tree, run_options):
    for name, streams in {"out": ("stdout",), "err": ("stderr",), "both": ("stdout", "stderr")}.items():
        with FULL.open("w") as full:
            done = run(*run_options, "--output-dir", tree / name, **dict.fromkeys(streams, full))
        assert (tree / name / "result.json").exists() and (tree / name / "report.html").exists()
        assert done.returncode == (2 if "stdout" in streams else 0)
        if streams == ("stdout",):
            assert b"Traceback" not in done.stderr and b"No space left on device" in done.stderr.splitlines()[-1]
        if streams == ("stderr",):
            assert b"mIoU %" in done.stdout


@needs_dev_full
@pytest.mark.parametrize("options", (["--help"], pytest.param(["--list-models"], marks=pytest.mark.slow)))
def test_a_full_disk_on_stdout_is_an_error_of_one_line(options):
    with FULL.open("w") as full:
        done = run(*options, stdout=full)
    assert (done.returncode, done.stderr) == (
        2,
        b"ffnet_quanteval.py: error: stdout can't be written (No space left on device). Free some space, or redirect "
        b"it elsewhere.\n",
    )


@needs_dev_full
def test_an_error_that_stderr_cannot_hold_keeps_its_exit_status():
    with FULL.open("w") as full:
        assert run("--no-such-option", stderr=full).returncode == 2


@pytest.mark.slow
def test_names_that_are_not_utf8_are_escaped_in_errors(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    done = run("--use-cuda", "false", CITYSCAPES_DATASET=os.fsdecode(folder))
    assert done.returncode == 2 and rb"/\udcff" in done.stderr and done.stderr.count(b"\n") == 1


def test_streams_that_were_closed_are_no_error():
    command = f'exec "{sys.executable}" "{SCRIPT}" --help >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], timeout=300).returncode == 0


def test_a_stream_that_cannot_be_reconfigured_takes_the_report(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with prepared_streams():
        print_lines("mIoU", "ü")
    assert stream.getvalue() == "mIoU\nü\n"


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "latin-1"))
    with prepared_streams():
        print_lines("ü 日 \udcff")
    assert buffer.getvalue() == b"\xfc \\u65e5 \\udcff\n"


def test_stderr_is_what_it_was_after_the_program():
    before = sys.stderr
    assert ffnet_quanteval.main(["--no-such-option"]) == 2
    assert sys.stderr is before


@needs_dev_full
def test_a_full_disk_is_named_when_lines_are_printed(monkeypatch):
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with prepared_streams(), pytest.raises(UserError, match="stdout can't be written .No space left on device"):
            print_lines("mIoU")
