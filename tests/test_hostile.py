"""No file runs code, opens another, takes much memory, or gets anything but one error that says what is wrong."""

import functools
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnet.checkpoint import CheckpointError, read_state_dict
from ffnet.unpickle import MAX_BYTES, MAX_RECORD
from tests import hostile, mutations

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:invalid escape sequence")

ROOT = Path(__file__).parents[1]
MEMORY_KB = 1_000_000  # 1 GB
GOOD = mutations.good_files()
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "remove", "repeat"]), st.integers(0, 2**31), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def watched(paths, folder):
    """What a process of its own under an audit hook tells of each file."""
    listed = folder / "list.json"
    listed.write_text(json.dumps([str(path) for path in paths]))
    command = [sys.executable, "-m", "tests.watched", str(listed)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen, *rows = map(json.loads, ran.stdout.splitlines())
    assert any(event.startswith("exec") for event in seen) and any(event.startswith("open") for event in seen)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """[(kind, pattern, what the watched process tells)] of every hostile file."""
    Path(hostile.MARKER).unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("hostile")
    listed = hostile.write(folder)
    rows = watched([path for path, _, _ in listed], folder)
    return [(kind, pattern, row) for (_, kind, pattern), row in zip(listed, rows, strict=True)]


def test_corpus_has_many_kinds_of_their_own():
    rows = list(hostile.corpus())
    assert len({kind for kind, _, _ in rows}) == len({data for _, data, _ in rows}) == len(rows) >= 190


def test_hostile_files_run_no_code_and_open_no_other_file(corpus):
    assert {kind: row["seen"] for kind, _, row in corpus if row["seen"]} == {}
    assert not Path(hostile.MARKER).exists()


def test_hostile_files_get_one_error_that_names_file_and_reason(corpus):
    for kind, pattern, row in corpus:
        if pattern is None:
            assert row["kind"] == "ok", (kind, row)
            continue
        assert row["kind"] == "CheckpointError", (kind, row)
        path, message = row["path"], row["message"]
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1200, (kind, message)
        assert re.search(pattern, message), (kind, message)


def test_hostile_files_take_little_memory(corpus):
    assert corpus[-1][2]["grown_kb"] < MEMORY_KB


def test_hostile_files_leave_torchs_safe_globals_alone(corpus):
    assert [kind for kind, _, row in corpus if not row["kept"]] == []


def check_only_our_error(data, path):
    path.write_bytes(data)
    try:
        read_state_dict(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()


@settings(max_examples=200, deadline=None)
@given(data=st.sampled_from(GOOD), changes=CHANGES)
def test_changed_bytes_give_no_error_but_ours(data, changes, tmp_path_factory):
    check_only_our_error(mutations.changed(data, changes), tmp_path_factory.getbasetemp() / "changed")


@settings(max_examples=200, deadline=None)
@given(data=st.sampled_from(GOOD[:4]), changes=CHANGES)
def test_changed_pickles_give_no_error_but_ours(data, changes, tmp_path_factory):
    check_only_our_error(
        mutations.with_pickle(data, functools.partial(mutations.changed, changes=changes)),
        tmp_path_factory.getbasetemp() / "changed",
    )


@pytest.mark.slow
def test_many_mutations_under_the_audit_hook(tmp_path):
    paths = [tmp_path / f"{number}" for number in range(3000)]
    for path, data in zip(paths, mutations.random_mutations(random.Random(0), len(paths)), strict=True):
        path.write_bytes(data)
    rows = watched(paths, tmp_path)
    assert {row["kind"] for row in rows} == {"ok", "CheckpointError"}
    assert [row for row in rows if row["seen"] or not row["kept"]] == []
    assert rows[-1]["grown_kb"] < MEMORY_KB


def large_files(folder):
    """A file of each form with as much in it as may be read."""
    count = MAX_RECORD // 4
    tensors = {str(i): torch.zeros(count) for i in range((MAX_BYTES - 2**20) // MAX_RECORD)}
    torch.save(tensors, folder / "zip")
    torch.save(tensors, folder / "old", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, folder / "safetensors")
    with zipfile.ZipFile(folder / "release", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(folder / "zip", "x/a.pth")
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_files_of_the_largest_size_take_less_than_a_gigabyte(tmp_path):
    for path in large_files(tmp_path):
        (row,) = watched([path], tmp_path)
        assert row["kind"] == "ok" and row["grown_kb"] < MEMORY_KB, row
