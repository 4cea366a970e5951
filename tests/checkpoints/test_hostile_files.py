"""A hostile file runs no code, opens no other file, takes little memory, and gets one error that says what is wrong."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ffnet.checkpoints.loading import read_checkpoint
from ffnet.checkpoints.unpickling import MAX_BYTES
from tests.helpers import hostile, mutations
from tests.helpers.pickles import state_zip, tensor

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:invalid escape sequence")

ROOT = Path(__file__).parents[2]
MEMORY_KB = 1_000_000  # 1 GB


def read_under_audit(paths, folder):
    """Read files in a process of its own under an audit hook; return what it reports of each."""
    listed = folder / "list.json"
    listed.write_text(json.dumps([str(path) for path in paths]))
    command = [sys.executable, "-m", "tests.helpers.watched", str(listed)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen, *rows = map(json.loads, ran.stdout.splitlines())
    assert any(event.startswith("exec") for event in seen) and any(event.startswith("open") for event in seen)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    return rows


def read_corpus(files, folder):
    """Write (kind, bytes) to files and read them; return what is reported, by kind, and check what holds for all."""
    Path(hostile.MARKER).unlink(missing_ok=True)
    kinds = []
    for number, (kind, data) in enumerate(files):
        kinds.append(kind)
        (folder / f"{number:03}").write_bytes(data)
    rows = dict(zip(kinds, read_under_audit(sorted(folder.iterdir()), folder), strict=True))
    assert {kind: row["seen"] for kind, row in rows.items() if row["seen"]} == {}
    assert not Path(hostile.MARKER).exists()
    assert max(row["grown_kb"] for row in rows.values()) < MEMORY_KB
    return rows


@pytest.mark.slow
def test_hostile_files_run_no_code_and_get_one_error_that_names_the_file(tmp_path):
    rows = read_corpus(hostile.corpus(), tmp_path)
    assert len(rows) >= 85
    for kind, row in rows.items():
        assert row["kind"] == "InvalidCheckpointError", (kind, row)
        path, message = row["path"], row["message"]
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1200, (kind, message)
        assert kind.removeprefix("imports ") in message or not kind.startswith("imports "), (kind, message)


@pytest.mark.slow
def test_python_text_in_good_files_is_not_run(tmp_path):
    rows = read_corpus(hostile.harmless(), tmp_path)
    assert {kind: row["message"] for kind, row in rows.items() if row["kind"] != "ok"} == {}


def test_big_endian_file_gives_its_numbers(tmp_path):
    records = {"data/0": struct.pack(">4f", 1, 2, 3, 4), "byteorder": b"big"}
    (tmp_path / "x").write_bytes(state_zip(tensor(), records=records))
    assert read_checkpoint(tmp_path / "x")[0].state_dict["weight"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files_run_no_code_and_raise_only_our_error(number, tmp_path):
    paths = [tmp_path / f"{index}" for index in range(number)]
    for path, data in zip(paths, mutations.random_mutations(random.Random(0), number), strict=True):
        path.write_bytes(data)
    rows = read_under_audit(paths, tmp_path)
    assert {row["kind"] for row in rows} == {"ok", "InvalidCheckpointError"}
    assert [row for row in rows if row["seen"] or not row["message"].isprintable()] == []
    assert rows[-1]["grown_kb"] < MEMORY_KB


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_files_of_the_largest_size_take_less_than_a_gigabyte(form, tmp_path):
    tensors, path = {str(i): torch.zeros(2**24) for i in range(MAX_BYTES // 2**26)}, tmp_path / form
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    (row,) = read_under_audit([path], tmp_path)
    assert row["kind"] == "ok" and row["grown_kb"] < MEMORY_KB, row
