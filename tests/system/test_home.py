"""Runs of users without a home folder, or whose cache folder can't be written."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ffnet.checkpoints.download import default_cache_dir
from ffnet.system.process import ensure_home
from tests.helpers.networks import DEMO, demo_checkpoint
from tests.helpers.program import SCRIPT, arguments

UNKNOWN_USER = """
import pwd, runpy, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
del sys.argv[0]
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[0], run_name="__main__")
""".replace("sys.argv[1]", repr(str(SCRIPT.parent)))
NOT_A_FOLDER = "/dev/null/none"  # no user, not even root, can create it


def run(folder, *options, **environment):
    """Run the program in `folder` as a user whom the system does not know, with nothing but `environment`."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    command = [sys.executable, "-c", UNKNOWN_USER, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True)


@pytest.fixture
def unknown_user(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", "")  # so that the test's HOME is restored afterwards
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("home", ("", "~", "relative"))
def test_a_user_without_home_gets_a_temporary_one_and_a_note(home, unknown_user, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ffnet.system.process.logger.propagate", True)
    assert Path(tempfile.gettempdir()) in default_cache_dir().parents
    (record,) = caplog.records
    assert "Set HOME or TORCH_HOME, or name a --cache-dir." in record.message
    ensure_home()  # a second time changes nothing
    assert len(caplog.records) == 1 and Path(os.environ["HOME"]) in default_cache_dir().parents
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_set_or_known_stays(monkeypatch, caplog):
    for given, expected in ((NOT_A_FOLDER, NOT_A_FOLDER), ("", pwd.getpwuid(os.getuid()).pw_dir)):
        monkeypatch.setenv("HOME", given)
        ensure_home()
        assert os.environ["HOME"] == expected
    assert not caplog.records


def test_libraries_can_be_imported_without_a_home(tmp_path):
    (tmp_path / "temporary").mkdir()
    ran = run(tmp_path, "--list-models", TMPDIR=str(tmp_path / "temporary"))
    assert ran.returncode == 0 and "segmentation_ffnet40S_dBBB_mobile" in ran.stdout
    assert ran.stderr.startswith("HOME is not set") and "Traceback" not in ran.stderr
    assert not any(path.name.startswith("ffnet-home-") for path in (tmp_path / "temporary").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ({}, {"HOME": "~"}, {"HOME": NOT_A_FOLDER}, {"TORCH_HOME": NOT_A_FOLDER}))
def test_an_evaluation_needs_no_home_and_no_cache_folder(environment, tree):
    work = tree / "work"
    work.mkdir()
    ran = run(work, *arguments(tree, demo_checkpoint(DEMO), model=DEMO), **environment)
    assert ran.returncode == 0 and "mIoU %" in ran.stdout, ran.stderr
    assert list(work.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("variable", ("HOME", "TORCH_HOME"))
@pytest.mark.parametrize("options", (["--demo"], ["--dataset-path"]))
def test_a_cache_folder_that_can_not_be_written_is_named_in_one_line(variable, options, tree):
    if "--dataset-path" in options:
        options = [*options, tree, "--model-name", "segmentation_ffnet40S_dBBB_mobile"]
    work = tree / "work"
    work.mkdir()
    ran = run(work, *options, "--use-cuda", "false", "--quiet", **{variable: NOT_A_FOLDER})
    line = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert line.startswith("ffnet_quanteval.py: error: ") and NOT_A_FOLDER in line and "--cache-dir" in line
    assert list(work.iterdir()) == []
