"""The end of a run: what is printed and written, and the exit status."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from ffnet.config import COMPARISON_FILES, REPORT, RESULT_FILES, Config, ModelConfig, OutputConfig
from ffnet.evaluation.scores import FP32, SIMULATED
from ffnet.report.delivery import deliver
from ffnet.results.result import Diagnostics
from ffnet.system.errors import UserError
from ffnet.system.process import Terminated
from tests.helpers.names import INT8_SIMULATED
from tests.helpers.results import (
    scores_of,
    several_chips,
    small_layers,
    small_npu,
    small_recovery,
    small_result,
    small_scores,
    small_sensitivity,
)


def result_with_mious(**mious):
    """A Result whose backends have these mIoU and change accordingly; the names' underscores stand for spaces."""
    entry, backends = small_result().backends[FP32], {}
    for name, miou in mious.items():
        change = None if name == FP32 or miou is None else miou - mious[FP32]
        backends[name.replace("_", " ")] = dataclasses.replace(entry, miou=miou, change=change)
    return small_result(backends=backends)


def disk_is_full(path, data):
    raise OSError(28, "No space left on device", str(path))


def test_a_run_without_output_folder_prints_the_report_only(capsys):
    assert deliver([small_result()], Config(output=OutputConfig())) == 0
    printed = capsys.readouterr()
    assert "mIoU %" in printed.out and "Written" not in printed.out
    assert printed.err == ""


def test_all_files_are_written_and_named(tmp_path, capsys):
    diagnostics = Diagnostics(sensitivity=small_sensitivity())
    result = small_result(diagnostics=diagnostics, recovery=small_recovery(), layers=small_layers())
    assert deliver([result], Config(output=OutputConfig(output_dir=tmp_path))) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(RESULT_FILES)
    written, page = capsys.readouterr().out.splitlines()[-2:]
    assert written.startswith(f"Written to {tmp_path}: ") and page == f"Report: {tmp_path / REPORT}"
    assert set(written.partition(": ")[2].split(", ")) == set(RESULT_FILES) - {REPORT}
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result.to_json()))


def test_stale_files_of_an_earlier_run_are_removed_and_other_files_stay(tmp_path):
    for name in (*RESULT_FILES, "notes.txt"):
        (tmp_path / name).write_text("")
    deliver([small_result()], Config(output=OutputConfig(output_dir=tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {
        *RESULT_FILES, "notes.txt",
    } - {"recovery.csv", "sensitivity.csv", "layers.csv"}  # fmt: skip


def test_the_json_result_is_on_stdout_if_the_disk_is_full(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Path, "replace", disk_is_full)
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


def test_names_in_notes_and_errors_begin_no_line_and_do_not_control_the_terminal(capsys):
    result = dataclasses.replace(small_result(failure=UserError("a\n\x1b[2J")), notes=["b\n\x1b[2J"])
    assert deliver([result], Config()) == 2
    printed = capsys.readouterr()
    assert printed.err == "ffnet_quanteval.py: error: a\\n\\x1b[2J\n" and "Note: b\\n\\x1b[2J\n" in printed.out


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
    assert capsys.readouterr().err == (
        "ffnet_quanteval.py: --fail-under 16: the mIoU drop of INT8 NPU is 16.25 percentage points.\n"
    )
    assert deliver([result], Config(output=OutputConfig(fail_under=17))) == 0


def compared_result(name, **mious):
    """A Result of a named variant with these mIoU."""
    return dataclasses.replace(result_with_mious(**mious), model=name)


MODELS = ("segmentation_ffnet40S_dBBB_mobile", "segmentation_ffnet54S_dBBB_mobile")
GOOD, BAD = ({"FP32": 80.0, "INT8_simulated": int8} for int8 in (79.5, 70.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mious", "failures", "status", "messages"),
    (
        ((GOOD, GOOD), (None, None), 0, ()),
        ((GOOD, BAD), (None, None), 1, ("54S_dBBB_mobile: --fail-under 1: the mIoU drop of INT8 simulated is 10.00",)),
        ((BAD, GOOD), (None, None), 1, ("40S_dBBB_mobile: --fail-under 1: the mIoU drop of INT8 simulated is 10.00",)),
        ((BAD, GOOD), (None, UserError("broke")), 2, ("40S_dBBB_mobile: --fail-under", "54S_dBBB_mobile: broke")),
        ((GOOD, BAD), (Terminated(15), None), 143, ("54S_dBBB_mobile: --fail-under",)),
    ),
)
def test_the_exit_status_covers_all_models(tmp_path, capsys, mious, failures, status, messages):
    config = Config(ModelConfig(MODELS), output=OutputConfig(output_dir=tmp_path, fail_under=1.0))
    results = []
    for name, values, failure in zip(MODELS, mious, failures, strict=True):
        result = compared_result(name, **values)
        results.append(dataclasses.replace(result, details=dataclasses.replace(result.details, failure=failure)))
    assert deliver(results, config) == status
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("ffnet_quanteval.py: ")]
    assert len(lines) == len(messages) and all(text in line for text, line in zip(messages, lines, strict=True))
    assert "Comparison of 2 models" in printed.out and "IoU % per class" not in printed.out
    for name in MODELS:
        assert json.loads((tmp_path / name / "result.json").read_text())["model"] == name
    assert {path.name for path in tmp_path.iterdir()} == {*COMPARISON_FILES, *MODELS}


def test_an_error_of_one_model_comes_before_an_interruption_of_the_next(capsys):
    def results():
        yield small_result(failure=UserError("the sensitivity analysis failed"))
        raise KeyboardInterrupt

    assert deliver(results(), Config(ModelConfig(MODELS))) == 2
    assert "Comparison of 1 model" in capsys.readouterr().out


def test_a_model_is_written_before_the_next_one_is_evaluated(tmp_path):
    config = Config(ModelConfig(MODELS), output=OutputConfig(output_dir=tmp_path))

    def results():
        yield compared_result(MODELS[0], **GOOD)
        assert (tmp_path / MODELS[0] / "report.html").exists()
        raise UserError("the next model failed")

    with pytest.raises(UserError, match="the next model failed"):
        deliver(results(), config)
    assert "there are no results for 1 of 2 models" in (tmp_path / "report.html").read_text()


def test_results_that_are_written_already_are_reported_and_not_written_again(tmp_path, capsys):
    result = small_result()
    written = dataclasses.replace(result, details=dataclasses.replace(result.details, written=True))
    assert deliver([written], Config(output=OutputConfig(output_dir=tmp_path))) == 0
    assert "mIoU %" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_result_json_is_there_only_if_all_files_are(tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("{}")
    monkeypatch.setattr("ffnet.report.delivery.render", lambda result: disk_is_full(tmp_path, None))
    assert deliver([small_result()], Config(output=OutputConfig(output_dir=tmp_path))) == 2
    assert (tmp_path / "per_image.csv").exists() and not (tmp_path / "result.json").exists()


def test_one_stray_pixel_of_a_class_that_no_label_has_is_no_drop(capsys):
    """From the pixels to the exit status: by the official mIoU alone the drop would be 33 points."""
    labels = np.repeat(np.array([0, 1], np.uint8), 5000).reshape(1, 100, 100)
    predicted = labels.copy()
    predicted[0, 0, 0] = 5
    result = small_result(scores_of(labels, {FP32: labels, SIMULATED: predicted}))
    entry = result.backends[INT8_SIMULATED]
    assert entry.miou < 67 and -0.011 < entry.change < 0
    assert deliver([result], Config(output=OutputConfig(fail_under=1.0))) == 0
    assert deliver([result], Config(output=OutputConfig(fail_under=0.005))) == 1
    assert "the mIoU drop of INT8 simulated is 0.01 percentage points" in capsys.readouterr().err


def test_refusing_chips_and_every_group_count_for_fail_under(capsys):
    fields = several_chips()
    accepted = {**fields, "npu_chips": [row for row in fields["npu_chips"] if not row.error]}
    for several, limit, status, error in (
        (fields, None, 0, ""),
        (fields, 100, 2, "1 of 4 chips can't run the file: qcs6490"),
        (accepted, 100, 0, ""),
        (accepted, 1, 1, "the mIoU drop of INT8 NPU, sm8450 is 16.25 percentage points."),
    ):
        result = small_result(backends={FP32: small_result().backends[FP32]}, **several)
        assert deliver([result], Config(output=OutputConfig(fail_under=limit))) == status
        assert error in (printed := capsys.readouterr().err) and bool(error) == bool(printed)
