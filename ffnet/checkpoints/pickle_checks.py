"""Check what a pickle imports and how it is structured, without loading it.

torch's restricted unpickler has no bounds of its own on memory and nesting.
"""

import io
import pickletools
import re
from collections.abc import Collection
from typing import Any

from ffnet.checkpoints.problems import CheckpointProblem

MAX_OPCODES = 200_000  # of a pickle; published files have at most 65,000
MAX_NAMES = 64  # that a pickle imports; published files have at most 18
MAX_NESTING = 64  # times that GRAMMAR is applied; the deepest published file takes 18

CONTAINERS = {"collections.OrderedDict": "D", "__builtin__.set": "S", "builtins.set": "S"}  # and their codes in OPCODES
TORCH_NAMES = re.compile(  # what torch's unpickler provides itself
    r"torch\._utils\._rebuild_(parameter|tensor_v2)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|collections\.OrderedDict|(__builtin__|builtins)\.set"
)
STUB_NAMES = re.compile(
    r"torch\.fx\.graph_module\.reduce_graph_module"
    r"|torch\.nn\.modules\.(module\.Module|conv\.Conv2d|batchnorm\.BatchNorm2d|activation\.ReLU"
    r"|linear\.(Identity|Linear)|container\.(Sequential|ModuleList)|pooling\.MaxPool2d)"
    r"|aimet_torch\.elementwise_ops\.(Add|Concat|Interpolate)"
    r"|(__main__|(models|ffnet)(\.\w+)*)\.[A-Z]\w*|[\w.]+\.GaussianConv2D"  # FFNet's own classes: their paths differ
    r"|(__builtin__|builtins)\.getattr|torch\._C\._VariableFunctionsClass"
    r"|argparse\.Namespace"  # the options of a training script, beside the state_dict
)

# The opcodes that torch.save writes, each as one character. Those with "" leave the values as they are, except that a
# GET gives a value again; GLOBAL is G, or as in CONTAINERS.
OPCODES = {
    "BINUNICODE": "T", "NONE": "N", "NEWTRUE": "N", "NEWFALSE": "N", "BINFLOAT": "N", "BININT": "N", "BININT1": "N",
    "BININT2": "N", "LONG1": "N", "GLOBAL": "G", "MARK": "(", "EMPTY_LIST": "[", "APPEND": "a", "APPENDS": "A",
    "EMPTY_DICT": "{", "SETITEM": "s", "SETITEMS": "U", "EMPTY_TUPLE": "0", "TUPLE1": "1", "TUPLE2": "2",
    "TUPLE3": "3", "TUPLE": ")", "NEWOBJ": "C", "REDUCE": "C", "BUILD": "b", "BINPERSID": "P", "PROTO": "", "STOP": ".",
    "BINPUT": "", "LONG_BINPUT": "", "BINGET": "", "LONG_BINGET": "",
}  # fmt: skip
# GRAMMAR repeatedly replaces the characters that make a value by the character of that value; a pickle that does not
# become one value is refused. Accepted pickles call only names; each object has arguments and attributes of its own;
# keys and the items of sets are texts or numbers. Otherwise a small file could crash the process with a deeply nested
# key that torch hashes, or fill the memory with copies of one large list or dictionary.
VALUE = "[TNG0OML]"  # T text, N number or None, G name, 0 empty tuple, O object, M dictionary (a mapping), L list
TUPLE = rf"(\({VALUE}*\)|{VALUE}1|{VALUE}{{2}}2|{VALUE}{{3}}3)"
GRAMMAR = {
    r"\(TGTTN{1,2}\)P": "O",  # a storage: ("storage", type, key, device, size) and, before torch 1.6, None
    r"S\[(\(T*A|Ta)*1C": "O",  # a set of texts
    r"\{|D0C": "M",  # a new dictionary
    rf"M(\(([TN]{VALUE})*U|[TN]{VALUE}s)": "M",  # a new dictionary with more items
    r"\[": "L",  # a new list
    rf"L(\({VALUE}*A|{VALUE}a)": "L",  # a new list with more items
    rf"{TUPLE}(?!C)": "O",  # a tuple that is not the arguments of a call
    rf"G(0|{TUPLE})C": "O",  # a call
    "[OM]Mb": "O",  # an object with the attributes of a new dictionary
}


def check_pickle(stream: io.BytesIO) -> tuple[str, ...]:
    """Check opcodes, names and structure of the pickle at the stream's position; return the names that it imports.

    Afterwards the stream's position is the end of the pickle.
    """
    codes: list[str] = []
    memo: dict[Any, str] = {}
    names: dict[str, None] = {}
    for opcode, arg, _ in pickletools.genops(stream):
        if opcode.name not in OPCODES or (opcode.name == "PROTO" and arg != 2):
            used = f"pickle protocol {arg}" if opcode.name == "PROTO" else f"the pickle opcode {opcode.name}"
            raise CheckpointProblem(f"this file uses {used}, which torch.save does not use")
        code = OPCODES[opcode.name]
        if opcode.name == "GLOBAL":
            name = str(arg).replace(" ", ".", 1)
            names[name] = None
            code = CONTAINERS.get(name, "G")
        elif "BINPUT" in opcode.name:
            memo[arg] = codes[-1] if codes[-1] in "TNGDS" else "O"
        elif "BINGET" in opcode.name:
            code = memo[arg]
        codes.extend(code)
        if len(codes) > MAX_OPCODES:
            raise CheckpointProblem("the pickle in this file is longer than any published one")
    check_names(names)
    check_structure("".join(codes))
    return tuple(names)


def check_names(names: Collection[str]) -> None:
    """Refuse names that no published checkpoint imports."""
    if len(names) > MAX_NAMES:
        raise CheckpointProblem(f"this file imports {len(names)} names, more than any published one")
    for name in names:
        if not STUB_NAMES.fullmatch(name) and not TORCH_NAMES.fullmatch(name):
            raise CheckpointProblem(f"this file imports {name}, which no published checkpoint does")


def check_structure(codes: str) -> None:
    """Refuse a pickle whose opcodes GRAMMAR does not reduce to one value."""
    for _ in range(MAX_NESTING):
        for expression, value in GRAMMAR.items():
            codes = re.sub(expression, value, codes)
        if re.fullmatch(r"[NOML]\.", codes):
            return
    raise CheckpointProblem("the pickle in this file is not structured like a checkpoint's")
