"""Takes every name out of a pickle that its reader would import, and refuses what no checkpoint needs. No torch here.

The standard library's pickletools tell the opcodes apart; nothing is executed.
"""

import io
import pickletools
import re
from dataclasses import dataclass

MAX_NAMES = 64  # that a pickle imports; published files have at most 18
MAX_TUPLE_DEPTH = 8  # hashing a deep tuple would overflow the C stack
MAX_TUPLE_ITEMS = 16  # each call copies its arguments, so that few bytes could ask for much memory

CONVERT = (
    "where its classes are installed and its source is trusted, load it there and "
    "`torch.save(model.state_dict(), 'weights.pth')`"
)
STAND_IN_MODULE = "ffnet_stand_in"  # the module path of the names that replace a file's own
FX_MODULE = "torch.fx.graph_module reduce_graph_module"
DICTIONARY = "collections OrderedDict"
TENSOR_NAMES = {  # what torch itself has to see
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(
        f"torch {kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}
STAND_IN_NAMES = re.compile(
    r"torch\.fx\.graph_module reduce_graph_module"
    r"|torch\.nn\.modules\.(module Module|conv Conv2d|batchnorm BatchNorm2d|activation ReLU|linear (Identity|Linear)"
    r"|container (Sequential|ModuleList)|pooling MaxPool2d)"
    r"|aimet_torch\.elementwise_ops (Add|Concat|Interpolate)"
    r"|(__main__|(models|ffnet)(\.\w+)*) [A-Z]\w*|[\w.]+ GaussianConv2D"  # FFNet's own: their paths differ
    r"|(__builtin__|builtins) (set|getattr)|torch\._C _VariableFunctionsClass"
)
OPCODES = re.compile(  # what torch.save writes: protocol 2
    "PROTO|STOP|GLOBAL|NEWOBJ|REDUCE|BUILD|BINPERSID|MARK|APPENDS?|SETITEMS?|TUPLE[123]?|EMPTY_(TUPLE|LIST|DICT)"
    "|NONE|NEWFALSE|NEWTRUE|BININT[12]?|BINFLOAT|LONG1|BINUNICODE|(LONG_)?BIN(GET|PUT)"
)


class Refused(ValueError):
    """What is wrong with a file; who knows its name turns it into a CheckpointError."""


def quoted(key):
    """A key of the file's for an error: short, and on one line."""
    return repr(key[:80]) if isinstance(key, str) else f"a {type(key).__name__}"


class StandIn:
    """Takes the place of a class or function that a file names; does nothing but hold what it was given."""

    __slots__ = ("args", "state")
    name = ""

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        if self.state is not None:
            raise Refused(f"sets the state of one {self.name} twice")
        self.state = state


@dataclass(frozen=True)
class Disarmed:
    """A pickle in which every name is torch's or a stand-in's."""

    data: bytes
    names: tuple  # "module name", as the file has them
    stand_ins: tuple  # (class, its full name): what add_safe_globals takes
    pair: bool  # whether the root is now a tuple (object, state), for us to put together


def disarm(pickle):
    """The pickle in the bytes `pickle` as a Disarmed; Refused where it holds more than a checkpoint needs."""
    stream = io.BytesIO(pickle)
    disarmed = disarm_next(stream)
    if stream.tell() != len(pickle):
        raise Refused("has bytes behind the end of its pickle")
    return disarmed


def disarm_next(stream):
    """The pickle at a BytesIO's position as a Disarmed; the position is behind it then."""
    start = stream.tell()
    operations = list(pickletools.genops(stream))
    pickle = bytes(stream.getbuffer()[start : stream.tell()])
    operations = [(opcode, arg, position - start) for opcode, arg, position in operations]
    for opcode, arg, _ in operations:
        if opcode.name == "PROTO" and arg != 2:
            raise Refused(f"is a pickle of protocol {arg}; torch.save writes 2")
        if not OPCODES.fullmatch(opcode.name):
            raise Refused(f"uses the pickle opcode {opcode.name}, which torch.save never writes")
    pair = len(operations) > 1 and operations[-2][0].name == "BUILD"
    check_structure(operations[:-2] if pair else operations)
    names = tuple(dict.fromkeys(arg for opcode, arg, _ in operations if opcode.name == "GLOBAL"))
    if len(names) > MAX_NAMES:
        raise Refused(f"imports {len(names)} names, more than any published checkpoint")
    return Disarmed(rewritten(pickle, operations, names, pair), names, tuple(stand_ins(names)), pair)


def stand_ins(names):
    """(class or function, the name that replaces the file's) for all of `names` that torch need not see."""
    for number, name in enumerate(names):
        if name == DICTIONARY:
            yield dictionary, f"{STAND_IN_MODULE}.{number}"
        elif STAND_IN_NAMES.fullmatch(name):
            yield type("StandIn", (StandIn,), {"__slots__": (), "name": name}), f"{STAND_IN_MODULE}.{number}"
        elif name not in TENSOR_NAMES:
            raise Refused(f"wants to import {name.replace(' ', '.')}, which no published checkpoint needs: {CONVERT}")


def dictionary():
    """Stands in for OrderedDict: takes no arguments, so that a few bytes cannot ask for many copies."""
    return {}


def rewritten(pickle, operations, names, pair):
    """The bytes of `pickle` with each name replaced, and with a last BUILD made a pair (object, state)."""
    numbers = {name: number for number, name in enumerate(names)}
    ends = [position for _, _, position in operations[1:]] + [len(pickle)]
    pieces = []
    for (opcode, arg, position), end in zip(operations, ends, strict=True):
        if opcode.name == "GLOBAL" and arg not in TENSOR_NAMES:
            pieces.append(f"c{STAND_IN_MODULE}\n{numbers[arg]}\n".encode())
        else:
            pieces.append(pickle[position:end])
    if pair:
        pieces[-2] = b"\x86"  # TUPLE2: a state_dict's _metadata is set so, and torch sets it on OrderedDicts only
    return b"".join(pieces)


NAME = object()  # what check_structure keeps of a global


def check_structure(operations):
    """Refused where a pickle calls what is no name, nests tuples deep, fills a dict's key twice, or is malformed.

    Follows the stack with, for each object, what matters of it: that it is a global, a text's value, a tuple's depth,
    a dict's keys so far.
    """
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in operations:
        try:
            if opcode.name == "MARK":
                marks.append(len(stack))
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            else:
                step(stack, opcode, arg, take(stack, marks, opcode))
        except (IndexError, KeyError) as error:
            raise Refused(f"is a broken pickle: {opcode.name} finds too little on the stack") from error


def take(stack, marks, opcode):
    """The objects that `opcode` removes from the stack, lowest first."""
    count = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        count += len(stack) - marks.pop() - 2  # the mark is not on this stack, and the objects above it are many
    start = len(stack) - count
    if start < (marks[-1] if marks else 0):
        raise IndexError
    taken = stack[start:]
    del stack[start:]
    return taken


def step(stack, opcode, arg, taken):
    """Pushes what `opcode` makes of the objects taken."""
    if opcode.name in ("REDUCE", "NEWOBJ") and not (taken[0] is NAME and isinstance(taken[1], int)):
        raise Refused("calls what is no name, or with what is no tuple")
    if opcode.name == "BUILD" and isinstance(taken[0], set):
        raise Refused("holds a state_dict inside another object: have it saved alone")
    if opcode.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
        stack.append(tuple_depth(taken))
    elif opcode.name in ("SETITEM", "SETITEMS"):
        fill(taken[0], taken[1::2])
        stack.append(taken[0])
    elif opcode.name in ("APPEND", "APPENDS", "BUILD"):
        stack.append(taken[0])
    elif opcode.name in ("EMPTY_DICT", "REDUCE"):
        stack.append(set())
    else:
        stack.extend({"BINUNICODE": arg, "GLOBAL": NAME}.get(opcode.name) for _ in opcode.stack_after)


def tuple_depth(items):
    depth = 1 + max((item for item in items if isinstance(item, int)), default=0)
    if depth > MAX_TUPLE_DEPTH or len(items) > MAX_TUPLE_ITEMS:
        raise Refused(f"has a tuple deeper than {MAX_TUPLE_DEPTH} or longer than {MAX_TUPLE_ITEMS}")
    return depth


def fill(keys, new):
    """Adds the texts among `new` to a dict's keys."""
    for key in new:
        if isinstance(key, str) and isinstance(keys, set):
            if key in keys:
                raise Refused(f"has the key {quoted(key)} twice")
            keys.add(key)
