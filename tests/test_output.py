"""Folders that can't take a run's results are refused; files are whole or absent."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from ffnet.errors import UserError
from ffnet.output import RESULT_FILES, check_folder, remove_stale, write_whole


def test_new_and_empty_folders_are_taken_and_left_empty(tmp_path):
    for _ in range(2):
        check_folder("--output-dir", tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_with_files_is_refused_unless_forced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--output-dir .*holds notes.txt; name a new folder, or add --force"):
        check_folder("--output-dir", tmp_path)
    check_folder("--output-dir", tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_and_a_read_only_disk_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(UserError, match=f"--output-dir {path}: can't be written to"):
            check_folder("--output-dir", path)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3_000_000))
    with pytest.raises(UserError, match="3 MB are free there and the results may take 4"):
        check_folder("--output-dir", tmp_path, megabytes=4)
    check_folder("--output-dir", tmp_path, megabytes=2)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "result.json", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_results_of_an_earlier_run_go_and_strangers_stay(tmp_path):
    for name in (*RESULT_FILES, "notes.txt"):
        (tmp_path / name).write_text("")
    remove_stale(tmp_path, [tmp_path / "result.json", tmp_path / "report.html"])
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "report.html", "notes.txt"}
