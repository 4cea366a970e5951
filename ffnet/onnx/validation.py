"""Check whether a file is an ONNX network that may be run: one image in, 19 channels out, only ONNX's own operators.

Nothing in the file is executed here; it is parsed, and the files that it refers to are looked up.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from ffnet.labels import NUM_CLASSES
from ffnet.onnx.graph_index import GraphIndex, node_name
from ffnet.onnx.quantized_values import INTEGERS, QuantizedValues, of_input, of_output
from ffnet.system.errors import UserError

MAX_BYTES = 2**30  # of a file with its external data; the largest FFNet has 0.4 GB
MAX_SIDE = 8192  # of an image
MAX_ELEMENTS = 2**30  # of one tensor inside
SHAPE_OPERATORS = ("Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity", "Transpose")  # that may follow an ArgMax
DOMAINS = ("", "ai.onnx")
# ONNX Runtime's own quantized operators, which its quantizer writes where ONNX has none.
MICROSOFT_OPERATORS = ("QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearConcat", "QLinearMul")
WRONG_FILES = {  # first bytes -> what a file that is often given by mistake is, and what to do
    b"PK": "is a zip archive, perhaps a torch checkpoint. Give that to --checkpoint.",
    b"\x80": "is a pickle, perhaps a torch checkpoint. Give that to --checkpoint.",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself. Fetch that with `git lfs pull`.",
    b"<": "is an HTML page. Check the address that it came from, and whether it requires a login.",
    b"{": "is JSON, not ONNX. Give the .onnx file.",
}
EXPORT_AGAIN = "Export the network again."
STANDARD_ONLY = "Export the network with ONNX's own operators only."


class _InvalidError(Exception):
    """What is wrong with the file and what to do; check_onnx puts "<path>: this file " before it."""


@dataclass(frozen=True)
class OnnxHeader:
    """What one must know to run an ONNX file. None in a shape: that length may vary."""

    opset: int
    input_name: str
    input_shape: tuple[int | None, ...]  # (N, 3, H, W)
    output_name: str
    output_shape: tuple[int | None, ...]  # (N, 19, h, w)
    input_values: QuantizedValues | None = None  # what the integers of the input stand for; None: it is float32
    output_values: QuantizedValues | None = None

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return images float32 in the type of the file's input."""
        return images if self.input_values is None else self.input_values.quantize(images)

    def decode(self, logits: np.ndarray) -> np.ndarray:
        """Return the file's output as float32."""
        return logits if self.output_values is None else self.output_values.dequantize(logits)


def check_onnx(path: Path | str) -> OnnxHeader:
    """Return the header of an ONNX file, or raise a UserError if it is not a network that may be run."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: this is a folder. Name the .onnx file in it.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. Check the path.")
    try:
        proto = _read(path)
        _check_operators(proto)
        _check_external_data(proto, path.parent)
        return _header(proto, path)
    except _InvalidError as error:
        raise UserError(f"{path}: this file {error}") from error


def _read(path: Path) -> onnx.ModelProto:
    """Return the content of a file without its external data."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise _InvalidError(f"has {size} bytes, and no FFNet has more than {MAX_BYTES}. Check the path.")
        data = path.read_bytes()
    except OSError as error:
        raise _InvalidError(f"can't be read ({error.strerror}). Check its permissions.") from error
    for beginning, description in WRONG_FILES.items():
        if data.startswith(beginning):
            raise _InvalidError(description)
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise _InvalidError(f"is not an ONNX file, or was cut off. {EXPORT_AGAIN}") from error
    if not proto.ir_version or not proto.graph.node:
        raise _InvalidError(f"is not an ONNX file: it holds no network. {EXPORT_AGAIN}")
    return proto


def _check_operators(proto: onnx.ModelProto) -> None:
    """Check that all operators are ONNX's, of the file's opset, or ONNX Runtime's quantized ones."""
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    version = max(versions.get(domain, 0) for domain in DOMAINS)
    newest = onnx.defs.onnx_opset_version()
    if not version:
        raise _InvalidError(f"names no opset of ONNX. {EXPORT_AGAIN}")
    if version > newest:
        raise _InvalidError(f"has opset {version}, and the installed onnx knows at most {newest}. Update onnx.")
    for node in proto.graph.node:
        if node.op_type == "EPContext":
            raise _InvalidError("was compiled for one chip and runs there only. Give the model.onnx it was made from.")
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.domain in DOMAINS:
            if not onnx.defs.has(node.op_type, version):
                raise _InvalidError(f"has the operator {name}, which is not in opset {version}. {STANDARD_ONLY}")
        elif node.domain != "com.microsoft" or node.op_type not in MICROSOFT_OPERATORS:
            raise _InvalidError(f"has the custom operator {name}. {STANDARD_ONLY}")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise _InvalidError(f"has the operator {name}, which branches or loops. Export the network without it.")
    if proto.functions:
        raise _InvalidError("holds functions of its own. Inline them with onnx.inliner.")
    if proto.graph.sparse_initializer:
        raise _InvalidError("holds sparse tensors. Export the network with dense ones.")


def _external_data(proto: onnx.ModelProto) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield name and {key: value} of every tensor whose data is in another file."""
    attributes = [attribute for node in proto.graph.node for attribute in node.attribute]
    inside = [tensor for attribute in attributes for tensor in (attribute.t, *attribute.tensors)]
    for tensor in (*proto.graph.initializer, *inside):
        if tensor.data_location == tensor.EXTERNAL:
            yield tensor.name, {entry.key: entry.value for entry in tensor.external_data}


def _check_external_data(proto: onnx.ModelProto, folder: Path) -> None:
    """Check that every file with external data is in `folder` or below it and long enough."""
    folder = folder.resolve()
    sizes = {}
    for name, entry in _external_data(proto):
        location = entry.get("location", "")
        path = (folder / location).resolve()
        stored = f"stores the tensor {name} in {location!r}"
        if not location or Path(location).is_absolute() or not path.is_relative_to(folder):
            raise _InvalidError(f"{stored}, outside its own folder. Store it beside the file.")
        if not path.is_file():
            raise _InvalidError(f"{stored}, which is missing. Put that beside the file.")
        sizes[path] = path.stat().st_size
        try:
            offset, length = (int(entry.get(key, 0)) for key in ("offset", "length"))
        except ValueError as error:
            raise _InvalidError(f"{stored}, at an offset that is not a number. {EXPORT_AGAIN}") from error
        if min(offset, length) < 0 or offset + length > sizes[path]:
            raise _InvalidError(f"{stored}, beyond the end of that file, which was cut off. {EXPORT_AGAIN}")
    if (total := sum(sizes.values())) > MAX_BYTES:
        raise _InvalidError(f"has {total} bytes of external data, and no FFNet more than {MAX_BYTES}. Check the path.")


def _header(proto: onnx.ModelProto, path: Path) -> OnnxHeader:
    """Infer the shapes of a network and return its header."""
    try:
        onnx.checker.check_model(str(path))
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise _InvalidError(f"breaks ONNX's rules ({reason}). {EXPORT_AGAIN}") from error
    _check_sizes(inferred.graph)
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    image, logits = _single(inputs, "input", 3), _single(inferred.graph.output, "output", NUM_CLASSES)
    _check_class_ids(logits, GraphIndex.of(inferred.graph))
    input_shape, output_shape = _image_shape(image, "input", 3), _image_shape(logits, "output", NUM_CLASSES)
    input_values, output_values = _quantized_values(image, logits, proto, path.parent)
    batch, _, height, width = input_shape
    if batch not in (1, None):
        raise _InvalidError(f"takes batches of {batch} images only. Export it with batch size 1 or a variable one.")
    if max(height or 0, width or 0) > MAX_SIDE:
        raise _InvalidError(f"takes images of {height}x{width}. Export it with sides of at most {MAX_SIDE}.")
    opset = next(entry.version for entry in proto.opset_import if entry.domain in DOMAINS)
    return OnnxHeader(opset, image.name, input_shape, logits.name, output_shape, input_values, output_values)


def _check_sizes(graph: onnx.GraphProto) -> None:
    """Check that no tensor inside the network is larger than MAX_ELEMENTS."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        elements = math.prod(max(dimension.dim_value, 1) for dimension in value.type.tensor_type.shape.dim)
        if elements > MAX_ELEMENTS:
            tensor = f"the tensor {value.name} of {elements} elements"
            raise _InvalidError(f"computes {tensor}; no FFNet has one as large. {EXPORT_AGAIN}")


def _single(values: Sequence[onnx.ValueInfoProto], kind: str, channels: int) -> onnx.ValueInfoProto:
    """Return the only input or output."""
    if len(values) != 1:
        raise _InvalidError(f"has {len(values)} {kind}s. Export it with one {kind} of {channels} channels.")
    return values[0]


def _check_class_ids(output: onnx.ValueInfoProto, graph: GraphIndex) -> None:
    """Check that the output is not the class per pixel."""
    node = graph.producers.get(output.name)
    while node is not None and node.op_type in SHAPE_OPERATORS:
        node = graph.producers.get(node.input[0])
    if node is not None and node.op_type == "ArgMax":
        raise _InvalidError(
            f"has the output {output.name!r} of class ids ({node_name(node)}, ArgMax). Export it without ArgMax: "
            "the evaluation needs logits, which it resizes to the labels before it chooses the class."
        )


def _image_shape(value: onnx.ValueInfoProto, kind: str, channels: int) -> tuple[int | None, ...]:
    """Return the shape of an input or output, which must be (N, channels, H, W) of float32 or quantized values."""
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    lengths_valid = all(length is None or length > 0 for length in shape)
    known_type = dtype == "FLOAT" or tensor.elem_type in INTEGERS
    if not known_type or len(shape) != 4 or shape[1] != channels or not lengths_valid:
        shown = ", ".join("?" if length is None else str(length) for length in shape)
        last = f" Its channels are last; on AI Hub, leave out --force_channel_last_{kind}." * (shape[3:] == (channels,))
        raise _InvalidError(
            f"has the {kind} {value.name!r} of {dtype} ({shown}). Export it as float32 (N, {channels}, height, width)."
            f"{last}"
        )
    return shape


def _quantized_values(
    image: onnx.ValueInfoProto, logits: onnx.ValueInfoProto, proto: onnx.ModelProto, folder: Path
) -> tuple[QuantizedValues | None, QuantizedValues | None]:
    """Return what the integers of input and output stand for; None for float32."""
    kinds = (image.type.tensor_type.elem_type, logits.type.tensor_type.elem_type)
    if not any(kind in INTEGERS for kind in kinds):
        return None, None
    onnx.external_data_helper.load_external_data_for_model(proto, str(folder))
    graph = GraphIndex.of(proto.graph)
    found: list[QuantizedValues | None] = []
    for value, kind, find, node in (
        (image, "input", of_input, "DequantizeLinear nodes read it"),
        (logits, "output", of_output, "QuantizeLinear node writes it"),
    ):
        is_integer = value.type.tensor_type.elem_type in INTEGERS
        values = find(value, graph) if is_integer else None
        if is_integer and values is None:
            raise _InvalidError(
                f"has the {kind} {value.name!r} of integers, and no {node} with one constant scale. Export it as "
                "float32."
            )
        found.append(values)
    return found[0], found[1]
