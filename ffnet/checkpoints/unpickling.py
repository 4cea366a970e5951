"""Safe unpickling: read a state_dict or a whole pickled module without running anything that the file contains.

torch's restricted unpickler (`weights_only=True`) reads the file, with a stub for each class or function that published
files import; a file that imports anything else is refused. torch checks neither the zip's records and checksums nor the
nesting of tuples, which can crash the process when they are hashed.
"""

import io
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 400 * 2**20  # size of a checkpoint, and of all its tensors together; the largest published one has 378 MiB
MAX_PICKLE = 2**20  # bytes; published files have at most 250 kB
MAX_TUPLE = 1_000  # values in a tuple, nested ones included; hashing recurses without a limit

REMEDY = (
    "Download it again or, if you trust its source, load it where its classes are installed and save its state_dict "
    "alone: torch.save(model.state_dict(), 'weights.pth')."
)

RECORDS = re.compile(r"data\.pkl|data/\d{1,6}|version|byteorder")  # names that torch reads
TORCH_NAMES = re.compile(  # provided by torch's unpickler; it has others, some of which allocate any amount of memory
    r"torch\._utils\._rebuild_(parameter|tensor_v2)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|collections\.OrderedDict|(__builtin__|builtins)\.set"
)
FX_MODULE = "torch.fx.graph_module.reduce_graph_module"
STUB_NAMES = re.compile(
    re.escape(FX_MODULE) + r"|torch\.nn\.modules\.(module\.Module|conv\.Conv2d|batchnorm\.BatchNorm2d|activation\.ReLU"
    r"|linear\.(Identity|Linear)|container\.(Sequential|ModuleList)|pooling\.MaxPool2d)"
    r"|aimet_torch\.elementwise_ops\.(Add|Concat|Interpolate)"
    r"|(__main__|(models|ffnet)(\.\w+)*)\.[A-Z]\w*|[\w.]+\.GaussianConv2D"  # FFNet's own classes: their paths differ
    r"|(__builtin__|builtins)\.getattr|torch\._C\._VariableFunctionsClass"
    r"|argparse\.Namespace"  # options of a training script, beside the state_dict
)
HYPERPARAMETERS = (  # attributes of layers that are not in a state_dict
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "eps", "ceil_mode",
)  # fmt: skip
WEIGHTS_ENTRIES = (  # entries of training checkpoints that may hold the weights; the first one is read
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema",
)  # fmt: skip

LOCK = threading.Lock()  # torch's safe globals belong to the whole process


class CheckpointProblem(Exception):
    """What is wrong with a checkpoint and what to do; `ffnet.checkpoints.loading` adds the name of the file."""

    def __init__(self, problem: str, remedy: str = REMEDY) -> None:
        super().__init__(f"{problem}. {remedy}")


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint file holds."""

    form: str  # "state_dict", "module", "prepared", "equalized", "safetensors" or "release"
    state_dict: dict[str, Tensor]  # contiguous tensors on the CPU
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)  # per layer of a pickled module
    names: tuple[str, ...] = ()  # Python names that the file imports
    notes: tuple[str, ...] = ()  # sentences on where the state_dict was found, and how its keys were changed

    @property
    def equalized(self) -> bool:
        """Whether batch norms are folded into the convolutions, as cross-layer equalization leaves them."""
        return not any(key.endswith(".running_var") for key in self.state_dict)


class Stub:
    """The result of calling a class or function that a file imports: it only holds what it is given."""

    name = ""
    args: tuple[Any, ...] = ()  # the first one of a traced module is its attributes
    state: Any = None

    def __new__(cls, *args: Any) -> "Stub":
        """Hold the first argument; pickles that create objects do not call `__init__`."""
        self = super().__new__(cls)
        self.args = args[:1]
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torch_zip(stream: io.BytesIO) -> CheckpointContents:
    """Read a file that torch 1.6 or later saved, and close the stream; a broken file raises errors of any type."""
    checked = io.BytesIO()
    # torch gets a copy, because its reader and zipfile may find different directories in the same bytes.
    with zipfile.ZipFile(stream) as archive, zipfile.ZipFile(checked, "w") as copy:
        records = checked_records(archive, len(stream.getbuffer()))
        names = check_pickle(io.BytesIO(archive.read(records["data.pkl"])))
        for name, info in records.items():
            copy.writestr(f"archive/{name}", archive.read(info))  # read() compares the checksum
    stream.close()
    checked.seek(0)
    return contents_of(load_restricted(checked, names), names)


def read_legacy_format(stream: io.BytesIO) -> CheckpointContents:
    """Read a state_dict that torch before 1.6 saved: four pickles, a fifth with the storages' keys, and the storages.

    A whole module in that format is refused, because torch reads it only by running its code.
    """
    head = io.BytesIO(stream.read(MAX_PICKLE))
    names = tuple(name for _ in range(5) for name in check_pickle(head))
    if not all(TORCH_NAMES.fullmatch(name) for name in names):
        raise CheckpointProblem("this file holds a whole module in the format of torch before 1.6")
    stream.seek(0)
    return contents_of(load_restricted(stream, names), names)


def checked_records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the records that torch reads in a zip of `size` bytes, by their names without the top folder."""
    infos = archive.infolist()
    records = {info.filename.partition("/")[2]: info for info in infos}
    plain = all(
        info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size and not info.flag_bits & 1
        for info in infos
    )
    if not plain or len(records) < len(infos) or sum(info.file_size for info in infos) > size:
        raise CheckpointProblem("this zip has records that are compressed, encrypted, named twice or too large")
    if "data.pkl" not in records or records["data.pkl"].file_size > MAX_PICKLE:
        raise CheckpointProblem(f"this zip has no data.pkl of at most {MAX_PICKLE} bytes")
    return {name: info for name, info in records.items() if RECORDS.fullmatch(name)}


def check_pickle(stream: io.BytesIO) -> tuple[str, ...]:
    """Check the names and tuples of the pickle at the stream's position, without loading it.

    Only the sizes of tuples are followed: Python hashes a nested tuple by recursion, which can exhaust the stack.

    Returns:
        The names that it imports. The stream's position is the end of the pickle.
    """
    names: dict[str, None] = {}
    sizes: list[int] = []  # stack of the unpickler: sizes of tuples, and 1 for other values
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            names[str(argument).replace(" ", ".", 1)] = None
        if opcode.name == "MARK":
            marks.append(len(sizes))
        elif opcode.name.endswith("BINPUT"):
            memo[argument] = sizes[-1]
        elif opcode.name.endswith("BINGET"):
            sizes.append(memo[argument])
        else:
            taken = opcode.stack_before
            after_mark = pickletools.markobject in taken
            first = marks.pop() - taken.index(pickletools.markobject) if after_mark else len(sizes) - len(taken)
            size = 1 + sum(sizes[first:]) if "TUPLE" in opcode.name else 1
            if first < 0 or size > MAX_TUPLE:
                raise CheckpointProblem("the pickle in this file is broken or nests too many tuples")
            sizes[first:] = [size] * len(opcode.stack_after)
    for name in names:
        if not STUB_NAMES.fullmatch(name) and not TORCH_NAMES.fullmatch(name):
            raise CheckpointProblem(f"this file imports {name[:200]}, which no published checkpoint does")
    return tuple(names)


def load_restricted(stream: io.BytesIO, names: tuple[str, ...]) -> Any:
    """Return the root object that torch's restricted unpickler reads, with stubs for `names`; close the stream."""
    stubs: list[Any] = [
        (type("Stub", (Stub,), {"name": name}), re.sub("^__builtin__", "builtins", name))
        for name in names
        if not TORCH_NAMES.fullmatch(name)
    ]
    with LOCK, stream:
        others = torch.serialization.get_safe_globals()
        try:
            # aimet_torch registers 83 safe globals; one of them lets a file open any path.
            torch.serialization.clear_safe_globals()
            with torch.serialization.safe_globals(stubs):
                return torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's text is long and suggests running the file's code
            reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
            raise CheckpointProblem(f"torch refuses the pickle of this file ({reason})") from error
        finally:
            torch.serialization.add_safe_globals(others)


def contents_of(root: Any, names: tuple[str, ...]) -> CheckpointContents:
    """Return the contents of a loaded file: a state_dict or a module, which may be inside a training checkpoint."""
    notes: list[str] = []
    for _ in range(3):  # training checkpoints may be nested
        entry, *others = weights_entries(root) or [""]
        if entry:
            notes.append(f"The weights are the entry {entry!r} of a training checkpoint.")
            root = root[entry]
        if others:
            notes.append(f"Not used, although they may hold weights too: {', '.join(map(repr, others))}.")
    if isinstance(root, dict):
        return CheckpointContents("state_dict", own_copies(dict.items(root)), names=names, notes=tuple(notes))
    if not isinstance(root, Stub):
        raise CheckpointProblem(f"this file holds a {type(root).__name__}, not a state_dict or a module")
    tensors: list[tuple[str, Any]] = []
    hyperparameters = {}
    for prefix, module, state in walk_modules(root):
        tensors += [(prefix + name, tensor) for name, tensor in named_tensors(module, state)]
        hyperparameters[prefix[:-1]] = {name: state[name] for name in HYPERPARAMETERS if name in state}
    contents = CheckpointContents("module", own_copies(tensors), hyperparameters, names, tuple(notes))
    prepared = "equalized" if contents.equalized else "prepared"
    return replace(contents, form=prepared if root.name == FX_MODULE else "module")


def weights_entries(root: Any) -> list[str]:
    """Return the entries of a training checkpoint that hold a state_dict or a module; none if it is not one."""
    values = root if isinstance(root, dict) else {}  # an OrderedDict from a file may have attributes of any name
    return [name for name in WEIGHTS_ENTRIES if isinstance(dict.get(values, name), (dict, Stub))]


def own_copies(tensors: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Return contiguous copies of tensors; refuse other values, and tensors that claim too much memory."""
    copies: dict[str, Tensor] = {}
    bytes_left = MAX_BYTES
    for key, tensor in tensors:
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointProblem(f"the entry {str(key)[:80]!r} is not a tensor but: {type(tensor).__name__}")
        bytes_left -= tensor.nbytes  # elements of an expanded tensor count each
        if bytes_left < 0:
            raise CheckpointProblem(f"the tensors claim more than {MAX_BYTES} bytes")
        copies[key] = tensor.detach().contiguous().clone()  # same strides of 1x1 kernels: last bits depend on them
    return copies


def walk_modules(module: Stub, prefix: str = "") -> Iterator[tuple[str, Stub, dict[Any, Any]]]:
    """Yield a module and those inside it, in torch's order: the prefix of its keys, the module and its attributes."""
    state = dict(dict.items(module.args[0] if module.name == FX_MODULE and module.args else module.state))
    yield prefix, module, state
    for name, child in members(state, "_modules"):
        yield from walk_modules(child, f"{prefix}{name}.")


def named_tensors(module: Stub, state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a module's own parameters and persistent buffers."""
    yield from members(state, "_parameters")
    not_persistent = state.get("_non_persistent_buffers_set", ())
    yield from ((name, tensor) for name, tensor in members(state, "_buffers") if name not in not_persistent)
    if module.name.endswith(".GaussianConv2D"):  # its kernel may be a plain attribute
        yield from ((name, state[name]) for name in ("weight", "bias") if isinstance(state.get(name), Tensor))


def members(state: dict[Any, Any], kind: str) -> list[tuple[str, Any]]:
    """Return the names and values in a module's dictionary `kind`, without those that are None."""
    return [(name, value) for name, value in dict.items(state.get(kind, {})) if value is not None]
