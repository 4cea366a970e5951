"""Files that mean harm, or are broken: `corpus()` gives the bytes of each kind, `harmless()` those that must load.

Each that could run code would create the file MARKER.
"""

import io
import json
import os
import struct
import tempfile
import zipfile
from pathlib import Path

import torch

from tests.helpers.pickles import (
    BUILD,
    DICT,
    EMPTY,
    MARK,
    NEWOBJ,
    PID,
    REDUCE,
    call,
    module,
    name,
    new,
    state_zip,
    tensor,
    torch_zip,
    value,
)

MARKER = str(Path(tempfile.gettempdir()) / f"ffnet-hostile-code-ran-{os.getuid()}")
COMMAND = f"touch {MARKER}"
PYTHON = f"import os; os.system({COMMAND!r})"
PICKLED = Path(__file__).parents[1] / "data" / "pickled"
HUGE = 2**40
NAMES = {  # a call of each would run code, open a file, take memory without bound, or hand out an object that can
    "posix.system": COMMAND, "subprocess.Popen": COMMAND, "builtins.eval": PYTHON, "__builtin__.open": MARKER,
    "importlib.import_module": "antigravity", "builtins.bytearray": HUGE, "pickle.loads": "cos\nsystem\n.",
    "torch.load": MARKER, "torch.utils.cpp_extension.load_inline": "x", "torch.Tensor": HUGE,
    "torch.fx.graph_module._forward_from_src": PYTHON, "torch._tensor._rebuild_from_type_v2": "x",
    "torch._utils._rebuild_parameter_with_state": "x", "collections.Counter": "x", "_codecs.encode": "x",
    "traceback.FrameSummary": MARKER, "ffnet.system.files.write_atomically": MARKER,
}  # fmt: skip


def opcodes():
    system, args = name("posix", "system"), value((COMMAND,))
    yield "INST", torch_zip(MARK + value(COMMAND) + b"iposix\nsystem\n")
    yield "NEWOBJ", torch_zip(name("subprocess", "Popen") + args + NEWOBJ)
    yield "STACK_GLOBAL", torch_zip(value("posix") + value("system") + b"\x93" + args + REDUCE)
    yield "extension registry", torch_zip(b"\x82\x01")
    yield "huge text", torch_zip(b"X\xff\xff\xff\xff")
    yield "huge bytearray", torch_zip(b"\x96" + struct.pack("<Q", HUGE))
    yield "hidden name", torch_zip(system + b"0" + value({}))
    yield "getattr chain", torch_zip(call(call(name("__builtin__", "getattr"), "os", "system"), COMMAND))
    yield "pid module", torch_zip(value(("module", name("models.a", "B"), "a.py", PYTHON)) + PID)
    yield "large pickle", torch_zip(b"N" * 2**20)


def nesting():
    """Pickles that crash the process, or never end, where values are hashed or freed by recursion."""
    deep = EMPTY + b"\x85" * 900_000
    yield "deep tuple as a key", torch_zip(DICT + deep + b"Ns")
    yield "deep tuple as a pid", torch_zip(value("storage") + deep + b"\x86" + PID)
    yield "deep tuple by the memo", torch_zip(DICT + EMPTY + b"q\0" + b"h\0\x85q\0" * 200_000 + b"Ns")
    yield "deep tuple in a set", torch_zip(name("__builtin__", "set") + b"](" + deep + b"e\x85" + REDUCE)
    yield "tuple of tuples of tuples as a key", torch_zip(DICT + laughs(b")", b"t") + b"Ns")
    yield "deep list", torch_zip(b"]" * 500_000 + b"a" * 499_999)
    yield "deep dictionaries", torch_zip(b"}" + b"X\1\0\0\0a}" * 140_000 + b"s" * 140_000)
    yield "list of lists of lists", torch_zip(laughs())
    kind = name("models.a", "B") + b"q\0"
    yield "deep calls", torch_zip(kind + EMPTY + REDUCE + b"q\1" + b"h\0h\1\x85Rq\1" * 120_000)
    yield "calls with many arguments", torch_zip(kind + value((1,) * 10_000) + b"q\1" + b"h\0h\1R" * 15_000)


def laughs(empty=b"]", end=b"e"):
    """Each list, or tuple, holds the one before ten times, by the memo."""
    begin = b"](" if end == b"e" else b"("
    return empty + b"q\0" + b"".join(begin + bytes([104, i]) * 10 + end + bytes([113, i + 1]) for i in range(40))


def tensors():
    yield "huge storage", state_zip(tensor(count=HUGE))
    yield "negative storage", state_zip(tensor(count=-4))
    yield "storage larger than its record", state_zip(tensor(count=5))
    yield "storage without a record", state_zip(tensor(key="7"))
    yield "storage by a path", state_zip(tensor(key="../../../etc/passwd"))
    yield "storage of complex numbers", state_zip(tensor(kind="ComplexFloatStorage"))
    yield "elements beyond the storage", state_zip(tensor((5,)))
    yield "stride 0", state_zip(tensor((10**12,), (0,)))
    yield "offset beyond", state_zip(tensor(offset=4))
    many = {f"k{i}": tensor((10**8,), (0,)) for i in range(200)}
    yield "expanded tensors under many keys", torch_zip(value(many))


def structures():
    layer = name("torch.nn.modules.module", "Module") + EMPTY + NEWOBJ
    yield "module in itself", torch_zip(layer + b"q\0" + value({"_modules": {"a": b"h\0"}}) + BUILD)
    yield "key that is a number", torch_zip(value({1: tensor()}))
    yield "tensor for a module", torch_zip(module({"a": tensor()}))
    yield "state_dict in an unknown entry", torch_zip(value({"student": {"weight": tensor()}}))
    yield "state_dict in itself", torch_zip(DICT + b"q\1" + value("state_dict") + b"h\1s")
    yield "long name", torch_zip(module({"x" * 10_000: module()}))
    yield "state_dict of nothing", torch_zip(value({}))
    yield "key that steers the terminal", torch_zip(value({"\x1b[2J\nweight" + "x" * 100: 7}))
    yield "function for a layer", torch_zip(module({"a": name("__builtin__", "getattr")}))


def patched(data, position, new):
    return data[:position] + new + data[position + len(new) :]


def entry(data, record):
    """Where the zip directory's entry for a record begins."""
    return data.rindex(b"PK\1\2", 0, data.rindex(record.encode()))


def flipped(data, record, offset):
    """`data` with one bit of a record's content flipped; its directory keeps the old checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo(record)
    at = info.header_offset + 30 + len(info.filename) + offset
    return patched(data, at, bytes([data[at] ^ 1]))


def zips():
    good = state_zip(tensor())
    yield "compressed pickle", state_zip(tensor(), kind=zipfile.ZIP_DEFLATED)
    bomb = {"data/0": bytes(2**22)}
    yield "zip bomb", state_zip(tensor(count=2**20), records=bomb, kind=zipfile.ZIP_DEFLATED)
    yield "encrypted", patched(good, entry(good, "data/0") + 8, b"\1\0")
    yield "sizes beyond the file", patched(good, entry(good, "data/0") + 20, struct.pack("<II", 2**25, 2**25))
    two = state_zip(tensor(), records={f"data/{i}": b"1234" for i in range(2)})
    at, first = entry(two, "data/1") + 42, entry(two, "data/0") + 42
    yield "overlapping records", patched(two, at, two[first : first + 4])
    yield "record twice", state_zip(tensor(), extra=[("archive/data/0", b"x")])
    yield "no pickle", state_zip(tensor()).replace(b"data.pkl", b"data.pkk")
    yield "TorchScript", state_zip(tensor(), records={"constants.pkl": b"x", "code/a.py": PYTHON.encode()})
    yield "flipped byte in a storage", flipped(good, "archive/data/0", 3)
    yield "directory of another zip behind", good + torch_zip(call(name("posix", "system"), COMMAND))
    real = (PICKLED / "tiny.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(real)) as archive:
        for info in archive.infolist():
            yield f"cut in {info.filename}", real[: info.header_offset + 60]
    yield "cut in the directory", real[:-100]


def release(member, kind=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind, compresslevel=1) as archive:
        archive.writestr("x/a.pth", member)
    return stream.getvalue()


def safetensors_file(header, data=bytes(16)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def others():
    yield "empty file", b""
    yield "Python", PYTHON.encode()
    yield "git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "bare pickle", b"\x80\x02" + call(name("posix", "system"), COMMAND) + b"."
    yield "release of something", release(torch_zip(call(name("posix", "system"), COMMAND)))
    yield "release that is a bomb", release(bytes(2**29))
    yield "safetensors: header beyond", struct.pack("<Q", 2**19) + b"{}"
    yield "safetensors: huge header", struct.pack("<Q", 2**62) + b"{}"
    yield "safetensors: deep JSON", safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


def old_files():
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(4), "bias": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    good = stream.getvalue()
    stop = good.index(b"ctorch._utils")
    yield "old: cut in a storage", good[:-3]
    yield "old: system", good[:stop] + call(name("posix", "system"), COMMAND) + good[stop:]
    header = good[: good.index(b"}q\x00(X\x06") - 2]
    stored = ("storage", name("torch", "FloatStorage"), "0", "cpu", HUGE, None)
    body = b"\x80\x02" + value({"weight": tensor((HUGE,), stored=value(stored) + PID)}) + b"."
    yield "old: huge storage", header + body + b"\x80\x02" + value(["0"]) + b"." + bytes(8)
    pid = value(("module", name("models.a", "B"), "/etc/passwd", PYTHON)) + PID
    yield "old: whole module", header + b"\x80\x02" + new(pid, {}) + b".\x80\x02]."
    yield "old: nothing behind its number", good[:15]


def corpus():
    """(kind, bytes) of every hostile file."""
    for path, argument in NAMES.items():
        yield f"imports {path}", torch_zip(call(name(*path.rsplit(".", 1)), argument))
    for make in (opcodes, nesting, tensors, structures, zips, others, old_files):
        yield from make()


def harmless():
    """(kind, bytes) of files whose tensors are good, beside Python text that nobody must run."""
    body = {"_modules": {}, "_buffers": {}, "_parameters": {"weight": tensor()}, "_code": PYTHON}
    yield "fx code", torch_zip(call(name("torch.fx.graph_module", "reduce_graph_module"), body, PYTHON))
    body["conv"] = call(name("__builtin__", "getattr"), name("torch._C", "_VariableFunctionsClass"), "conv2d")
    yield "getattr", torch_zip(new(name("__main__", "System"), body))
    yield "hooks", state_zip(tensor(hooks=new(name("models.a", "B"), {"x": 1})))
    yield "big-endian", state_zip(tensor(), records={"data/0": bytes(16), "byteorder": b"big"})
    yield "tagged cuda", state_zip(tensor(place="cuda:0"))
    yield "paths that climb", state_zip(tensor(), extra=[("archive/../../x", b"x"), ("/etc/x", b"x")])
    yield "second pickle", torch_zip(value({"a": tensor()}) + b"." + call(name("posix", "system"), COMMAND))
