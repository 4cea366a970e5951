"""Safe unpickling: read a state_dict or a whole pickled module without running anything that the file contains.

A pickle names classes and functions and calls them. Here each of them is a stub, whatever its name, which only holds
what it is given. The tensors of the weights are then built from the file's bytes; an optimizer's state is never read.
"""

import functools
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ffnet.model import PUBLISHED_CLASSES

MAX_BYTES = 400 * 2**20  # size of all tensors of the weights together; the largest published checkpoint has 378 MiB
MAX_PICKLE = 4 * 2**20  # bytes; published files have at most 250 kB, and a trainer may save its log beside the weights
MAX_NAMES = 1_000  # classes and functions that a file names, and characters of each

TUPLES = pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3  # opcodes

REMEDY = (
    "Download it again or, in the program that trained it, save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pth')."
)
SCRIPT_REMEDY = "Save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')."

LAST_WEIGHT = "head.layers.3.last_layer.3.weight"  # shape (classes, channels, k, k)

STORAGES = {  # torch's own table, as "FloatStorage": torch.float32
    f"torch.{name}": dtype for name, dtype in torch.storage._storage_type_to_dtype_map().items()
} | {"torch.storage.UntypedStorage": torch.uint8}
TENSORS = re.compile(r"torch\._utils\._rebuild_tensor(_v2)?")  # arguments: storage, offset, size, strides
PARAMETERS = re.compile(  # argument: a tensor
    r"torch\._utils\._rebuild_(parameter(_with_state)?|device_tensor_from_cpu_tensor)"
)
TENSOR_SUBCLASS = "torch._tensor._rebuild_from_type_v2"  # arguments: function, class, its arguments
DICTIONARY = "collections.OrderedDict"
FX_MODULE = "torch.fx.graph_module.reduce_graph_module"
# Layers of torch and AIMET that may be in a pickled FFNet; others could compute something else from the same weights.
LIBRARY = re.compile(r"(torch|torchvision|aimet_torch)\.")
LAYERS = re.compile(
    re.escape(FX_MODULE) + r"|torch\.nn\.modules\.(module\.Module|conv\.Conv2d|batchnorm\.(Sync)?BatchNorm\w*"
    r"|activation\.ReLU|linear\.(Identity|Linear)|container\.\w+|pooling\.MaxPool2d|(loss|dropout)\.\w+)"
    r"|torch\.(nn\.parallel\.[\w.]+|optim\.swa_utils\.AveragedModel)"
    r"|aimet_torch\.elementwise_ops\.(Add|Concat|Interpolate)"
)
HYPERPARAMETERS = (  # attributes of layers that are not in a state_dict
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "eps", "ceil_mode",
)  # fmt: skip
WEIGHTS_ENTRIES = (  # entries of training checkpoints that may hold the weights; the first one is read
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema",
)  # fmt: skip


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

    @property
    def classes(self) -> int:
        """The number of classes that the network predicts; that of published files if this is no FFNet's state_dict."""
        weight = self.state_dict.get(LAST_WEIGHT)
        return weight.shape[0] if weight is not None and weight.dim() else PUBLISHED_CLASSES


class Stub(dict[Any, Any]):
    """What a file gets for an object of any class or the result of any function: it only holds what it is given.

    It is a dictionary because files subclass OrderedDict; the items of other containers are dropped.
    """

    name = ""  # name of the class or function, set by StubUnpickler
    args: tuple[Any, ...]
    state: Any
    __slots__ = ("args", "state")
    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key of a dictionary
    __eq__ = object.__eq__

    def __new__(cls, *args: Any, **_: Any) -> "Stub":
        """Hold the first arguments; pickles that create objects do not call `__init__`."""
        self = super().__new__(cls)
        self.args, self.state = args[:4], None
        return self

    def __init__(self, *args: Any, **_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return self.name  # the items may be nested without end

    def append(self, item: Any) -> None:
        """Drop an item of a list or a deque."""


@dataclass(frozen=True)
class Storage:
    """The elements of one or more tensors, by their key in the file."""

    key: str
    dtype: torch.dtype
    nbytes: int


class Tuple(tuple[Any, ...]):
    """A tuple that is hashed by its identity: Python's hash recurses into nested tuples until the process crashes."""

    __slots__ = ()
    __hash__ = object.__hash__


def load_tuple(opcode: int, unpickler: Any) -> None:
    """Let an unpickler run an opcode that makes a tuple, and make that a Tuple."""
    pickle._Unpickler.dispatch[opcode](unpickler)
    unpickler.stack[-1] = Tuple(unpickler.stack[-1])


class StubUnpickler(pickle._Unpickler):
    """Unpickler that makes a stub of every class and function, and collects the storages.

    It is Python's own in Python: that in C reserves as much memory as a pickle claims to need.
    """

    dispatch = {
        **pickle._Unpickler.dispatch,
        **{opcode[0]: functools.partial(load_tuple, opcode[0]) for opcode in TUPLES},
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],  # the other one allocates memory first
    }

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.stubs: dict[str, type[Stub]] = {}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> type[Stub]:
        """Return the stub of a name; nothing is imported."""
        name = f"{module}.{name}"
        if len(self.stubs) > MAX_NAMES or len(name) > MAX_NAMES or not name.isprintable():
            raise CheckpointProblem("this file names too many classes and functions, or has unprintable names")
        if name not in self.stubs:
            self.stubs[name] = type("Stub", (Stub,), {"name": name, "__slots__": ()})
        return self.stubs[name]

    def persistent_load(self, pid: Any) -> Any:
        """Return a storage, or the class that torch before 1.6 saved with its source."""
        kind, stub, *rest = pid
        if kind == "module":
            return stub
        key, _, count, *view = rest
        if kind != "storage" or stub.name not in STORAGES or view not in ([], [None]):
            raise CheckpointProblem(f"this file has a storage of an unknown kind, {kind_of(stub)}")
        dtype = STORAGES[stub.name]
        return self.storages.setdefault(key, Storage(key, dtype, count * dtype.itemsize))


def read_torch_zip(file: IO[bytes], size: int) -> CheckpointContents:
    """Read a file of `size` bytes that torch 1.6 or later saved; a broken file raises errors of any type."""
    with zipfile.ZipFile(file) as archive:
        records = checked_records(archive, size)
        big_endian = "byteorder" in records and archive.open(records["byteorder"]).read(3) == b"big"

        def read(storage: Storage) -> bytes:
            info = records.get(f"data/{storage.key}")
            data = archive.read(info) if info else b""  # read() compares the checksum
            if big_endian:
                data = np.frombuffer(data, np.uint8).reshape(-1, storage.dtype.itemsize)[:, ::-1].tobytes()
            return data

        return contents_of(*unpickle(io.BytesIO(archive.read(records["data.pkl"]))), read)


def read_legacy_format(file: IO[bytes]) -> CheckpointContents:
    """Read a file that torch before 1.6 saved: four pickles, a fifth with the storages' keys, and the storages."""
    head = io.BytesIO(file.read(MAX_PICKLE))
    *_, (root, unpickler), (keys, _) = [unpickle(head) for _ in range(5)]
    starts, position = {}, head.tell()
    for key in keys:
        starts[key] = position + 8  # after the number of elements
        position = starts[key] + unpickler.storages[key].nbytes

    def read(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return contents_of(root, unpickler, read)


def checked_records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the records of a zip of `size` bytes by their names without the top folder."""
    infos = archive.infolist()
    records = {info.filename.partition("/")[2]: info for info in infos}
    if "constants.pkl" in records:
        raise CheckpointProblem("this is a TorchScript file", SCRIPT_REMEDY)
    plain = all(
        info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size and not info.flag_bits & 1
        for info in infos
    )
    if not plain or len(records) < len(infos) or sum(info.file_size for info in infos) > size:
        raise CheckpointProblem("this zip has records that are compressed, encrypted, named twice or too large")
    if "data.pkl" not in records or records["data.pkl"].file_size > MAX_PICKLE:
        raise CheckpointProblem(f"this zip has no data.pkl of at most {MAX_PICKLE} bytes")
    return records


def unpickle(stream: io.BytesIO) -> tuple[Any, StubUnpickler]:
    """Return the root object of the pickle at the stream's position, which is then its end."""
    unpickler = StubUnpickler(stream)
    return unpickler.load(), unpickler


def contents_of(root: Any, unpickler: StubUnpickler, read: Callable[[Storage], bytes]) -> CheckpointContents:
    """Return the contents of a loaded file: a state_dict or a module, which may be inside a training checkpoint."""
    notes: list[str] = []
    names = tuple(unpickler.stubs)
    for _ in range(3):  # training checkpoints may be nested
        entry, *others = weights_entries(root) or [""]
        if entry:
            notes.append(f"The weights are the entry {entry!r} of a training checkpoint.")
            root = dict(items_of(root))[entry]
        if others:
            notes.append(f"Not used, although they may hold weights too: {', '.join(map(repr, others))}.")
    if not is_module(root):
        if not (items := items_of(root)):
            raise CheckpointProblem(f"this file holds no state_dict and no module, but: {kind_of(root)}")
        return CheckpointContents("state_dict", own_copies(items, read), names=names, notes=tuple(notes))
    tensors: list[tuple[str, Any]] = []
    hyperparameters = {}
    for prefix, module, state in walk_modules(root):
        tensors += [(prefix + name, tensor) for name, tensor in named_tensors(module, state)]
        hyperparameters[prefix[:-1]] = {name: state[name] for name in HYPERPARAMETERS if name in state}
    contents = CheckpointContents("module", own_copies(tensors, read), hyperparameters, names, tuple(notes))
    prepared = "equalized" if contents.equalized else "prepared"
    return replace(contents, form=prepared if root.name == FX_MODULE else "module")


def items_of(value: Any) -> list[tuple[Any, Any]]:
    """Return the items of a dictionary, and none of other values."""
    if isinstance(value, Stub) and value.name == DICTIONARY and value.args:
        value = dict(value.args[0])  # as Python 2 pickled it
    return list(dict.items(value)) if isinstance(value, dict) else []


def is_module(value: Any) -> bool:
    """Return whether a value from a file is a module."""
    return isinstance(value, Stub) and (value.name == FX_MODULE or "_modules" in dict(items_of(value.state)))


def kind_of(value: Any) -> str:
    """Return the name of a value's type in the file."""
    return str(getattr(value, "name", type(value).__name__))[:200]


def weights_entries(root: Any) -> list[str]:
    """Return the entries of a training checkpoint that hold a state_dict or a module; none if it is not one."""
    values = dict(items_of(root))
    return [name for name in WEIGHTS_ENTRIES if is_module(values.get(name)) or items_of(values.get(name))]


def own_copies(tensors: Iterable[tuple[Any, Any]], read: Callable[[Storage], bytes]) -> dict[str, Tensor]:
    """Return contiguous copies of tensors; refuse other values, and tensors or storages that claim too much memory."""
    copies: dict[str, Tensor] = {}
    elements: dict[Storage, Tensor] = {}
    bytes_read = bytes_copied = 0
    for key, value in tensors:
        view = view_of(value)
        if not isinstance(key, str) or view is None:
            raise CheckpointProblem(f"the entry {str(key)[:80]!r} is not a tensor but: {kind_of(value)}")
        storage, offset, size, strides = view.args
        if storage not in elements:
            bytes_read += storage.nbytes
            data = bytearray(read(storage) if storage.nbytes >= 0 and bytes_read <= MAX_BYTES else b"")
            if len(data) != storage.nbytes:
                raise CheckpointProblem(f"the storage {storage.key[:80]!r} is too large or incomplete")
            dtype = storage.dtype
            elements[storage] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensor = elements[storage].as_strided(size, strides, offset)
        bytes_copied += tensor.nbytes  # elements of an expanded tensor count each
        if bytes_copied > MAX_BYTES:
            raise CheckpointProblem(f"the tensors claim more than {MAX_BYTES} bytes")
        copies[key] = tensor.contiguous().clone()  # same strides of 1x1 kernels: last bits depend on them
    return copies


def view_of(value: Any) -> Stub | None:
    """Return the call that makes a tensor of a storage, an offset, a size and strides; None if `value` is no tensor."""
    for _ in range(4):  # a parameter of a subclass is nested
        if isinstance(value, Stub) and value.name == TENSOR_SUBCLASS:
            value = value.args[0](*value.args[2])
        elif isinstance(value, Stub) and PARAMETERS.fullmatch(value.name):
            value = value.args[0]
    return value if isinstance(value, Stub) and TENSORS.fullmatch(value.name) else None


def walk_modules(module: Stub, prefix: str = "") -> Iterator[tuple[str, Stub, dict[Any, Any]]]:
    """Yield a module and those inside it, in torch's order: the prefix of its keys, the module and its attributes."""
    if not isinstance(module, Stub) or LIBRARY.match(module.name) and not LAYERS.fullmatch(module.name):
        raise CheckpointProblem(f"the layer {prefix[:-1][:80]!r} is a {kind_of(module)}, which no FFNet has")
    state = dict(items_of(module.args[0] if module.name == FX_MODULE and module.args else module.state))
    yield prefix, module, state
    for name, child in members(state, "_modules"):
        yield from walk_modules(child, f"{prefix}{name}.")


def named_tensors(module: Stub, state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a module's own parameters and persistent buffers."""
    yield from members(state, "_parameters")
    excluded = state.get("_non_persistent_buffers_set", ())
    excluded = set(*excluded.args) if isinstance(excluded, Stub) else excluded
    yield from ((name, tensor) for name, tensor in members(state, "_buffers") if name not in excluded)
    if module.name.endswith(".GaussianConv2D"):  # its kernel may be a plain attribute
        yield from ((name, state[name]) for name in ("weight", "bias") if isinstance(state.get(name), Stub))


def members(state: dict[Any, Any], kind: str) -> list[tuple[str, Any]]:
    """Return the names and values in a module's dictionary `kind`, without those that are None."""
    return [(name, value) for name, value in items_of(state.get(kind, {})) if value is not None]
