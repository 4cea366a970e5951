"""Runs that are stopped and resumed give what an uninterrupted run gives: the same counts in every backend."""

import errno
import os
import random
import shutil
import signal
import time

import pytest
import torch

import ffnet_quanteval
from ffnet.config import PROGRESS_FOLDER
from ffnet.quantization import quantize
from ffnet.quantization.recovery.search import Candidate
from ffnet.run import pipeline
from ffnet.run.records import RecordFile
from ffnet.run.storage import Storage
from tests.helpers.networks import TOY
from tests.helpers.program import run_in_fork
from tests.helpers.two_models import IMAGES, NAMES, SMOOTHED, counts, options_for, read

RECOVERY = ("--default-param-bw", "4", "--adaround", "2", "--calibration-split", "train", "--selection-images", "1")


@pytest.fixture(scope="module")
def uninterrupted(data):
    """The counts of a run that nothing stops, whose folder is `whole`."""
    assert ffnet_quanteval.main(options_for(data, "--output-dir", data / "whole")) == 0
    return counts(data / "whole")


@pytest.fixture
def out(data, uninterrupted, tmp_path):
    """A copy of the output folder of the uninterrupted run."""
    return shutil.copytree(data / "whole", tmp_path / "out")


def resume(data, out, *more, names=NAMES):
    return ffnet_quanteval.main(options_for(data, "--output-dir", out, "--resume", *more, names=names))


def slow_records():
    """Have the scores of each image take longer, so that kills hit the evaluation as often as the other stages."""
    original = RecordFile.append

    def append(self, indices, scores):
        time.sleep(0.2)
        original(self, indices, scores)

    RecordFile.append = append


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_random_moments_counts_what_an_uninterrupted_run_counts(data, uninterrupted):
    options, log = options_for(data, "--output-dir"), data / "log"
    begin = time.monotonic()
    assert run_in_fork([*options, data / "slow"], log, slow_records) == 0, log.read_text()
    seconds, rng, out, killed = time.monotonic() - begin, random.Random(0), data / "killed", 0
    for moment in sorted(rng.uniform(0, seconds) for _ in range(10)):  # early ones first, while there is work

        def kill_later(moment=moment):
            slow_records()
            signal.setitimer(signal.ITIMER_REAL, moment)  # SIGALRM ends the process at once

        status = run_in_fork([*options, out, "--resume"], log, kill_later)
        assert status in (0, -signal.SIGALRM), log.read_text()
        killed += status != 0
    assert killed >= 3
    assert run_in_fork([*options, out, "--resume"], log) == 0, log.read_text()
    assert counts(out) == uninterrupted


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_record_loses_its_image_only(data, uninterrupted, tmp_path):
    """The process kills itself while the third record is on its way to the disk; predictions are complete later."""
    out, evaluated, log = tmp_path / "out", tmp_path / "evaluated", tmp_path / "log"
    saved = tmp_path / "saved" / "simulated"
    options = options_for(data, "--output-dir", out, "--save-predictions", saved.parent, names=(TOY.name,))

    def change_append(after):
        original, calls = RecordFile.append, []

        def append(self, indices, scores):
            before = os.fstat(self._file.fileno()).st_size
            original(self, indices, scores)
            calls.extend(indices)
            after(self._file.fileno(), before, calls)

        RecordFile.append = append

    def tear_third(file, before, calls):
        if len(calls) == 3:
            os.truncate(file, (before + os.fstat(file).st_size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def note(file, before, calls):
        evaluated.write_text(" ".join(map(str, calls)))

    assert run_in_fork(options, log, lambda: change_append(tear_third)) == -signal.SIGKILL
    assert len(list(saved.iterdir())) == 3
    assert run_in_fork([*options, "--resume"], log, lambda: change_append(note)) == 0
    assert evaluated.read_text() == "2 3 4 5"
    assert "dropped 1 record, torn" in log.read_text()
    assert counts(out, (TOY.name,))[TOY.name] == uninterrupted[TOY.name] and len(list(saved.iterdir())) == IMAGES


@pytest.mark.slow
def test_other_settings_are_refused_and_a_finished_run_is_not_repeated(data, out, uninterrupted, capsys, monkeypatch):
    assert resume(data, out, "--default-param-bw", "4") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--resume" in error and "--default-param-bw was 8 and is 4" in error
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.*")}
    monkeypatch.setattr(pipeline, "quantize_checkpoint", lambda *_: pytest.fail("a model was quantized"))
    assert resume(data, out, "--num-workers", "1") == 0
    assert "results of an earlier run are complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.*")} == before
    assert counts(out) == uninterrupted


@pytest.mark.slow
def test_other_weights_are_refused(data, out, tmp_path, capsys):
    shutil.copytree(data / "weights", tmp_path / "weights")
    state = torch.load(tmp_path / "weights" / f"{SMOOTHED.name}.pth", weights_only=True)
    next(iter(state.values())).mul_(1.5)
    torch.save(state, tmp_path / "weights" / f"{SMOOTHED.name}.pth")
    options = options_for(data, "--output-dir", out, "--resume", weights=tmp_path / "weights")
    assert ffnet_quanteval.main(options) == 2
    assert f"{SMOOTHED.name}: --resume: the run in" in (error := capsys.readouterr().err)
    assert "other conditions: the sha256 of the weights" in error


@pytest.mark.slow
@pytest.mark.parametrize("lost", ("report", "record", "model"))
def test_what_is_gone_is_made_again_and_nothing_else(data, out, uninterrupted, capsys, lost):
    """A model of the first run may also be a new one; half-written files of a run that was killed are removed."""
    report = out / TOY.name / "report.html"
    report.with_name(".report.html.0123456789abcdef").write_text("half")
    if lost == "report":
        report.unlink()
    elif lost == "record":
        records = out / TOY.name / PROGRESS_FOLDER / "images-0.jsonl"
        records.write_bytes(records.read_bytes()[:-7])
    else:
        shutil.rmtree(out / TOY.name)
    assert resume(data, out) == 0
    assert counts(out) == uninterrupted and report.exists()
    assert not list(out.rglob(".report.html.*"))
    errors = capsys.readouterr().err
    assert ("dropped 1 record" in errors) == (lost == "record")
    assert errors.count("results of an earlier run are complete") == 1


@pytest.mark.slow
def test_recovery_is_not_repeated_but_a_recovered_network_that_is_gone_is_made_again(
    data, tmp_path, capsys, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    options = options_for(data, *RECOVERY, "--output-dir", tmp_path / "whole", names=(TOY.name,))
    assert ffnet_quanteval.main(options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "score", stop)
        assert ffnet_quanteval.main(options_for(data, *RECOVERY, "--output-dir", out, names=(TOY.name,))) == 130
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "recover", stop)
        patch.setattr(quantize, "calibrate_or_restore", stop)
        assert resume(data, out, *RECOVERY, names=(TOY.name,)) == 0
    whole, stopped = read(tmp_path / "whole"), read(out)
    assert counts(out, (TOY.name,)) == counts(tmp_path / "whole", (TOY.name,))
    assert stopped["calibration"] == whole["calibration"] and stopped["notes"] == whole["notes"]
    assert [s["change"] for s in stopped["recovery"]["steps"]] == [s["change"] for s in whole["recovery"]["steps"]]
    assert not (out / PROGRESS_FOLDER / "network.safetensors").exists()
    (out / "result.json").unlink()
    assert resume(data, out, *RECOVERY, names=(TOY.name,)) == 0
    assert "the recovered network is missing; all images are evaluated again" in capsys.readouterr().err
    assert counts(out, (TOY.name,)) == counts(tmp_path / "whole", (TOY.name,))


@pytest.mark.slow
def test_a_recovery_that_is_stopped_again_and_again_ends_as_one_that_is_not_stopped(data, tmp_path, monkeypatch):
    """Each run is stopped by SIGTERM, or killed, after it has saved three more parts of the recovery.

    The drop is replaced by one that only more bits make smaller, so that all steps are taken.
    """
    monkeypatch.setattr(Candidate, "drop", property(lambda candidate: 1 - len(candidate.raised) / 100))

    def stop_later(number):
        original, calls = Storage.save, []

        def save(*arguments):
            original(*arguments)
            calls.append(arguments)
            if len(calls) == 3:
                os.kill(os.getpid(), number)

        Storage.save = save

    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    recover = (*RECOVERY, "--max-drop", "0.97", "--output-dir")
    assert ffnet_quanteval.main(options_for(data, *recover, whole, names=(TOY.name,))) == 0
    options, stops, status = options_for(data, *recover, out, "--resume", names=(TOY.name,)), 0, None
    while status != 0:
        number = (signal.SIGTERM, signal.SIGKILL)[stops % 2]
        status = run_in_fork(options, log, lambda number=number: stop_later(number))
        assert status in (0, 143, -signal.SIGKILL), log.read_text()
        assert ("saved; continue with the same command and --resume." in log.read_text()) == (status == 143)
        stops += status != 0
    assert stops >= 5 and not list((out / PROGRESS_FOLDER).glob("recovery-*"))
    assert counts(out, (TOY.name,)) == counts(whole, (TOY.name,))
    found, expected = ([{**step, "seconds": 0} for step in read(each)["recovery"]["steps"]] for each in (out, whole))
    assert found == expected and read(out)["notes"] == read(whole)["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("disk", ("records", "results"))
def test_a_full_disk_is_named_and_the_run_can_be_completed(data, uninterrupted, tmp_path, capsys, monkeypatch, disk):
    out, message = tmp_path / "out", os.strerror(errno.ENOSPC)
    failing = {"records": "ffnet.run.records.RecordFile.append", "results": "ffnet.report.delivery.render"}

    def full(*arguments):
        raise OSError(errno.ENOSPC, message, "images-0.jsonl" if disk == "records" else "report.html")

    with monkeypatch.context() as patch:
        patch.setattr(failing[disk], full)
        assert ffnet_quanteval.main(options_for(data, "--output-dir", out, names=(TOY.name,))) == 2
    error = capsys.readouterr().err
    assert message in error and ("start again with --resume" in error or disk == "results")
    assert resume(data, out, names=(TOY.name,)) == 0
    assert (out / "report.html").exists()
    assert counts(out, (TOY.name,))[TOY.name] == uninterrupted[TOY.name]
