"""Output folders are checked before the work; files are whole or absent."""

import os
import re
import socket
from pathlib import Path

import pytest

from ffnet.system.errors import UserError
from ffnet.system.files import (
    check_output_folder,
    check_plain_file,
    create_output_folder,
    read_utf8,
    remove_unfinished,
    sha256_of,
    unfinished_name,
    write_atomically,
)


def test_new_and_empty_folders_are_accepted_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    check_output_folder("--output-dir", folder)
    assert not folder.exists()
    for _ in range(2):
        create_output_folder("--output-dir", folder)
        check_output_folder("--output-dir", folder)
        assert list(folder.iterdir()) == []


def test_a_folder_with_other_files_is_refused_unless_forced(tmp_path):
    for name in ("notes.txt", "model.onnx", "zebra"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"--output-dir .*already holds notes.txt and 1 other file\. .*add --force"):
        check_output_folder("--output-dir", tmp_path, own_files=("model.onnx",))
    check_output_folder("--output-dir", tmp_path, force=True)
    check_output_folder("--output-dir", tmp_path, own_files=("notes.txt", "model.onnx", "zebra"))


def test_hidden_files_and_those_of_operating_systems_do_not_count(tmp_path):
    for name in ("._result.json", "Thumbs.db", ".env"):
        (tmp_path / name).touch()
    check_output_folder("--output-dir", tmp_path)


def test_what_a_killed_run_left_of_its_own_files_is_removed(tmp_path):
    left = [tmp_path / unfinished_name(name) for name in ("result.json", "part-9", "model")]
    for path in (*left, tmp_path / "result.json"):
        path.touch()
    check_output_folder("--output-dir", tmp_path, ("result.json",))
    remove_unfinished(tmp_path, ("result.json", "part-*"))
    assert [path.exists() for path in left] == [False, False, True] and (tmp_path / "result.json").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--output-dir {path}: .*is not a folder"):
            check_output_folder("--output-dir", path)


def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(UserError, match="--output-dir /proc/none: the folder can't be written to"):
        create_output_folder("--output-dir", Path("/proc/none"))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "result.json", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_planted_link_is_not_written_to(tmp_path, monkeypatch):
    """Temporary names are random; even the right guess changes no other file."""
    assert len({unfinished_name("a") for _ in range(100)}) == 100
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    (tmp_path / "victim").write_text("old")
    (tmp_path / unfinished_name("a")).symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "victim").read_text() == "old" and not (tmp_path / "a").exists()


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "a").touch()
    assert write_atomically(tmp_path / "b", "").stat().st_mode == (tmp_path / "a").stat().st_mode


def test_text_keeps_names_that_are_not_utf8_and_loses_its_byte_order_mark(tmp_path):
    path = write_atomically(tmp_path / "a", "\ufeffü\udcff")
    assert path.read_bytes() == b"\xef\xbb\xbf\xc3\xbc\xff"
    with pytest.raises(ValueError, match="the file is not UTF-8 text"):
        read_utf8(path)
    assert read_utf8(write_atomically(path, "\ufeffü")) == "ü"
    with pytest.raises(ValueError, match="Save it as UTF-8"):
        read_utf8(write_atomically(path, "ü".encode("utf-16")))


@pytest.mark.parametrize("read", (check_plain_file, read_utf8, sha256_of))
def test_what_is_no_plain_file_is_refused_without_waiting_for_it(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        os.mkfifo("pipe")
        Path("link").symlink_to("pipe")
        kinds = {"pipe": "pipe", "link": "pipe", ".": "folder", "socket": "socket", "/dev/zero": "device"}
        for name, kind in kinds.items():
            with pytest.raises(OSError, match=rf"it is a .*{kind}.*, not a file: '{re.escape(name)}'"):
                read(Path(name))
    check_plain_file(tmp_path / "missing")
