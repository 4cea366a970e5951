"""Files that mean harm, or are broken: `corpus()` gives each kind's bytes and what its refusal has to say.

Each that could run code would create the file MARKER.
"""

import re
import struct
from pathlib import Path

from tests.helpers.hostile_files import (
    COMMAND,
    MARKER,
    PYTHON,
    old_files,
    others,
    safetensors_files,
    truncations,
    two_directories,
    zips,
)
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
    storage,
    tensor,
    torch_zip,
    value,
)

NAMES = {  # a call of each would run code, open a file, take memory without bound, or hand out an object that can
    "posix.system": COMMAND,
    "os.system": COMMAND,
    "nt.system": COMMAND,
    "builtins.eval": PYTHON,
    "builtins.exec": PYTHON,
    "__builtin__.eval": PYTHON,
    "__builtin__.open": MARKER,
    "builtins.__import__": "antigravity",
    "builtins.bytearray": 2**40,
    "subprocess.Popen": COMMAND,
    "runpy.run_path": MARKER,
    "importlib.import_module": "antigravity",
    "pickle.loads": "cos\nsystem\n.",
    "torch.load": MARKER,
    "torch.hub.load": MARKER,
    "torch.jit.load": MARKER,
    "torch.utils.cpp_extension.load_inline": "x",
    "torch.fx._symbolic_trace.Tracer": "x",
    "torch.fx.graph_module._forward_from_src": PYTHON,
    "torch.nn.modules.module.register_module_forward_hook": "x",
    "torch.Tensor": 2**40,
    "torch.FloatTensor": 2**40,
    "torch.storage.UntypedStorage": 2**40,
    "torch.Size": "x",
    "torch.device": "cuda",
    "torch.nn.parameter.Parameter": "x",
    "torch.serialization._get_layout": "torch.strided",
    "torch._utils._rebuild_wrapper_subclass": "x",
    "torch._tensor._rebuild_from_type_v2": "x",
    "torch._utils._rebuild_device_tensor_from_numpy": "x",
    "torch._utils._rebuild_meta_tensor_no_storage": "x",
    "torch._utils._rebuild_sparse_tensor": "x",
    "torch._utils._rebuild_nested_tensor": "x",
    "torch._utils._rebuild_qtensor": "x",
    "torch._utils._rebuild_parameter_with_state": "x",
    "collections.Counter": "x",
    "_codecs.encode": "x",
    "traceback.FrameSummary": MARKER,  # aimet_torch registers it as safe: its `line` opens the file of that name
    "builtins.SystemExit": "x",
    "aimet_torch.elementwise_ops.Divide": "x",
    "aimet_torch.quantsim.load_checkpoint": MARKER,
}


def names():
    for path, argument in NAMES.items():
        yield f"call {path}", torch_zip(call(name(*path.rsplit(".", 1)), argument)), f"imports {re.escape(path)}"


def opcodes():
    system, args = name("posix", "system"), value((COMMAND,))
    yield "INST", torch_zip(MARK + value(COMMAND) + b"iposix\nsystem\n"), "INST"
    yield "OBJ", torch_zip(MARK + system + value(COMMAND) + b"o"), "OBJ"
    yield "NEWOBJ", torch_zip(name("subprocess", "Popen") + args + NEWOBJ), "subprocess.Popen"
    yield "NEWOBJ_EX", torch_zip(name("subprocess", "Popen") + args + b"}\x92"), "NEWOBJ_EX"
    yield "STACK_GLOBAL", torch_zip(value("posix") + value("system") + b"\x93" + args + REDUCE), "STACK_GLOBAL"
    yield "text persistent id", torch_zip(b"Pposix.system\n"), "PERSID"
    yield "extension registry", torch_zip(b"\x82\x01"), "EXT1"
    yield "protocol 4", torch_zip(value({}), proto=b"\x80\x04"), "protocol 4"
    yield "protocol 0", torch_zip(b"(dp0\nI1\nI2\ns", proto=b""), "pickle opcode DICT"
    yield "frames", torch_zip(b"\x95\x08\0\0\0\0\0\0\0}"), "FRAME"
    yield "buffers out of band", torch_zip(b"\x97"), "NEXT_BUFFER"
    yield "huge text", torch_zip(b"X\xff\xff\xff\xff"), "broken"
    yield "huge integer", torch_zip(b"\x8b\xff\xff\xff\x7f1"), "broken"
    yield "hidden name", torch_zip(name("posix", "system") + b"0" + value({})), "POP"
    yield "name with blanks", torch_zip(b"ctorch.nn.modules.conv Conv2d\nx\n"), "imports"
    yield "name in no ASCII", torch_zip(b"c\xff\nx\n"), "broken"
    yield "second pickle", torch_zip(value({}) + b"." + call(system, COMMAND)), "after the end"
    yield "no end", torch_zip(value({}), end=b""), "broken"
    yield "nothing on the stack", torch_zip(b""), "structured"
    yield "tuple without mark", torch_zip(b"t"), "structured"
    yield "mark at the end", torch_zip(b"("), "structured"
    yield "memo that is not there", torch_zip(b"h\x09"), "broken"
    yield "reduce of a text", torch_zip(call(value("posix.system"), COMMAND)), "structured"
    yield "reduce of a storage", state_zip(call(name("torch", "FloatStorage"), 2**40)), "broken"
    yield (
        "build of a name",
        torch_zip(name("torch.nn.modules.module", "Module") + value({"x": 1}) + BUILD),
        "structured",
    )
    yield "state set twice", torch_zip(module() + value({"x": 1}) + BUILD), "holds no tensors"
    yield "state of slots", torch_zip(new(name("models.a", "B"), (None, {"__class__": 1}))), "structured"
    yield (
        "getattr chain",
        torch_zip(call(call(name("__builtin__", "getattr"), "os", "system"), COMMAND)),
        "structured",
    )
    yield "dict from a call", torch_zip(call(name("collections", "OrderedDict"), {"x": 1})), "structured"
    yield (
        "dict's attributes",
        state_zip(name("collections", "OrderedDict") + b")R" + value({"x": 1}) + BUILD),
        "is a dictionary",
    )
    yield "pid text", state_zip(value("storage") + PID), "structured"
    yield "pid module", torch_zip(value(("module", name("models.a", "B"), "a.py", PYTHON)) + PID), "structured"
    yield "deep tuple as a key", torch_zip(DICT + EMPTY + b"\x85" * 150_000 + b"Ns"), "structured"
    yield "deep tuple as a pid", torch_zip(value("storage") + EMPTY + b"\x85" * 150_000 + b"\x86" + PID), "structured"
    kind = name("models.a", "B")
    many = kind + b"q\1" + value((1,) * 10_000) + b"q\0" + b"h\1h\0R" * 15_000
    yield "calls with many arguments", torch_zip(many), "structured"
    yield "calls with a text for arguments", torch_zip(kind + value("x" * 100_000) + REDUCE), "structured"
    yield "attributes copied to many dictionaries", torch_zip(copied_state()), "structured"
    yield (
        "sets of one large list",
        torch_zip(value(list(range(3_000))) + b"q\0" + set_of(b"h\0") * 10_000),
        "structured",
    )
    yield "tuple of tuples of tuples as a key", torch_zip(DICT + laughs(b")", b"t") + b"Ns"), "structured"
    yield "arguments as a set's item", torch_zip(set_of(b"](" + deep_arguments() + b"e")), "structured"
    yield "storage read by many keys", torch_zip(value([storage(key=i) for i in range(100)])), "structured"
    yield "long chain of modules", torch_zip(b"](" + chain(15_000) + b"e"), "holds a list"
    yield "many names", torch_zip(b"".join(name("models.a", f"B{i}") for i in range(1000))), "imports 1000 names"
    yield "deep list", torch_zip(b"]" * 20_000 + b"a" * 19_999), "structured"
    yield "list of lists of lists", torch_zip(laughs()), "structured"
    yield "long pickle", torch_zip(b"N" * 300_000), "longer than any"
    yield "large pickle", torch_zip(b"N" * 2**20), "data.pkl"


def laughs(empty=b"]", end=b"e"):
    """Each list, or tuple, holds the one before ten times, by the memo."""
    begin = b"](" if end == b"e" else b"("
    return empty + b"q\0" + b"".join(begin + bytes([104, i]) * 10 + end + bytes([113, i + 1]) for i in range(40))


def set_of(items):
    return name("__builtin__", "set") + items + b"\x85" + REDUCE


def copied_state():
    """Sets the one large dictionary as the state of many OrderedDicts."""
    large = value({f"k{i}": None for i in range(10_000)}) + b"q\0"
    return large + (name("collections", "OrderedDict") + EMPTY + REDUCE + b"h\0" + BUILD) * 6_000


def deep_arguments():
    """A tuple in a tuple in a tuple, each the arguments of a call, and the last of them by the memo."""
    kind = name("models.a", "B") + b"q\1"
    calls = b"".join(b"h\1(h\0tq\0" + REDUCE for _ in range(30_000))
    return kind + EMPTY + b"q\0" + REDUCE + calls + b"h\0"


def chain(count):
    """Modules that each have the one before as a member, by the memo."""
    layer = name("torch.nn.modules.module", "Module") + b"q\1" + EMPTY + NEWOBJ + b"r" + struct.pack("<I", 2)
    step = b"h\1)\x81r%b}X\x08\0\0\0_modules}X\1\0\0\0aj%bssb"
    return layer + b"".join(step % (struct.pack("<I", i + 3), struct.pack("<I", i + 2)) for i in range(count))


def tensors():
    yield "huge storage", state_zip(tensor(count=2**40)), "broken"
    yield "storage beyond 64 bits", state_zip(tensor(count=2**70)), "broken"
    yield "negative storage", state_zip(tensor(count=-4)), "broken"
    yield "storage larger than its record", state_zip(tensor(count=5)), "broken"
    yield "storage smaller than its record", state_zip(tensor(count=3)), "broken"
    yield "storage without a record", state_zip(tensor(key="7")), "broken"
    yield "storage by a path", state_zip(tensor(key="../../../etc/passwd")), "broken"
    yield "storage by a tuple", state_zip(tensor(key=("0",))), "structured"
    yield "storage of complex numbers", state_zip(tensor(kind="ComplexFloatStorage")), "ComplexFloatStorage"
    yield "storage of a kind that is none", state_zip(tensor(kind="SystemStorage")), "SystemStorage"
    yield "call of a storage", state_zip(storage() + EMPTY + REDUCE), "structured"
    yield "object of a storage", state_zip(storage() + EMPTY + NEWOBJ), "structured"
    yield "tensor of a text", state_zip(tensor(stored=value("x"))), "broken"
    yield "stride 0", state_zip(tensor((10**6, 10**6), (0, 0))), "claim more bytes"
    yield "negative stride", state_zip(tensor((4,), (-1,))), "broken"
    yield "negative offset", state_zip(tensor(offset=-1)), "broken"
    yield "offset beyond", state_zip(tensor(offset=4)), "broken"
    yield "negative size", state_zip(tensor((-4,))), "broken"
    yield "huge size", state_zip(tensor((2**62,), (1,))), "broken"
    yield "size times stride overflows", state_zip(tensor((2**32, 2**32), (2**32, 2**32))), "broken"
    yield "eight dimensions", state_zip(tensor((1,) * 8, (1,) * 8)), "of a kind"
    floats = {"data/0": bytes(4 * 4000)}
    overlapping = tensor((2000, 2000), (1, 1), count=4000)
    yield "overlapping rows", state_zip(overlapping, records=floats), "claim more bytes"
    many = {f"k{i}": tensor((4000,), (1,), count=4000) for i in range(200)}
    yield "one storage under many keys", torch_zip(value(many), records=floats), "claim more bytes"
    yield (
        "parameter of a module",
        state_zip(call(name("torch._utils", "_rebuild_parameter"), module(), True, EMPTY)),
        "",
    )


def structures():
    layer = name("torch.nn.modules.module", "Module") + EMPTY + NEWOBJ
    cycle = layer + b"q\0" + value({"_modules": {"a": b"h\0"}}) + BUILD
    yield "module in itself", torch_zip(cycle), "nested too deeply"
    twice = {
        f"m{i}": module(dict.fromkeys("ab", bytes([104, i - 1])) if i else {}) + bytes([113, i]) for i in range(30)
    }
    yield "modules shared 2^30 times", torch_zip(module(twice)), "nested too deeply"
    deep = module()
    for _ in range(100):
        deep = module({"a": deep})
    yield "deep modules", torch_zip(deep), "structured"
    yield "member with a dot", torch_zip(module({"a.b": module()})), "names have no dot"
    yield "member without a name", torch_zip(module({"": module()})), "names have no dot"
    yield "key that is a number", torch_zip(value({1: tensor()})), "is not a text"
    yield "member by a number", torch_zip(module({1: module()})), "is not a text"
    yield "tensor for a module", torch_zip(module({"a": tensor()})), "is not a module but"
    yield "module for a tensor", torch_zip(module(_parameters={"a": module()})), "not a plain tensor"
    yield "list of modules", torch_zip(module(_modules=[module()])), "are not a dictionary"
    yield "module without a state", torch_zip(layer), "has no attributes"
    yield "state that is a list", torch_zip(layer + value([1]) + BUILD), "structured"
    conv = new(name("torch.nn.modules.conv", "Conv2d"), {"stride": module()})
    yield "module for a stride", torch_zip(module({"a": conv})), "neither a number nor a text"
    hidden = call(name("__builtin__", "set"), 7)
    yield "set of a number", torch_zip(module(_non_persistent_buffers_set=hidden)), "structured"
    yield "number for a tensor", state_zip(7), "not a plain tensor"
    yield "state_dict in an unknown entry", torch_zip(value({"student": {"weight": tensor()}})), "is a dictionary"
    yield "state_dict in itself", torch_zip(DICT + b"q\1" + value("state_dict") + b"h\1s"), "nested too deeply"
    yield "training checkpoint of a list", torch_zip(value({"model": [tensor()]})), "not a plain tensor"
    blanks = {f"n{i}": None for i in range(3000)}
    yield "module of many blanks", torch_zip(module(_parameters=blanks)), "at most 2000 members"
    yield "long name", torch_zip(module({"x" * 10_000: module()})), "at most 200 characters"
    twice = module(_parameters={"a": tensor()}, _buffers={"a": tensor()})
    yield "parameter that is a buffer too", torch_zip(twice), "a parameter as well as a buffer"
    yield "pair for a root", torch_zip(value(({"weight": tensor()}, 1))), "holds a tuple"
    yield "module of nothing", torch_zip(module()), "holds no tensors"
    yield "state_dict of nothing", torch_zip(value({})), "holds no tensors"
    yield "list for a root", torch_zip(value([tensor()])), "holds a list"
    yield "nothing for a root", torch_zip(value(None)), "holds a NoneType"
    yield (
        "fx module without a body",
        torch_zip(call(name("torch.fx.graph_module", "reduce_graph_module"))),
        "has no attributes",
    )
    key = "\x1b[2J\nweight" + "x" * 100
    yield "key that steers the terminal", torch_zip(value({key: 7})), "'.x1b.*not a plain tensor"
    yield "function for a layer", torch_zip(module({"a": name("__builtin__", "getattr")})), "is not a module but"


def corpus():
    """(kind, bytes, pattern that the refusal has to match) of every hostile file."""
    makers = (names, opcodes, tensors, structures, zips, truncations, others, safetensors_files, old_files)
    for make in makers:
        yield from make()


def harmless():
    """(kind, bytes) of files whose tensors are good, beside Python text that nobody must run."""
    body = {"_modules": {}, "_buffers": {}, "_parameters": {"weight": tensor()}, "_code": PYTHON}
    graph = call(name("torch.fx.graph_module", "reduce_graph_module"), body, PYTHON)
    yield "fx code", torch_zip(graph)
    body["conv"] = call(name("__builtin__", "getattr"), name("torch._C", "_VariableFunctionsClass"), "conv2d")
    yield "getattr", torch_zip(new(name("__main__", "System"), body))
    yield "hooks", state_zip(tensor(hooks=new(name("models.a", "B"), {"x": 1})))
    yield "key twice", torch_zip(DICT + MARK + (value("weight") + tensor()) * 2 + b"u")
    yield "big-endian", state_zip(tensor(), records={"data/0": bytes(16), "byteorder": b"big"})
    yield "two directories", two_directories()
    yield "tagged cuda", state_zip(tensor(place="cuda:0"))


def write(folder):
    """The corpus as files in `folder`, and a list of them: [(file, kind, pattern)]; pattern None for the harmless."""
    rows = [*corpus(), *((kind, data, None) for kind, data in harmless())]
    listed = []
    for number, (kind, data, pattern) in enumerate(rows):
        path = Path(folder) / f"{number:03}"
        path.write_bytes(data)
        listed.append((str(path), kind, pattern))
    return listed
