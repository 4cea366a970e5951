"""Safe unpickling: read a state_dict or a whole pickled module without running anything that the file contains.

torch's restricted unpickler (`weights_only=True`) reads the file. It is given a stub for each class or function that a
published file imports. Three checks come first, because torch has no such bounds of its own: the zip holds plain
records with correct checksums, the pickle imports only names that published files import, and its structure is one that
`torch.save` writes.
"""

import io
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

import torch
from torch import Tensor

from ffnet.checkpoints.pickle_checks import TORCH_NAMES, check_pickle
from ffnet.checkpoints.problems import DOWNLOAD_AGAIN, SAVE_AGAIN, SAVE_ALONE, CheckpointProblem, quoted

MAX_BYTES = 400 * 2**20  # of a checkpoint; the largest published one has 378 MiB
MAX_RECORD = 64 * 2**20  # bytes of one storage; the largest convolution of any variant has 9 MiB
MAX_PICKLE = 2**20  # bytes; published files have at most 250 kB
MAX_COUNT = 20_000  # of a zip's records, of modules (one that has two names counts twice), and of tensors

MAX_DEPTH = 32  # of modules in modules
MAX_MEMBERS = 2_000  # of one module; the flat root of a traced network has some hundred
MAX_NAME = 200  # characters of one name in a key
MAX_DIMS = 4  # of a tensor: a convolution's weight
MAX_SHARED = 2**20  # bytes that tensors may claim beyond the file's size: each tensor counts the storage that it shares

ZIP_ENTRY = b"PK\1\2"  # begins each entry of a zip's directory
RECORDS = re.compile(r"data\.pkl|data/\d{1,6}|version|byteorder|\.[\w/]+")  # torch needs none that begins with a dot
HYPERPARAMETERS = {  # that a state_dict does not carry
    "Conv2d": ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed"),
    "GaussianConv2D": ("stride", "groups", "padding", "dilation"),
    "BatchNorm2d": ("eps",),
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
}

WEIGHTS_ENTRIES = (  # of training checkpoints that may hold the weights; the first one is read
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema",
)  # fmt: skip
MAX_ENTRIES = 3  # training checkpoints in one another

FX_MODULE = "torch.fx.graph_module.reduce_graph_module"
LOCK = threading.Lock()  # torch's list of safe globals belongs to the whole process


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint file holds."""

    form: str  # "state_dict", "module", "prepared", "equalized", "safetensors" or "release"
    state_dict: dict[str, Tensor]  # contiguous tensors on the CPU
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)  # per layer of a pickled module
    names: tuple[str, ...] = ()  # Python names that the file imports
    code: tuple[str, ...] = ()  # Python text that loading the file without `weights_only` would run
    entry: str = ""  # of a training checkpoint, such as "state_dict", that holds the state_dict
    other_entries: tuple[str, ...] = ()  # other entries of WEIGHTS_ENTRIES; not read
    prefix: str = ""  # of wrappers, such as "module.", that was removed from every key

    @property
    def equalized(self) -> bool:
        """Whether batch norms are folded into the convolutions, as cross-layer equalization leaves them."""
        return not any(key.endswith(".running_var") for key in self.state_dict)

    def notes(self) -> list[str]:
        """Return sentences that say where in the file the state_dict was found, and how its keys were changed."""
        notes = []
        if self.entry:
            notes.append(f"The weights are the entry {self.entry!r} of a training checkpoint.")
        if self.other_entries:
            notes.append(f"Not used, although they may hold weights too: {', '.join(map(repr, self.other_entries))}.")
        if self.prefix:
            notes.append(f"The prefix {self.prefix!r}, which a wrapper adds, was removed from every key.")
        return notes


class Stub:
    """The result of calling a class or function that a file imports: it only holds what it is given."""

    __slots__ = ("args", "state")
    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Stub":
        """Hold the arguments; pickles that create objects do not call `__init__`."""
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torch_zip(stream: io.BytesIO) -> CheckpointContents:
    """Read a file that torch 1.6 or later saved, and close the stream; a broken file raises errors of any type."""
    size = len(stream.getbuffer())
    check_zip_entries(stream)
    copy = io.BytesIO()
    # torch gets a copy, because its reader and zipfile may find different directories in the same bytes.
    with zipfile.ZipFile(stream) as archive, zipfile.ZipFile(copy, "w") as checked:
        records = checked_records(archive, size)
        pickled = io.BytesIO(archive.read(records["data.pkl"]))
        for name, info in records.items():
            checked.writestr(f"archive/{name}", archive.read(info))  # read() compares the checksum
    stream.close()  # a large file would otherwise be in memory three times
    names = check_pickle(pickled)
    if pickled.read(1):
        raise CheckpointProblem("this file has bytes after the end of its pickle", DOWNLOAD_AGAIN)
    copy.seek(0)
    return contents_of(load_restricted(copy, names), names, size + MAX_SHARED)


def read_legacy_format(stream: io.BytesIO) -> CheckpointContents:
    """Read a state_dict that torch before 1.6 saved: four pickles, a fifth with the storages' keys, and the storages.

    A whole module in that format is refused, because torch reads it only by running its code.
    """
    size = len(stream.getbuffer())
    head = io.BytesIO(stream.read(MAX_PICKLE))
    try:
        names = tuple(dict.fromkeys(name for _ in range(5) for name in check_pickle(head)))
        if not all(TORCH_NAMES.fullmatch(name) for name in names):
            raise CheckpointProblem("this file imports classes")
    except CheckpointProblem as problem:
        reason = str(problem).removesuffix(f". {SAVE_AGAIN}")
        raise CheckpointProblem(f"{reason}; it may be a whole module in the format of torch before 1.6") from problem
    stream.seek(0)
    root = load_restricted(stream, names)
    if stream.read(1):
        raise CheckpointProblem("this file has bytes after its last storage", DOWNLOAD_AGAIN)
    stream.close()
    return contents_of(root, names, size + MAX_SHARED)


def check_zip_entries(stream: IO[bytes]) -> None:
    """Refuse a zip with more records than any checkpoint, before zipfile holds them all; rewind the stream."""
    stream.seek(0)
    entries = sum(chunk.count(ZIP_ENTRY) for chunk in iter(lambda: stream.read(2**20), b""))
    stream.seek(0)
    if entries > MAX_COUNT:
        raise CheckpointProblem(f"this zip has {entries} records, more than {MAX_COUNT}", DOWNLOAD_AGAIN)


def checked_records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the records that torch needs of a zip of `size` bytes, by their names without the top folder."""
    infos = archive.infolist()
    folder = infos[0].filename.split("/")[0] + "/" if infos else ""
    records = {info.filename.removeprefix(folder): info for info in infos}
    unknown = [quoted(name) for name in records if not RECORDS.fullmatch(name)]
    problems = {
        "has two records of one name": len(records) < len(infos),
        "has a record of more bytes than any layer": any(info.file_size > MAX_RECORD for info in infos),
        "has a compressed or encrypted record, which torch.save never writes": any(
            info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
            for info in infos
        ),
        "has records that claim more bytes than the file has": sum(info.file_size for info in infos) > size,
        f"has a record {', '.join(unknown[:1])}, which no checkpoint has (TorchScript is not supported)": unknown,
        f"has no data.pkl of at most {MAX_PICKLE} bytes": "data.pkl" not in records
        or records["data.pkl"].file_size > MAX_PICKLE,
    }
    for problem, found in problems.items():
        if found:
            raise CheckpointProblem(f"this zip {problem}", DOWNLOAD_AGAIN)
    return {name: info for name, info in records.items() if not name.startswith(".")}


def load_restricted(stream: io.BytesIO, names: tuple[str, ...]) -> Any:
    """Return the root object that torch's restricted unpickler reads, with a stub for each name it does not know."""
    stubs: list[Any] = [
        (type("Stub", (Stub,), {"__slots__": (), "name": name}), re.sub("^__builtin__", "builtins", name))
        for name in names
        if not TORCH_NAMES.fullmatch(name)
    ]
    with LOCK:
        others = torch.serialization.get_safe_globals()
        try:
            # aimet_torch registers 83 safe globals; one of them lets a file open any path.
            torch.serialization.clear_safe_globals()
            with torch.serialization.safe_globals(stubs):
                return torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's text is long and suggests running the file's code
            reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
            raise CheckpointProblem(f"torch refuses the pickle of this file ({reason})", DOWNLOAD_AGAIN) from error
        finally:
            torch.serialization.add_safe_globals(others)


def contents_of(root: Any, names: tuple[str, ...], max_bytes: int) -> CheckpointContents:
    """Return the contents of a loaded file, whose tensors may claim `max_bytes` together."""
    entries: list[str] = []
    others: tuple[str, ...] = ()
    while found := weights_entries(root):
        entries.append(found[0])
        others += found[1:]
        root = root[found[0]]
        if len(entries) > MAX_ENTRIES:
            raise CheckpointProblem("this file holds dictionaries that are nested too deeply", SAVE_ALONE)
    contents = contents_of_weights(root, names, max_bytes)
    return replace(contents, entry=".".join(entries), other_entries=others)


def weights_entries(root: Any) -> tuple[str, ...]:
    """Return the entries of a training checkpoint that hold a state_dict or a module; none if it is not one."""
    if not isinstance(root, dict):
        return ()
    held = dict(dict.items(root))  # an OrderedDict from a file may have attributes of any name
    return tuple(name for name in WEIGHTS_ENTRIES if isinstance(held.get(name), (dict, Stub)))


def contents_of_weights(root: Any, names: tuple[str, ...], max_bytes: int) -> CheckpointContents:
    """Return the contents of a state_dict or a pickled module."""
    tensors = TensorCollector(max_bytes)
    if isinstance(root, dict):  # dict.items, because an OrderedDict from a file may have an attribute `items`
        nested = [key for key, value in dict.items(root) if isinstance(value, dict)]
        if nested:
            raise CheckpointProblem(f"the entry {quoted(nested[0])} is a dictionary, not a tensor", SAVE_ALONE)
        for key, tensor in dict.items(root):
            tensors.add(checked_key(key), tensor)
        return CheckpointContents("state_dict", tensors.state_dict, names=names)
    if not isinstance(root, Stub):
        raise CheckpointProblem(f"this file holds a {type(root).__name__}, not a state_dict or a module")
    hyperparameters = collect_module(root, tensors)
    code = tuple(text for text in (*root.args[1:], module_state(root).get("_code")) if isinstance(text, str))
    form = "prepared" if root.name == FX_MODULE else "module"
    contents = CheckpointContents(form, tensors.state_dict, hyperparameters, names, code)
    return replace(contents, form="equalized") if form == "prepared" and contents.equalized else contents


def checked_key(key: object) -> str:
    """Return a key if it is a text of reasonable length."""
    if not isinstance(key, str) or len(key) > MAX_NAME:
        raise CheckpointProblem(f"the key {quoted(key)} is not a text of at most {MAX_NAME} characters", SAVE_ALONE)
    return key


class TensorCollector:
    """Checks tensors and gives each memory of its own, up to `max_bytes` together."""

    def __init__(self, max_bytes: int) -> None:
        self.state_dict: dict[str, Tensor] = {}
        self.bytes_left = max_bytes
        self.owned: set[int] = set()  # addresses of storages that belong to one collected tensor alone

    def add(self, key: str, tensor: Any) -> None:
        """Add a tensor; refuse one that is not a plain CPU tensor, or that is larger than its storage."""
        if key in self.state_dict:
            raise CheckpointProblem(f"{quoted(key)} is a parameter as well as a buffer")
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = getattr(tensor, "name", type(tensor).__name__)
            raise CheckpointProblem(f"the entry {quoted(key)} is not a plain tensor but: {kind}")
        if tensor.dim() > MAX_DIMS or tensor.is_conj() or tensor.is_neg():
            raise CheckpointProblem(f"the tensor {quoted(key)} is of a kind that no network needs")
        storage, axes = tensor.untyped_storage(), zip(tensor.shape, tensor.stride(), strict=True)
        extent = tensor.storage_offset() + sum((size - 1) * stride for size, stride in axes) + 1
        if tensor.numel() and extent * tensor.element_size() > storage.nbytes():
            raise CheckpointProblem(f"the tensor {quoted(key)} is larger than its storage", DOWNLOAD_AGAIN)
        self.bytes_left -= tensor.nbytes
        if self.bytes_left < 0 or len(self.state_dict) == MAX_COUNT:
            raise CheckpointProblem("the tensors claim more bytes than the file has, or are too many")
        tensor, address = tensor.detach(), storage.data_ptr()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or address in self.owned:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        else:
            self.owned.add(address)
        self.state_dict[key] = tensor


def collect_module(root: Stub, tensors: TensorCollector) -> dict[str, dict[str, Any]]:
    """Collect the tensors of a pickled module in torch's own order; return the hyperparameters per layer."""
    hyperparameters = {}
    for visited, (prefix, module, state) in enumerate(walk_modules(root)):
        if prefix.count(".") > MAX_DEPTH or visited == MAX_COUNT:
            raise CheckpointProblem("the modules are nested too deeply, or are too many")
        for name, tensor in own_tensors(module, state):
            tensors.add(prefix + name, tensor)
        wanted = HYPERPARAMETERS.get(module.name.split(".")[-1], ())
        if wanted:
            hyperparameters[prefix[:-1]] = {name: checked_value(state[name]) for name in wanted if name in state}
    return hyperparameters


def walk_modules(module: Any, prefix: str = "") -> Iterator[tuple[str, Stub, dict[Any, Any]]]:
    """Yield a module and those inside it: the prefix of its keys, the module and its attributes."""
    state = module_state(module, prefix[:-1])
    yield prefix, module, state
    for name, child in members(state, "_modules"):
        yield from walk_modules(child, f"{prefix}{name}.")


def module_state(module: Any, path: str = "") -> dict[Any, Any]:
    """Return the attributes of a pickled module."""
    if not isinstance(module, Stub):
        raise CheckpointProblem(f"the entry {quoted(path)} is not a module but: {type(module).__name__}")
    state = module.args[0] if module.name == FX_MODULE and module.args else module.state
    if not isinstance(state, dict):
        raise CheckpointProblem(f"the module {quoted(path)} has no attributes")
    return dict(dict.items(state))


def own_tensors(module: Stub, state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a module's own parameters and persistent buffers."""
    yield from members(state, "_parameters")
    not_persistent = state.get("_non_persistent_buffers_set", ())
    if not isinstance(not_persistent, (set, tuple)):
        raise CheckpointProblem("a module's _non_persistent_buffers_set is not a set")
    yield from ((name, tensor) for name, tensor in members(state, "_buffers") if name not in not_persistent)
    if module.name.endswith(".GaussianConv2D"):  # its kernel may be a plain attribute
        yield from ((name, state[name]) for name in ("weight", "bias") if isinstance(state.get(name), Tensor))


def members(state: dict[Any, Any], kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the names and values in a module's dictionary `kind`, without those that are None."""
    held = state.get(kind, {})
    if not isinstance(held, dict) or len(held) > MAX_MEMBERS:
        raise CheckpointProblem(f"a module's {kind} are not a dictionary of at most {MAX_MEMBERS} members")
    for name, value in dict.items(held):
        if not name or "." in checked_key(name):
            raise CheckpointProblem(f"a module has a member {quoted(name)}; names have no dot")
        if value is not None:
            yield name, value


def checked_value(value: Any) -> Any:
    """Return a hyperparameter if it is a number, a text or a tuple of them."""
    items = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(item, (bool, int, float, str)) for item in items):
        raise CheckpointProblem("a hyperparameter is neither a number nor a text")
    return value
