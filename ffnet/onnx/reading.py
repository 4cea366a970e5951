"""Read an ONNX file and the data that it keeps in other files.

On the CPU, ONNX Runtime is given what was read here instead of a path, because it and the package onnx differ in the
links and in the order of nodes that they accept.
"""

import contextlib
import graphlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from ffnet.system.errors import UserError
from ffnet.system.files import check_plain_file

MAX_BYTES = 2**30  # limit on a file with its external data; the largest FFNet has 0.4 GB
WRONG_FILES = {  # first bytes -> what a file that is often given by mistake is, and what to do
    b"PK": "is a zip archive, perhaps a torch checkpoint. Give that to --checkpoint.",
    b"\x80": "is a pickle, perhaps a torch checkpoint. Give that to --checkpoint.",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself. Fetch that with `git lfs pull`.",
    b"<": "is an HTML page. Check the address that it came from, and whether it requires a login.",
    b"{": "is JSON, not ONNX. Give the .onnx file.",
}
EXPORT_AGAIN = "Export the network again."
COPY = "Copy the file and its data into one folder."


class InvalidError(Exception):
    """What is wrong with a file and what to do; `problems_named` puts "<path>: this file " before it."""


def refuse_if(invalid: object, problem: str) -> None:
    """Raise an InvalidError if `invalid` is true."""
    if invalid:
        raise InvalidError(problem)


@contextlib.contextmanager
def problems_named(path: Path) -> Iterator[None]:
    """Raise what is wrong with a file as a UserError that names it."""
    try:
        yield
    except InvalidError as error:
        raise UserError(f"{path}: this file {error}") from error
    except OSError as error:
        remedy = "Check the path and its permissions."
        raise UserError(f"{path}: this file can't be read ({error.strerror}). {remedy}") from error
    except (onnx.shape_inference.InferenceError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "Export the network again, and leave the files with its weights beside it."
        raise UserError(f"{path}: this file breaks ONNX's rules ({reason}). {remedy}") from error


def read_onnx(path: Path | str) -> onnx.ModelProto:
    """Return the content of a file with its external data and with its nodes in order of execution.

    Raises:
        UserError: If the file is no ONNX file or is too large, or if its data is missing or outside its folder.
    """
    path = Path(path)
    with problems_named(path):
        proto = _parse(path)
        _load_data(proto, path)
        _sort_nodes(proto.graph)
        proto.graph.ClearField("value_info")  # shapes and types inside, which changes by other tools leave outdated
    return proto


def _parse(path: Path) -> onnx.ModelProto:
    check_plain_file(path)
    size = path.stat().st_size
    refuse_if(size > MAX_BYTES, f"has {size} bytes, and no FFNet has more than {MAX_BYTES}. Check the path.")
    data = path.read_bytes()
    for beginning, description in WRONG_FILES.items():
        refuse_if(data.startswith(beginning), description)
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InvalidError(f"is not an ONNX file, or was cut off. {EXPORT_AGAIN}") from error
    refuse_if(not (proto.ir_version and proto.graph.node), f"is not an ONNX file: it holds no network. {EXPORT_AGAIN}")
    return proto


def _load_data(proto: onnx.ModelProto, path: Path) -> None:
    """Replace references to other files by the data there, in place.

    The files must be in the folder of `path` or in that of the file that it links to, after all links are resolved. In
    Hugging Face's cache both are links to the same folder.
    """
    attributes = [attribute for node in proto.graph.node for attribute in node.attribute]
    tensors = [*proto.graph.initializer, *(each for found in attributes for each in (found.t, *found.tensors))]
    allowed = MAX_BYTES - path.stat().st_size
    for tensor in filter(uses_external_data, tensors):
        info = ExternalDataInfo(tensor)
        file = _data_file(info.location, path)
        start = info.offset or 0
        size = file.stat().st_size
        length = size - start if info.length is None else info.length
        is_cut = length < 0 or start + length > size
        refuse_if(is_cut, f"keeps the tensor {tensor.name!r} in {info.location!r}, which has only {size} bytes. {COPY}")
        allowed -= length
        refuse_if(allowed < 0, f"has, with its data, more than {MAX_BYTES} bytes, and no FFNet has. Check the path.")
        with file.open("rb") as stream:
            stream.seek(start)
            tensor.raw_data = stream.read(length)
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _data_file(location: str, path: Path) -> Path:
    """Return the file, without links, in which the file at `path` keeps data."""
    folders = path.parent, path.resolve().parent
    subject = f"keeps data in {location!r}, which is"
    files = [(folder / location).resolve() for folder in folders if (folder / location).is_file()]
    refuse_if(not files, f"{subject} missing or not a regular file. {COPY}")
    inside = any(files[0].is_relative_to(folder.resolve()) for folder in folders)
    refuse_if(not inside, f"{subject} outside its folder. {COPY}")
    return files[0]


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node after those whose outputs it reads, in place; converters to float16 append nodes."""
    producers = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    sources = {i: {producers[name] for name in node.input if name in producers} for i, node in enumerate(graph.node)}
    if all(number > source for number, read in sources.items() for source in read):
        return
    try:
        nodes = [graph.node[number] for number in graphlib.TopologicalSorter(sources).static_order()]
    except graphlib.CycleError as error:
        raise InvalidError(f"has layers that depend on their own output. {EXPORT_AGAIN}") from error
    del graph.node[:]
    graph.node.extend(nodes)
