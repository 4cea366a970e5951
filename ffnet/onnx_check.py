"""Whether a file is an ONNX network that may be run: one image in, 19 channels out, nothing but ONNX's own operators.

Nothing in the file is executed here; it is parsed, and what it refers to is looked up.
"""

from dataclasses import dataclass
from pathlib import Path

from ffnet.errors import UserError
from ffnet.variants import NUM_CLASSES

MAX_BYTES = 2**30  # of a file with its external data; the largest FFNet has 0.4 GB
MAX_SIDE = 8192  # of an image
MAX_ELEMENTS = 2**30  # of one tensor inside
DOMAINS = ("", "ai.onnx")
# ONNX Runtime's own quantized operators, as its quantizer writes them where ONNX has none
MICROSOFT = ("QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearConcat", "QLinearMul")
BEGINNINGS = {  # of files that are often given by mistake
    b"PK": "is a zip archive, perhaps a torch checkpoint: that is for --checkpoint",
    b"\x80": "is a pickle, perhaps a torch checkpoint: that is for --checkpoint",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`",
    b"<": "is an HTML page: the address it came from was wrong or wanted a login",
    b"{": "is JSON, not ONNX",
}


class Unfit(Exception):
    """What is wrong with the file, without its name."""


@dataclass(frozen=True)
class Header:
    """What one must know to feed an ONNX file; None in a shape where it may vary."""

    opset: int
    input_name: str
    input_shape: tuple[int | None, ...]  # (N, 3, H, W)
    output_name: str
    output_shape: tuple[int | None, ...]  # (N, 19, h, w)


def check_onnx(path):
    """The Header of an ONNX file that may be run; UserError names the file and what is wrong with it."""
    path = Path(path)
    try:
        return header(read(path), path)
    except Unfit as error:
        raise UserError(f"{path}: {error}") from error


def read(path):
    """An onnx.ModelProto without its external data; Unfit where the file is none."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise Unfit("is a folder; name the .onnx file in it" if path.is_dir() else "no such file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Unfit(f"has {path.stat().st_size} bytes; no FFNet has more than {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise Unfit(f"can't be read ({error.strerror})") from error
    for beginning, what in BEGINNINGS.items():
        if data.startswith(beginning):
            raise Unfit(what)
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise Unfit("is not an ONNX file, or was cut off") from error
    if not proto.ir_version or not proto.graph.node:
        raise Unfit("is not an ONNX file: no network is in it")
    return proto


def header(proto, path):
    """The Header of the ModelProto that was read from `path`; Unfit where it may not be run."""
    import onnx

    check_operators(proto)
    check_external_data(proto, path.parent)
    try:
        onnx.checker.check_model(str(path))
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise Unfit(f"breaks ONNX's rules: {str(error).strip().partition(chr(10))[0]}") from error
    check_sizes(inferred.graph)
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    input_name, input_shape = _only(inputs, "input", 3)
    output_name, output_shape = _only(inferred.graph.output, "output", NUM_CLASSES)
    if input_shape[0] not in (1, None):
        raise Unfit(f"takes batches of {input_shape[0]} images only; export it with batch 1 or a variable one")
    if max(length or 0 for length in input_shape) > MAX_SIDE:
        raise Unfit(f"takes images of {input_shape[2]}x{input_shape[3]}; {MAX_SIDE} is the longest side taken here")
    opset = next(entry.version for entry in proto.opset_import if entry.domain in DOMAINS)
    return Header(opset, input_name, input_shape, output_name, output_shape)


def check_operators(proto):
    """Unfit unless all operators are ONNX's of the file's opset, or ONNX Runtime's quantized ones."""
    import onnx

    versions = {entry.domain: entry.version for entry in proto.opset_import}
    version = max((versions.get(domain, 0) for domain in DOMAINS), default=0)
    if not version:
        raise Unfit("names no opset of ONNX's")
    if version > onnx.defs.onnx_opset_version():
        raise Unfit(f"is of opset {version}; this ONNX knows {onnx.defs.onnx_opset_version()} and older ones")
    for node in proto.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.domain in DOMAINS:
            if not onnx.defs.has(node.op_type, version):
                raise Unfit(f"has the operator {name}, which opset {version} of ONNX does not know")
        elif node.domain != "com.microsoft" or node.op_type not in MICROSOFT:
            raise Unfit(f"has the custom operator {name}; only ONNX's own are run")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise Unfit(f"has the operator {name}, which branches or loops; no FFNet does")
    if proto.functions:
        raise Unfit("holds functions of its own; write them out as nodes first, with onnx.inliner")
    if proto.graph.sparse_initializer:
        raise Unfit("holds sparse tensors, which no FFNet has")


def _tensors(proto):
    yield from proto.graph.initializer
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _external(proto):
    """(tensor's name, {key: value}) of every tensor whose data lies in another file."""
    for tensor in _tensors(proto):
        if tensor.data_location == tensor.EXTERNAL:
            yield tensor.name, {entry.key: entry.value for entry in tensor.external_data}


def check_external_data(proto, folder):
    """Unfit unless every file that holds tensors lies in `folder` or below and is long enough."""
    folder = folder.resolve()
    sizes = {}
    for name, entry in _external(proto):
        location = entry.get("location", "")
        path = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not path.is_relative_to(folder):
            raise Unfit(f"keeps the tensor {name} in {location!r}, outside its own folder; that is not opened")
        if not path.is_file():
            raise Unfit(f"keeps the tensor {name} in {location!r}, which is missing; put it beside the file")
        sizes[path] = path.stat().st_size
        try:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        except ValueError as error:
            raise Unfit(f"has no number as offset or length of the tensor {name}") from error
        if end > sizes[path] or min(int(entry.get("offset", 0)), int(entry.get("length", 0))) < 0:
            raise Unfit(f"keeps the tensor {name} beyond the end of {location!r}, which was cut off")
    if sum(sizes.values()) > MAX_BYTES:
        raise Unfit(f"has external data of {sum(sizes.values())} bytes; no FFNet has more than {MAX_BYTES}")


def check_sizes(graph):
    """Unfit where a tensor inside would not fit into memory."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        elements = 1
        for dimension in value.type.tensor_type.shape.dim:
            elements *= max(dimension.dim_value, 1)
        if elements > MAX_ELEMENTS:
            raise Unfit(f"computes the tensor {value.name} of {elements} elements; no FFNet has one as large")


def _only(values, what, channels):
    """(name, shape) of the one input or output, which must be float32 of (N, channels, H, W)."""
    import onnx

    if len(values) != 1:
        raise Unfit(f"has {len(values)} {what}s; one {what} of {channels} channels is what can be scored")
    (value,) = values
    tensor = value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    wanted = f"float32 (N, {channels}, height, width)"
    if kind != "FLOAT" or len(shape) != 4 or shape[1] != channels or 0 in shape or min(s or 1 for s in shape) < 0:
        shown = ", ".join("?" if length is None else str(length) for length in shape)
        raise Unfit(f"has the {what} {value.name!r} of {kind} ({shown}); it must be {wanted}")
    return value.name, shape
