"""The end of a run: what is printed and written, and the exit status."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from ffnet.backends import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED
from ffnet.config import Config, OutputConfig
from ffnet.errors import UserError
from ffnet.report.delivery import deliver
from ffnet.report.file_names import RESULT_FILES
from ffnet.report.result import Diagnostics
from ffnet.signals import Terminated
from tests.helpers.results import (
    small_layers,
    small_npu,
    small_recovery,
    small_result,
    small_scores,
    small_sensitivity,
)


def result_with_mious(**mious):
    """A Result whose backends have these mIoU; the names' underscores stand for spaces."""
    entry = small_result().backends[FP32]
    backends = {name.replace("_", " "): dataclasses.replace(entry, miou=miou) for name, miou in mious.items()}
    return small_result(backends=backends)


def disk_is_full(path, data):
    raise OSError(28, "No space left on device", str(path))


def test_a_run_without_output_folder_prints_the_report_only(capsys):
    assert deliver([small_result()], Config(output=OutputConfig())) == 0
    printed = capsys.readouterr()
    assert "mIoU %" in printed.out and "\x1b" not in printed.out and "Written" not in printed.out
    assert printed.err == ""


def test_color_is_used_on_a_terminal_unless_no_color_is_set(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    deliver([small_result()], Config(output=OutputConfig()))
    assert "\x1b[1m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    deliver([small_result()], Config(output=OutputConfig()))
    assert "\x1b" not in capsys.readouterr().out


def test_all_files_are_written_and_named(tmp_path, capsys):
    diagnostics = Diagnostics(sensitivity=small_sensitivity(), npu_layers=small_layers())
    result = small_result(diagnostics=diagnostics, recovery=small_recovery())
    assert deliver([result], Config(output=OutputConfig(output_dir=tmp_path))) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(RESULT_FILES)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Written to {tmp_path}: ") and all(name in last for name in RESULT_FILES)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result.to_json()))


def test_stale_files_of_an_earlier_run_are_removed_and_other_files_stay(tmp_path):
    for name in (*RESULT_FILES, "notes.txt"):
        (tmp_path / name).write_text("")
    deliver([small_result()], Config(output=OutputConfig(output_dir=tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {
        *RESULT_FILES, "notes.txt",
    } - {"recovery.csv", "sensitivity.csv", "npu_layers.csv"}  # fmt: skip


def test_the_json_result_is_on_stdout_if_the_disk_is_full(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", disk_is_full)
    result = small_result()
    assert deliver([result], Config(output=OutputConfig(output_dir=tmp_path))) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"ffnet_quanteval.py: error: --output-dir {tmp_path}: ")
    assert "No space left on device" in printed.err
    assert json.loads(printed.out.splitlines()[-1]) == json.loads(json.dumps(result.to_json()))
    assert "mIoU %" in printed.out


def test_a_reader_that_closes_the_pipe_loses_no_file(tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert deliver([small_result()], Config(output=OutputConfig(output_dir=tmp_path))) == 0
    assert (tmp_path / "report.html").exists()


def test_unsaved_predictions_are_an_error_after_the_report(capsys):
    result = small_result(small_scores(unsaved="/p/a_pred_labelIds.png: No space left on device"))
    assert deliver([result], Config(output=OutputConfig())) == 2
    printed = capsys.readouterr()
    assert "mIoU %" in printed.out
    assert "error: /p/a_pred_labelIds.png: No space left on device. " in printed.err


@pytest.mark.parametrize(
    ("failure", "status"), ((UserError("diagnostics failed"), 2), (KeyboardInterrupt(), 130), (Terminated(15), 143))
)
def test_results_are_delivered_even_if_the_run_failed_afterwards(tmp_path, capsys, failure, status):
    assert deliver([small_result(failure=failure)], Config(output=OutputConfig(output_dir=tmp_path))) == status
    printed = capsys.readouterr()
    assert "mIoU %" in printed.out and (tmp_path / "result.json").exists()
    assert printed.err == ("ffnet_quanteval.py: error: diagnostics failed\n" if status == 2 else "")


@pytest.mark.parametrize(
    ("int8", "allowed", "status"), ((79.0, 1.5, 0), (79.0, 1.0, 0), (79.0, 0.9, 1), (81.0, 0.0, 0), (None, 5.0, 1))
)
def test_a_drop_beyond_fail_under_gives_status_1(capsys, int8, allowed, status):
    result = result_with_mious(FP32=80.0, INT8_simulated=int8)
    assert deliver([result], Config(output=OutputConfig(fail_under=allowed))) == status
    assert (f"{INT8_SIMULATED} is " in capsys.readouterr().err) == bool(status)


def test_fail_under_covers_the_drop_on_the_images_of_the_npu(capsys):
    result = dataclasses.replace(result_with_mious(FP32=80.0, INT8_simulated=80.0), npu=small_npu())
    assert deliver([result], Config(output=OutputConfig(fail_under=16))) == 1
    assert "the mIoU drop of INT8 NPU is 16.25 percentage points" in capsys.readouterr().err
    assert deliver([result], Config(output=OutputConfig(fail_under=17))) == 0


def test_every_backend_that_exceeds_fail_under_is_named(capsys):
    result = result_with_mious(FP32=80.0, INT8_simulated=78.0, INT8_ONNX_Runtime=77.5)
    assert deliver([result], Config(output=OutputConfig(fail_under=1))) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"ffnet_quanteval.py: --fail-under 1: the mIoU drop of {INT8_SIMULATED} is 2.00 percentage points.",
        f"ffnet_quanteval.py: --fail-under 1: the mIoU drop of {INT8_ONNX_RUNTIME} is 2.50 percentage points.",
    ]
