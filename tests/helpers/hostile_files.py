"""Archives and other files that mean harm, or are broken: they belong to the corpus of tests.helpers.hostile."""

import io
import json
import os
import struct
import tempfile
import zipfile
from pathlib import Path

import torch

from tests.helpers.pickles import PID, call, name, new, state_zip, tensor, torch_zip, value

MARKER = str(Path(tempfile.gettempdir()) / f"ffnet-hostile-code-ran-{os.getuid()}")
COMMAND = f"touch {MARKER}"
PYTHON = f"import os; os.system({COMMAND!r})"
PICKLED = Path(__file__).parents[1] / "data" / "pickled"


def patched(data, position, new):
    return data[:position] + new + data[position + len(new) :]


def entry(data, record):
    """Where the zip directory's entry for a record begins."""
    return data.rindex(b"PK\1\2", 0, data.rindex(record.encode()))


def zips():
    good = state_zip(tensor())
    yield "compressed pickle", state_zip(tensor(), kind=zipfile.ZIP_DEFLATED), "compressed"
    bomb = {"data/0": bytes(2**22)}
    yield "zip bomb", state_zip(tensor(count=2**20), records=bomb, kind=zipfile.ZIP_DEFLATED), "compressed"
    yield "zip bomb in lzma", state_zip(tensor(count=2**20), records=bomb, kind=zipfile.ZIP_LZMA), "compressed"
    yield "encrypted", patched(good, entry(good, "data/0") + 8, b"\1\0"), "encrypted"
    size = struct.pack("<II", 2**25, 2**25)
    yield "sizes beyond the file", patched(good, entry(good, "data/0") + 20, size), "more bytes than the file"
    yield "negative sizes", patched(good, entry(good, "data/0") + 20, b"\xff" * 8), "more bytes than any layer"
    records = {f"data/{i}": b"1234" for i in range(2)}
    two = state_zip(tensor(), records=records)
    at = entry(two, "data/1") + 42
    first = two[entry(two, "data/0") + 42 : entry(two, "data/0") + 46]
    yield "overlapping records", patched(two, at, first), "broken"
    yield "offset beyond the file", patched(two, at, b"\xff\xff\xff\x7f"), "broken"
    yield "record twice", state_zip(tensor(), extra=[("archive/data/0", b"x")]), "two records of one name"
    yield "two pickles", state_zip(tensor(), extra=[("b/data.pkl", b"\x80\x02N.")]), "which no checkpoint has"
    yield "path that climbs", state_zip(tensor(), extra=[("archive/../../x", b"x")]), "which no checkpoint has"
    yield "absolute path", state_zip(tensor(), extra=[("/etc/x", b"x")]), "which no checkpoint has"
    yield "no pickle", state_zip(tensor()).replace(b"data.pkl", b"data.pkk"), "which no checkpoint has"
    large = {"data/0": bytes(65 * 2**20)}
    yield "large record", state_zip(tensor(), records=large), "more bytes than any layer"
    yield "many records", state_zip(tensor(), records={f"data/{i}": b"" for i in range(20_001)}), "records, more than"
    yield (
        "TorchScript",
        state_zip(tensor(), records={"constants.pkl": b"x", "code/a.py": PYTHON.encode()}),
        "TorchScript",
    )
    yield "flipped byte in a storage", flipped(good, "archive/data/0", 3), "broken"
    yield "flipped byte in the pickle", flipped(good, "archive/data.pkl", 3), "broken"
    yield "text before the zip", b"hello" + good, "neither a torch"
    yield "directory of another zip behind", good + torch_zip(call(name("posix", "system"), COMMAND)), "posix.system"
    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    yield "zip of nothing", b"PK\3\4" + stream.getvalue(), "no data.pkl"


def two_directories():
    """A zip whose end points to one directory, of a compressed bomb, and lies behind another, of a good checkpoint.

    zipfile reads the second, and torch's own reader the first.
    """
    bomb = state_zip(tensor((2**20,), count=2**20), records={"data/0": bytes(2**22)}, kind=zipfile.ZIP_DEFLATED)
    good = bytearray(state_zip(tensor()))
    bomb_end, good_end = bomb.rindex(b"PK\5\6"), good.rindex(b"PK\5\6")
    size, first = struct.unpack("<II", bomb[bomb_end + 12 : bomb_end + 20])
    at = struct.unpack("<I", good[good_end + 16 : good_end + 20])[0]
    while good[at : at + 4] == b"PK\1\2":  # the offsets of the second directory count from the first one's end
        lengths = struct.unpack("<HHH", good[at + 28 : at + 34])
        offset = struct.unpack("<I", good[at + 42 : at + 46])[0]
        good[at + 42 : at + 46] = struct.pack("<I", offset + bomb_end - (good_end + bomb_end - size - first))
        at += 46 + sum(lengths)
    good[good_end + 16 : good_end + 20] = struct.pack("<I", first)
    return bomb[:bomb_end] + bytes(good)


def flipped(data, record, offset):
    """`data` with one bit of a record's content flipped; its directory keeps the old checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo(record)
    at = info.header_offset + 30 + len(info.filename) + offset
    return patched(data, at, bytes([data[at] ^ 1]))


def truncations():
    data = (PICKLED / "tiny.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.header_offset:
                yield f"cut before {info.filename}", data[: info.header_offset], "broken"
            yield f"cut in {info.filename}", data[: info.header_offset + 60], "broken"
    yield "cut in the directory", data[:-100], "broken"


def others():
    yield "empty file", b"", "is empty"
    yield "text", b"not a checkpoint", "neither a torch"
    yield "Python", PYTHON.encode(), "neither a torch"
    yield "HTML", b"\n<!DOCTYPE html><html>404</html>", "HTML page"
    yield "git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"
    yield "encodings", json.dumps({"activation_encodings": {}}).encode(), "JSON"
    yield "gzip", b"\x1f\x8b" + bytes(100), "gzip"
    yield "HDF5", b"\x89HDF\r\n\x1a\n", "HDF5"
    yield "bare pickle", b"\x80\x02" + call(name("posix", "system"), COMMAND) + b".", "neither a torch"
    yield "release of something", release(torch_zip(call(name("posix", "system"), COMMAND))), "posix.system"
    yield "release with a text", release(b"hello"), "neither a torch"
    yield "release in lzma", release(bytes(2**20), zipfile.ZIP_LZMA), "compressed in a rare way"
    yield "release in a release", release(release(b"x")), "compressed"
    large = release(bytes(2**20))
    size = struct.pack("<I", 2**31)
    yield "release that is a bomb", patched(large, entry(large, "x/a.pth") + 24, size), "larger than"


def release(member, kind=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr("x/a.pth", member)
    return stream.getvalue()


def safetensors_file(header, data=bytes(16)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def safetensors_files():
    def one(shape=(4,), offsets=(0, 16), dtype="F32"):
        return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    yield "safetensors: header beyond", struct.pack("<Q", 2**19) + b"{}", "broken"
    yield "safetensors: huge header", struct.pack("<Q", 2**62) + b"{}", "neither a torch"
    yield "safetensors: nothing", safetensors_file({}, b""), "holds no tensors"
    yield "safetensors: no JSON", safetensors_file(b"{nonsense}"), "broken"
    yield "safetensors: huge shape", safetensors_file(one((2**40, 2**40))), "broken"
    yield "safetensors: offsets beyond", safetensors_file(one((2**30,), (0, 2**32))), "broken"
    yield "safetensors: negative offsets", safetensors_file(one(offsets=(-16, 0))), "broken"
    yield "safetensors: unknown kind", safetensors_file(one(dtype="F99")), "broken"
    yield "safetensors: overlapping", safetensors_file(one() | {"b": one()["a"]}), "broken"
    yield "safetensors: deep JSON", safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "broken"


def old_files():
    stream = io.BytesIO()
    state = {"weight": torch.zeros(4), "bias": torch.zeros(2)}
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    good = stream.getvalue()
    stop = good.index(b"ctorch._utils")
    yield "old: cut in a storage", good[:-3], "broken"
    yield "old: cut in the pickle", good[:stop], "broken"
    yield "old: bytes after the end", good + b"x", "after its last storage"
    yield "old: system", good[:stop] + call(name("posix", "system"), COMMAND) + good[stop:], "posix.system"
    header = good[: good.index(b"}q\x00(X\x06") - 2]
    stored = ("storage", name("torch", "FloatStorage"), "0", "cpu", 2**40, None)
    body = b"\x80\x02" + value({"weight": tensor((2**40,), stored=value(stored) + PID)}) + b"."
    yield "old: huge storage", header + body + b"\x80\x02" + value(["0"]) + b"." + bytes(8), "broken"
    yield "old: storage that is not there", header + body + b"\x80\x02].", "broken|claim more"
    named = name("models.a", "B")
    pid = value(("module", named, "/etc/passwd", PYTHON)) + PID
    yield "old: whole module", header + b"\x80\x02" + new(pid, {}) + b".\x80\x02].", "before 1.6"
    yield (
        "old: name in the header",
        good[:15] + b"\x80\x02" + name("models.a", "B") + b"." + good[15:],
        "before 1.6",
    )
    yield "old: nothing behind its number", good[:15], "broken"
