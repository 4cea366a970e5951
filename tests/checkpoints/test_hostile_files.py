"""A hostile file runs no code, opens no other file, takes little memory, and gets one error that says what is wrong."""

import functools
import hashlib
import json
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnet.checkpoints.loading import InvalidCheckpointError, read_state_dict
from ffnet.checkpoints.unpickling import MAX_BYTES, MAX_RECORD
from tests.helpers import hostile, mutations
from tests.helpers.hostile_files import two_directories
from tests.helpers.pickles import state_zip, tensor

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:invalid escape sequence")

ROOT = Path(__file__).parents[2]
MEMORY_KB = 1_000_000  # 1 GB
GOOD = mutations.good_files()
SLOW_KINDS = {  # large pickles, which take half a second each to refuse
    "attributes copied to many dictionaries",
    "calls with many arguments",
    "deep list",
    "deep tuple as a key",
    "deep tuple as a pid",
    "long chain of modules",
}
EXAMPLES = [50, pytest.param(400, marks=pytest.mark.slow)]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "remove", "repeat"]), st.integers(0, 2**31), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=4,
)


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


@pytest.fixture(scope="module", params=["most", pytest.param("all", marks=pytest.mark.slow)])
def corpus(request, tmp_path_factory):
    """(kind, pattern, what the process under the audit hook reports) of every hostile file."""
    Path(hostile.MARKER).unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("hostile")
    listed = [row for row in hostile.write(folder) if request.param == "all" or row[1] not in SLOW_KINDS]
    rows = read_under_audit([path for path, _, _ in listed], folder)
    return [(kind, pattern, row) for (_, kind, pattern), row in zip(listed, rows, strict=True)]


def test_each_hostile_file_is_of_its_own_kind(tmp_path):
    listed = hostile.write(tmp_path)
    kinds = {kind for _, kind, _ in listed}
    contents = {hashlib.sha256(Path(path).read_bytes()).digest() for path, _, _ in listed}
    assert len(kinds) == len(contents) == len(listed) >= 207 and kinds > SLOW_KINDS


def test_hostile_files_run_no_code_and_open_no_other_file(corpus):
    assert {kind: row["seen"] for kind, _, row in corpus if row["seen"]} == {}
    assert not Path(hostile.MARKER).exists()


def test_hostile_files_get_one_error_that_names_the_file_and_the_reason(corpus):
    for kind, pattern, row in corpus:
        if pattern is None:
            assert row["kind"] == "ok", (kind, row)
            continue
        assert row["kind"] == "InvalidCheckpointError", (kind, row)
        path, message = row["path"], row["message"]
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1200, (kind, message)
        assert re.search(pattern, message), (kind, message)


def test_hostile_files_take_less_than_a_gigabyte(corpus):
    assert corpus[-1][2]["grown_kb"] < MEMORY_KB


def test_hostile_files_leave_the_safe_globals_alone(corpus):
    assert [kind for kind, _, row in corpus if not row["kept"]] == []


def check_that_only_our_error_is_raised(data, path):
    path.write_bytes(data)
    try:
        read_state_dict(path)
    except InvalidCheckpointError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_changed_bytes_raise_only_our_error(examples, tmp_path):
    @settings(max_examples=examples, deadline=None)
    @given(data=st.sampled_from(GOOD), changes=CHANGES)
    def check(data, changes):
        check_that_only_our_error_is_raised(mutations.changed(data, changes), tmp_path / "changed")

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_changed_pickles_raise_only_our_error(examples, tmp_path):
    @settings(max_examples=examples, deadline=None)
    @given(data=st.sampled_from(GOOD[:4]), changes=CHANGES)
    def check(data, changes):
        changed = mutations.with_pickle(data, functools.partial(mutations.changed, changes=changes))
        check_that_only_our_error_is_raised(changed, tmp_path / "changed")

    check()


def test_torch_reads_the_zip_directory_that_was_checked(tmp_path):
    (tmp_path / "x").write_bytes(two_directories())
    assert read_state_dict(tmp_path / "x")["weight"].tolist() == [1, 2, 3, 4]
    assert torch.load(tmp_path / "x", weights_only=True)["weight"].numel() == 2**20  # its own reader takes the other


def test_big_endian_file_gives_its_numbers(tmp_path):
    records = {"data/0": struct.pack(">4f", 1, 2, 3, 4), "byteorder": b"big"}
    (tmp_path / "x").write_bytes(state_zip(tensor(), records=records))
    assert read_state_dict(tmp_path / "x")["weight"].tolist() == [1, 2, 3, 4]


@pytest.mark.slow
def test_three_thousand_mutations_run_no_code(tmp_path):
    paths = [tmp_path / f"{number}" for number in range(3000)]
    for path, data in zip(paths, mutations.random_mutations(random.Random(0), len(paths)), strict=True):
        path.write_bytes(data)
    rows = read_under_audit(paths, tmp_path)
    assert {row["kind"] for row in rows} == {"ok", "InvalidCheckpointError"}
    assert [row for row in rows if row["seen"] or not row["kept"]] == []
    assert rows[-1]["grown_kb"] < MEMORY_KB


def large_files(folder):
    """Write a file of each form that holds as much as may be read."""
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
        (row,) = read_under_audit([path], tmp_path)
        assert row["kind"] == "ok" and row["grown_kb"] < MEMORY_KB, row
