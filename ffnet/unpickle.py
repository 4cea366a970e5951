"""Reads what torch.save wrote - a state_dict or a whole pickled module - without running anything in it.

torch's own `weights_only` unpickler does the reading, and it sees only what was checked here first: a zip written anew
from the file's checked records, and in it a pickle in which every name but torch's tensor builders is replaced by that
of an inert stand-in. What comes out is plain tensors, and for a module the hyper-parameters beside them.
"""

import io
import pickle
import re
import shutil
import threading
import zipfile
from dataclasses import dataclass, field, replace

import torch

from ffnet.disarm import CONVERT, FX_MODULE, STAND_IN_NAMES, Refused, StandIn, disarm, disarm_next, quoted

MAX_BYTES = 400 * 2**20  # of a checkpoint; the largest published one has 378 MiB
MAX_RECORD = 64 * 2**20  # bytes of one storage; the largest convolution of any variant has 9 MiB
MAX_PICKLE = 2**20  # bytes; published files have at most 250 kB
MAX_RECORDS = 20_000  # of a zip
ZIP_ENTRY = b"PK\1\2"  # begins each entry of a zip's directory
MAX_MODULES = 20_000  # visited; one that has two names is visited twice
MAX_DEPTH = 32  # of modules in modules
MAX_MEMBERS = 2_000  # of one module; the flat root of a traced network has some hundred
MAX_NAME = 200  # characters of a key's part
MAX_TENSORS = 20_000
MAX_DIMS = 4  # of a tensor: what a convolution's weight has
MAX_SHARED = 2**20  # bytes that tensors may claim beyond the file's own: shared storage counts once a tensor

UNUSED_RECORDS = r"version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
OPTIONS = {  # the hyper-parameters that a state_dict does not carry
    "Conv2d": ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed"),
    "GaussianConv2D": ("stride", "groups", "padding", "dilation"),
    "BatchNorm2d": ("eps",),
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
}
LOCK = threading.Lock()  # torch's list of safe globals is one for the whole process


@dataclass(frozen=True)
class Contents:
    """What a checkpoint file holds."""

    form: str  # "state_dict", a pickled "module", one of torch.fx: "prepared" or "equalized"; "safetensors", "release"
    state: dict  # key -> tensor, contiguous, on the CPU
    options: dict = field(default_factory=dict)  # layer -> {hyper-parameter: value}, of a pickled module
    names: tuple = ()  # the Python names that the file wants to import
    code: tuple = ()  # the Python text that loading it the ordinary way would run

    @property
    def equalized(self):
        """Whether batch norms are folded into the convolutions, as cross-layer equalization leaves them."""
        return not any(key.endswith(".running_var") for key in self.state)


def read_torch_zip(stream):
    """Contents of the torch zip file in `stream`, a BytesIO, which is closed on the way; Refused says what is wrong.

    torch and zipfile raise errors of many other kinds on a broken file; the caller catches them.
    """
    check_entries(stream)
    with zipfile.ZipFile(stream) as archive:
        records = checked_records(archive, len(stream.getbuffer()))
        disarmed = disarm(archive.read(records.pop("data.pkl")))
        canonical = io.BytesIO()
        with zipfile.ZipFile(canonical, "w") as rewritten:
            rewritten.writestr("archive/data.pkl", disarmed.data)
            rewritten.writestr("archive/version", "3\n")
            for name, info in records.items():
                with archive.open(info) as source, rewritten.open(f"archive/{name}", "w") as target:
                    shutil.copyfileobj(source, target, 2**20)  # to its end: there the checksum is compared
    size = len(stream.getbuffer())
    stream.close()  # a large file would else be held three times
    canonical.seek(0)
    root = load_disarmed(canonical, disarmed.stand_ins)
    canonical.close()
    return contents(root, disarmed, size + MAX_SHARED)


def check_entries(stream):
    """Refused where a zip lists more records than any checkpoint: zipfile would hold them all. Leaves it at 0."""
    stream.seek(0)
    entries = sum(chunk.count(ZIP_ENTRY) for chunk in iter(lambda: stream.read(2**20), b""))
    stream.seek(0)
    if entries > MAX_RECORDS:
        raise Refused(f"is a zip of {entries} records; at most {MAX_RECORDS} are read")


def read_old_format(stream):
    """Contents of a state_dict in the format of torch before 1.6 in `stream`, a BytesIO, which is closed on the way.

    The file is four pickles, a fifth with the storages' keys, and the storages. torch reads whole modules of this
    format with their code only, so they are refused.
    """
    size = len(stream.getbuffer())
    head = io.BytesIO(stream.read(MAX_PICKLE))
    try:
        pickles = [disarm_next(head) for _ in range(5)]
        main = pickles[3]
        if any(STAND_IN_NAMES.fullmatch(name) for name in main.names):
            raise Refused("names classes")
    except Refused as error:
        raise Refused(f"is a whole module in the format of torch before 1.6 ({error}): {CONVERT}") from error
    if any(other.names for other in pickles if other is not main):
        raise Refused("names Python objects outside its main pickle")
    rewritten = io.BytesIO()
    rewritten.writelines(part.data for part in pickles)
    rewritten.write(stream.getbuffer()[head.tell() :])
    stream.close()
    rewritten.seek(0)
    root = load_disarmed(rewritten, main.stand_ins)
    if rewritten.read(1):
        raise Refused("has bytes behind its last storage")
    rewritten.close()
    return contents(root, main, size + MAX_SHARED)


def checked_records(archive, size):
    """{name without the top folder: ZipInfo} of `data.pkl` and the storages in a torch zip of `size` bytes."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if not infos:
        raise Refused("is an empty zip")
    if len(set(names)) < len(names):
        raise Refused("is a zip with two records of one name")
    for info in infos:
        if info.file_size > MAX_RECORD:
            raise Refused(f"has a record {quoted(info.filename)} of {info.file_size} bytes, more than any layer's")
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise Refused(
                f"has a compressed or encrypted record {quoted(info.filename)}, which torch.save never writes"
            )
    if sum(info.file_size for info in infos) > size:
        raise Refused("is a zip whose records claim more bytes than the file has")
    folder = names[0].split("/")[0] + "/"
    found = {name.removeprefix(folder): info for name, info in zip(names, infos, strict=True)}
    strange = [name for name in found if not re.fullmatch(r"data\.pkl|data/\d{1,6}|" + UNUSED_RECORDS, name)]
    if strange:
        raise Refused(f"has a record {quoted(strange[0])}, which is not of a checkpoint (TorchScript is not read)")
    if "byteorder" in found and archive.read(found["byteorder"]) != b"little":
        raise Refused("was written on a big-endian machine")
    if "data.pkl" not in found or found["data.pkl"].file_size > MAX_PICKLE:
        raise Refused(f"needs one data.pkl of at most {MAX_PICKLE} bytes")
    return {name: info for name, info in found.items() if name.startswith("data")}


def load_disarmed(stream, safe):
    """The root object of a rewritten file, by torch's weights_only path with none but our stand-ins allowed."""
    with LOCK:
        before = torch.serialization.get_safe_globals()
        try:
            # What other packages allowed has to go: one of aimet_torch's lets a file open a path of its choosing.
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(list(safe))
            return torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's text is long, and advises to run the file's code
            reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
            raise Refused(f"has a pickle that torch refuses ({reason})") from error
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def contents(root, disarmed, budget):
    """The Contents that hang from a loaded root; its tensors may claim `budget` bytes together."""
    root, state = root if disarmed.pair else (root, None)
    names = tuple(name.replace(" ", ".") for name in disarmed.names)
    budget = Budget(budget)
    if isinstance(root, dict):
        return Contents("state_dict", {text(key): budget.take(key, t) for key, t in root.items()}, names=names)
    if not isinstance(root, StandIn):
        raise Refused(f"holds no state_dict and no module but: {type(root).__name__}")
    if state is not None:
        root.__setstate__(state)
    tensors, options = walk(root, budget)
    body = module_state(root, "the file")
    code = tuple(t for t in (*root.args[1:], body.get("_code")) if isinstance(t, str))
    found = Contents("module", tensors, options, names, code)
    if root.name != FX_MODULE:
        return found
    return replace(found, form="equalized" if found.equalized else "prepared")


def text(key):
    """A key, if it is a text of sensible length."""
    if not isinstance(key, str) or len(key) > MAX_NAME:
        raise Refused(f"has a key that is no text of at most {MAX_NAME} characters: {quoted(key)}")
    return key


class Budget:
    """Takes tensors out until the bytes that the file can answer for are spent."""

    def __init__(self, count):
        self.left = count
        self.count = 0
        self.owned = set()  # addresses of the storages that a tensor taken out has for itself

    def take(self, key, tensor):
        """A plain CPU tensor as contiguous and with memory of its own; Refused where it claims what no file holds."""
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise Refused(f"has at {quoted(key)} no plain tensor but: {getattr(tensor, 'name', type(tensor).__name__)}")
        if tensor.dim() > MAX_DIMS or tensor.is_conj() or tensor.is_neg():
            raise Refused(f"has at {quoted(key)} a tensor of a kind that no checkpoint needs")
        spans = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        extent = (tensor.storage_offset() + sum(spans) + 1) * tensor.element_size()
        overlapping = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() and (overlapping or extent > tensor.untyped_storage().nbytes()):
            raise Refused(f"has at {quoted(key)} a tensor that reaches beyond its storage")
        self.count += 1
        self.left -= tensor.numel() * tensor.element_size()
        if self.left < 0 or self.count > MAX_TENSORS:
            raise Refused("has tensors that claim more bytes than the file holds, or too many of them")
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if whole and storage.data_ptr() not in self.owned:
            self.owned.add(storage.data_ptr())
            return tensor.detach()
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def module_state(module, path):
    """The dict that a pickled module's attributes are in."""
    if not isinstance(module, StandIn):
        raise Refused(f"has at {quoted(path)} no module but: {type(module).__name__}")
    state = module.args[0] if module.name == FX_MODULE and module.args else module.state
    if not isinstance(state, dict):
        raise Refused(f"has at {quoted(path)} a module without a state")
    return state


def walk(root, budget):
    """(state_dict, options) of a pickled module, in the order of torch's own state_dict."""
    tensors, options = {}, {}
    visits = 0
    pending = [("", root, 0)]
    while pending:
        path, module, depth = pending.pop()
        visits += 1
        if depth > MAX_DEPTH or visits > MAX_MODULES:
            raise Refused("has modules nested without end, or too many of them")
        state = module_state(module, path)
        for key, tensor in own_tensors(module, state):
            if path + key in tensors:
                raise Refused(f"has {quoted(path + key)} both as parameter and as buffer")
            tensors[path + key] = budget.take(path + key, tensor)
        kind = module.name.split()[-1]
        if kind in OPTIONS:
            options[path[:-1]] = {name: plain(state[name]) for name in OPTIONS[kind] if name in state}
        children = [(path + name + ".", child, depth + 1) for name, child in members(state, "_modules")]
        pending.extend(reversed(children))
    return tensors, options


def own_tensors(module, state):
    """(name, tensor) of a module's own parameters and persistent buffers."""
    yield from members(state, "_parameters")
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden.args[0] if isinstance(hidden, StandIn) and hidden.args else ()
    if not isinstance(hidden, (list, tuple)):
        raise Refused("has a set that is not made of a list")
    for name, tensor in members(state, "_buffers"):
        if name not in hidden:
            yield name, tensor
    if module.name.endswith(" GaussianConv2D"):  # its kernel may also be an attribute, neither parameter nor buffer
        yield from ((name, state[name]) for name in ("weight", "bias") if isinstance(state.get(name), torch.Tensor))


def members(state, kind):
    """(name, value) of a module's dict `kind`, without what is None."""
    held = state.get(kind, {})
    if not isinstance(held, dict) or len(held) > MAX_MEMBERS:
        raise Refused(f"has a module whose {kind} are no dict of at most {MAX_MEMBERS} members")
    for name, value in held.items():
        if "." in text(name) or not name:
            raise Refused(f"has a module with a member {quoted(name)}; names have no dot")
        if value is not None:
            yield name, value


def plain(value):
    """A hyper-parameter if it is a number, a text or a tuple of numbers; Refused else."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (bool, int, float, str)) for part in parts):
        raise Refused("has a hyper-parameter that is neither number nor text")
    return value
