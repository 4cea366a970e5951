"""Which files of a folder are read, which are ignored, and how the user learns of it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffnet.checkpoints import folder as module
from ffnet.checkpoints.folder import find_checkpoints
from ffnet.checkpoints.loading import load_checkpoint
from tests.helpers.checkpoint_folders import (
    GPU,
    GPU_MEMBER,
    MEMBER,
    MOBILE,
    PAIR,
    SMALL,
    SMALL_MEMBER,
    found,
    refusal,
    save,
    save_release,
    state_of,
)
from tests.helpers.networks import DEMO, PRE_DOWN

pytestmark = pytest.mark.usefixtures("few_variants")
PICKLED = Path(__file__).parents[1] / "data" / "pickled"


def test_release_zip_serves_every_model_that_it_holds(tmp_path):
    states = {MEMBER: state_of(PAIR, 1), GPU_MEMBER: state_of(GPU, 2), "ffnet1NS/x.pth": b"never read"}
    path = save_release(states, tmp_path / "renamed")
    names = (GPU, MOBILE, PAIR)
    assert found(tmp_path, *names) == dict.fromkeys(names, path)
    weight = "head.layers.3.last_layer.0.weight"
    assert torch.equal(load_checkpoint(GPU, path).model.state_dict()[weight], states[GPU_MEMBER][weight])
    assert torch.equal(load_checkpoint(MOBILE, path).model.state_dict()[weight], states[MEMBER][weight])

    save(states[MEMBER], tmp_path / MEMBER)  # unpacked beside the zip: the same tensors
    assert find_checkpoints(tmp_path, names).notes == ()


def test_member_of_a_release_zip_must_match_its_name(tmp_path):
    save_release({MEMBER: state_of(DEMO), GPU_MEMBER: b"broken", SMALL_MEMBER: state_of(SMALL)}, tmp_path / "x.zip")
    message = refusal(tmp_path, MOBILE, GPU, SMALL)
    assert f"it holds no checkpoint for {MOBILE}, {GPU}. " in message and "Ignored 2 files" in message
    assert f"{MEMBER} does not match {MOBILE} or {PAIR}, whose name it has." in message
    assert found(tmp_path, SMALL) == {SMALL: tmp_path / "x.zip"}


def test_release_zip_without_published_names_is_to_be_unpacked(tmp_path):
    save_release({"a.pth": state_of(MOBILE), "b.pth": state_of(DEMO)}, tmp_path / "x.zip")
    assert "x.zip: no checkpoint in it is named as in an FFNet release. Unpack it." in refusal(tmp_path, MOBILE)


def test_other_files_are_ignored_with_a_note(tmp_path):
    path = save(state_of(DEMO), tmp_path / "model.bin")
    for name in ("README.md", "empty", "page.html", ".hidden.pth", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"<html>")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nothing")
    save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    (tmp_path / "odd.pth").write_bytes((PICKLED / "odd.pth").read_bytes())
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:5000])
    result = find_checkpoints(tmp_path, [DEMO])
    assert result.paths == {DEMO: path}
    names = "README.md, dangling.pth, empty, odd.pth, other.pth, page.html, pipe"
    others, refused = result.notes
    assert others == f"Ignored 7 files that no FFNet variant matches: {names}."
    assert refused.startswith(f"Ignored 1 file that cannot be loaded: cut.pth. The first error: {tmp_path}/cut.pth: ")


def test_file_that_would_not_load_is_not_found(tmp_path):
    state = state_of(DEMO)
    state["backbone_model.conv0.weight"][0, 0, 0, 0] = torch.nan
    save(state, tmp_path / "x.pth")
    message = refusal(tmp_path, DEMO)
    assert f"no checkpoint for {DEMO}." in message and "conv0.weight holds NaN or infinity" in message


def test_large_files_are_not_read(tmp_path, monkeypatch):
    for name, size in (("a.pth", 2**40), ("b.safetensors", 2**29)):
        with (tmp_path / name).open("wb") as file:  # sparse
            file.write(b"PK\3\4" if name == "a.pth" else b"\2\0\0\0\0\0\0\0{}")
            file.truncate(size)
    monkeypatch.setattr(module, "read_checkpoint", None)
    assert "Ignored 2 files that cannot be loaded: a.pth, b.safetensors." in refusal(tmp_path, DEMO)


def test_folders_are_searched_once_although_links_form_a_loop(tmp_path):
    path = save(state_of(DEMO), tmp_path / "a" / "b" / "x.pth")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path)
    assert found(tmp_path, DEMO) == {DEMO: path}


def test_too_many_files_or_folders_are_refused(tmp_path, monkeypatch):
    for number in range(4):
        save(state_of(MOBILE), tmp_path / str(number) / "x.pth")
    monkeypatch.setattr(module, "MAX_FILES", 3)
    assert "more than 3 files or" in refusal(tmp_path, MOBILE)
    monkeypatch.setattr(module, "MAX_FILES", 4)
    monkeypatch.setattr(module, "MAX_FOLDERS", 4)
    assert "or 4 folders" in refusal(tmp_path, MOBILE)
    monkeypatch.setattr(module, "MAX_FOLDERS", 5)
    assert find_checkpoints(tmp_path, [MOBILE]).paths


def test_folders_without_checkpoints_are_refused(tmp_path):
    assert "there is no such file or folder" in refusal(tmp_path / "none", DEMO)
    assert "the folder holds no files" in refusal(tmp_path, DEMO)
    (tmp_path / "x.txt").write_text("x")
    assert "is not a folder" in refusal(tmp_path / "x.txt", DEMO)
    message = refusal(tmp_path, DEMO, PRE_DOWN)
    assert "it holds no FFNet checkpoint" in message and "x.txt" in message and DEMO not in message


def test_each_file_is_read_once_and_tensors_of_one_at_a_time_are_held(tmp_path, monkeypatch):
    for number, name in enumerate((DEMO, PRE_DOWN, SMALL)):
        save(state_of(name), tmp_path / f"{number}.pth")
    read, alive = [], []

    class Watched(dict):
        """A state_dict that says when it is gone."""

        def __del__(self):
            alive.pop()

    def watched(path, *member):
        assert not alive
        contents, sha256 = original(path, *member)
        alive.append(path)
        read.append(path.name)
        return replace(contents, state_dict=Watched(contents.state_dict)), sha256

    original = module.read_checkpoint
    monkeypatch.setattr(module, "read_checkpoint", watched)
    find_checkpoints(tmp_path, [DEMO, PRE_DOWN, SMALL])
    assert read == ["0.pth", "1.pth", "2.pth"]
