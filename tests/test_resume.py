"""Runs that are stopped and resumed give what an uninterrupted run gives: the same counts in every backend."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

import ffnet_quanteval
from ffnet.config import PROGRESS_FOLDER
from ffnet.evaluation.scores import INT8_SIMULATED, short_name
from ffnet.run.storage import RecordFile
from tests.helpers.networks import TOY
from tests.helpers.program import run_in_fork
from tests.helpers.two_models import IMAGES, NAMES, SMOOTHED, counts, options_for


@pytest.fixture(scope="module")
def uninterrupted(data):
    """The counts of a run that nothing stops."""
    assert ffnet_quanteval.main(options_for(data, "--output-dir", data / "whole")) == 0
    return counts(data / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_random_moments_counts_what_an_uninterrupted_run_counts(data):
    options = options_for(data, "--execute", "--output-dir")
    begin = time.monotonic()
    assert run_in_fork([*options, data / "executed"], data / "log") == 0, (data / "log").read_text()
    seconds = time.monotonic() - begin
    rng, out, killed = random.Random(0), data / "killed", 0
    for moment in sorted(rng.uniform(0, seconds) for _ in range(10)):  # early ones first, while there is work
        status = run_in_fork(
            [*options, out, "--resume"],
            data / "log",
            lambda moment=moment: signal.setitimer(signal.ITIMER_REAL, moment),  # SIGALRM ends the process at once
        )
        assert status in (0, -signal.SIGALRM), (data / "log").read_text()
        killed += status != 0
    assert killed >= 3
    assert run_in_fork([*options, out, "--resume"], data / "log") == 0, (data / "log").read_text()
    assert counts(out) == counts(data / "executed")


@pytest.mark.slow
@pytest.mark.parametrize("written", (0.0, 0.4, 1.0))
def test_a_kill_in_the_middle_of_a_record_loses_its_image_only(data, uninterrupted, written):
    """The process kills itself while the second model's third record is on its way to the disk."""
    out = data / f"torn {written}"

    def kill_at_sixth_record():
        original, calls = RecordFile.append, []

        def append(self, indices, scores):
            calls.append(indices)
            before = os.fstat(self._file.fileno()).st_size
            original(self, indices, scores)
            if len(calls) == 6:
                length = os.fstat(self._file.fileno()).st_size - before
                os.truncate(self._file.fileno(), before + round(written * length))
                os.kill(os.getpid(), signal.SIGKILL)

        RecordFile.append = append

    options = options_for(data, "--output-dir", out)
    assert run_in_fork(options, data / "log", kill_at_sixth_record) == -signal.SIGKILL
    evaluated = data / "evaluated"

    def count_records():
        original = RecordFile.append
        evaluated.unlink(missing_ok=True)

        def append(self, indices, scores):
            with evaluated.open("a") as file:
                file.write(f"{self._file.name} {list(indices)}\n")
            original(self, indices, scores)

        RecordFile.append = append

    assert run_in_fork([*options, "--resume"], data / "log", count_records) == 0
    assert len(evaluated.read_text().splitlines()) == 2 * IMAGES - (6 if written == 1 else 5)
    assert ("dropped 1 record, torn" in (data / "log").read_text()) == (0 < written < 1)
    assert counts(out) == uninterrupted


def test_other_settings_are_refused_before_the_work_and_the_right_ones_go_on(data, uninterrupted, capsys):
    out = data / "whole"
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume", "--default-param-bw", "4")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--resume" in error and "--default-param-bw was 8 and is 4" in error
    assert counts(out) == uninterrupted
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.*")}
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume", "--num-workers", "1")) == 0
    assert "results of an earlier run are complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.*")} == before
    assert counts(out) == uninterrupted


def test_records_that_were_lost_after_the_end_are_computed_again(data, uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(data / "whole", out)
    path = out / TOY.name / PROGRESS_FOLDER / "images-0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume")) == 0
    errors = capsys.readouterr().err
    assert "dropped 1 record" in errors and errors.count("results of an earlier run are complete") == 1
    assert counts(out) == uninterrupted


@pytest.mark.parametrize("content", ("", "{}", "[1]", '{"npu": 3}'))
def test_a_damaged_result_of_the_earlier_run_is_named(data, uninterrupted, tmp_path, capsys, content):
    out = tmp_path / "out"
    shutil.copytree(data / "whole", out)
    (out / TOY.name / "result.json").write_text(content)
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out / TOY.name / 'result.json'}: this file is damaged" in error and "Delete it" in error


def test_other_weights_are_refused(data, uninterrupted, tmp_path, capsys):
    shutil.copytree(data / "weights", tmp_path / "weights")
    state = torch.load(tmp_path / "weights" / f"{SMOOTHED.name}.pth", weights_only=True)
    next(iter(state.values())).mul_(1.5)
    torch.save(state, tmp_path / "weights" / f"{SMOOTHED.name}.pth")
    options = options_for(data, "--output-dir", data / "whole", "--resume")
    options[options.index("--checkpoint") + 1] = str(tmp_path / "weights")
    assert ffnet_quanteval.main(options) == 2
    assert "other conditions: the sha256 of the weights" in capsys.readouterr().err


def test_a_model_can_be_added_to_a_run(data, uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(data / "whole" / TOY.name, out / TOY.name)
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume")) == 0
    assert counts(out) == uninterrupted
    assert capsys.readouterr().err.count("results of an earlier run are complete") == 1


def test_ctrl_c_during_the_evaluation_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    out, original, calls = tmp_path / "out", RecordFile.append, []

    def append(self, indices, scores):
        original(self, indices, scores)
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt

    options = options_for(data, "--output-dir", out, names=(TOY.name,))
    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "append", append)
        assert ffnet_quanteval.main(options) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert ffnet_quanteval.main([*options, "--resume"]) == 0
    assert not (out / PROGRESS_FOLDER / "network.safetensors").exists()


def test_recovery_is_not_repeated_and_its_rounded_weights_are_restored(data, tmp_path, monkeypatch):
    more = ["--default-param-bw", "4", "--adaround", "3", "--calibration-split", "train", "--selection-images", "1"]
    options = [
        options_for(data, "--output-dir", tmp_path / name, *more, names=(TOY.name,)) for name in ("whole", "stopped")
    ]
    assert ffnet_quanteval.main(options[0]) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ffnet.run.pipeline.score", stop)
        assert ffnet_quanteval.main(options[1]) == 130
    monkeypatch.setattr("ffnet.run.encodings.recover", stop)
    monkeypatch.setattr("ffnet.run.encodings.calibrate_on_images", stop)
    assert ffnet_quanteval.main([*options[1], "--resume"]) == 0
    whole, stopped = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "stopped"))
    assert counts(tmp_path / "stopped", (TOY.name,)) == counts(tmp_path / "whole", (TOY.name,))
    assert stopped["calibration"] == whole["calibration"] and stopped["notes"] == whole["notes"]
    assert [step["drop"] for step in stopped["recovery"]["steps"]] == [s["drop"] for s in whole["recovery"]["steps"]]


def test_saved_predictions_are_complete_after_a_resumption(data, tmp_path):
    saved = tmp_path / "saved"
    options = options_for(data, "--output-dir", tmp_path / "out", "--save-predictions", saved)

    def kill_at_fifth_record():
        original, calls = RecordFile.append, []

        def append(self, indices, scores):
            calls.append(indices)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, indices, scores)

        RecordFile.append = append

    assert run_in_fork(options, tmp_path / "log", kill_at_fifth_record) == -signal.SIGKILL
    assert run_in_fork([*options, "--resume"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    for name in NAMES:
        assert len(list((saved / name / short_name(INT8_SIMULATED)).glob("*.png"))) == IMAGES


@pytest.mark.parametrize("left", ("report.html", "segmentation_ffnet_toy/result.json", "segmentation_ffnet_toy"))
def test_what_a_kill_left_of_an_unfinished_file_does_not_prevent_a_resumption(data, uninterrupted, tmp_path, left):
    out = tmp_path / "out"
    shutil.copytree(data / "whole", out)
    path = out / left
    path.with_name(f".{path.name}.123").write_text("half")
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume")) == 0
    assert counts(out) == uninterrupted


def test_a_lost_report_is_written_again(data, uninterrupted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(data / "whole", out)
    (out / TOY.name / "report.html").unlink()
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume")) == 0
    assert (out / TOY.name / "report.html").exists() and counts(out) == uninterrupted


def test_lost_predictions_are_written_again(data, tmp_path, capsys):
    saved = tmp_path / "saved"
    options = options_for(data, "--output-dir", tmp_path / "out", "--save-predictions", saved, names=(TOY.name,))
    assert ffnet_quanteval.main(options) == 0
    before, files = counts(tmp_path / "out", (TOY.name,)), sorted(saved.rglob("*.png"))
    for path in files[:2]:
        path.unlink()
    assert ffnet_quanteval.main([*options, "--resume"]) == 0
    assert "the files of 2 images that the earlier run wrote are not there" in capsys.readouterr().err
    assert sorted(saved.rglob("*.png")) == files and counts(tmp_path / "out", (TOY.name,)) == before


def test_scores_of_a_recovered_network_that_is_gone_are_computed_again(data, tmp_path, capsys):
    """A recovery that is repeated may end with another network."""
    more = ["--default-param-bw", "4", "--adaround", "2", "--calibration-split", "train", "--selection-images", "1"]
    options = options_for(data, "--output-dir", tmp_path / "out", *more, names=(TOY.name,))
    assert ffnet_quanteval.main(options) == 0
    before = counts(tmp_path / "out", (TOY.name,))
    (tmp_path / "out" / "result.json").unlink()
    assert ffnet_quanteval.main([*options, "--resume"]) == 0
    assert "the recovered network is no longer there; all images are evaluated again" in capsys.readouterr().err
    assert counts(tmp_path / "out", (TOY.name,)) == before


def test_a_full_disk_under_the_records_is_named_and_the_run_goes_on(data, uninterrupted, tmp_path, capsys, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    original, out = RecordFile.__init__, tmp_path / "out"

    def open_full(self, *arguments):
        original(self, *arguments)
        self._file = Full(self._file)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "__init__", open_full)
        assert ffnet_quanteval.main(options_for(data, "--output-dir", out)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    for name, line in zip(NAMES, lines, strict=True):
        assert f"{out / name / PROGRESS_FOLDER}/images-0.jsonl: {os.strerror(errno.ENOSPC)}. " in line
        assert "start again with --resume" in line
    assert counts(out) == uninterrupted
    assert ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume")) == 0
