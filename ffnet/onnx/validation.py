"""Check whether a file is an ONNX network that may be run: one image in, logits out, only ONNX's own operators.

Nothing in the file is executed here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from ffnet.onnx.graph import GraphIndex
from ffnet.onnx.reading import EXPORT_AGAIN, InvalidError, problems_named, read_onnx, refuse_if

MAX_ELEMENTS = 2**30  # limit on each tensor, images included
DOMAINS = ("", "ai.onnx")
# ONNX Runtime's own operators of the domain com.microsoft, which its quantizer writes where ONNX has none.
MICROSOFT_OPERATORS = ("QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearConcat", "QLinearMul")
VALUE_OPERATORS = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")  # keep the meaning of a tensor
SHAPE_OPERATORS = ("Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity", "Transpose")  # may follow an ArgMax
PROBABILITIES = ("Softmax", "Sigmoid", "HardSigmoid")
FLOATS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}  # ONNX's type -> numpy's name
INTEGERS = {getattr(onnx.TensorProto, name.upper()): name for name in ("uint8", "int8", "uint16", "int16")}
STANDARD_ONLY = "Export the network with ONNX's own operators only."


@dataclass(frozen=True)
class QuantizedValues:
    """How integers stand for real numbers: (integer - zero point) * scale."""

    dtype: str  # numpy's name of the integer type
    scale: float = 1.0
    zero_point: int = 0

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest integers of float32 values, as QuantizeLinear does."""
        limits = np.iinfo(self.dtype)
        rounded = np.rint(values / np.float32(self.scale)) + self.zero_point
        return rounded.clip(limits.min, limits.max).astype(self.dtype)

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        """Return the float32 values of integers, as DequantizeLinear does."""
        return (integers.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class OnnxHeader:
    """What one must know to run an ONNX file. A length of None in a shape may vary."""

    opset: int
    input_name: str
    input_shape: tuple[int | None, ...]  # (N, 3, H, W)
    output_name: str  # the tensor of logits
    output_shape: tuple[int | None, ...]  # (N, classes, h, w)
    input_type: str  # numpy's name
    input_values: QuantizedValues | None = None  # meaning of an input of integers; None for floats
    output_values: QuantizedValues | None = None

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return images float32 in the type of the file's input."""
        return (self.input_values.quantize(images) if self.input_values else images).astype(self.input_type, copy=False)

    def decode(self, logits: np.ndarray) -> np.ndarray:
        """Return the file's output as float32."""
        return (self.output_values.dequantize(logits) if self.output_values else logits).astype(np.float32, copy=False)


def check_onnx(path: Path | str) -> OnnxHeader:
    """Return the header of an ONNX file, or raise a UserError if it is not a network that may be run."""
    proto = read_onnx(path)
    with problems_named(Path(path)):
        return _header(proto, _check_operators(proto))


def _check_operators(proto: onnx.ModelProto) -> int:
    """Check that all operators are ONNX's, of the file's opset, or ONNX Runtime's quantized ones; return the opset."""
    version = max((entry.version for entry in proto.opset_import if entry.domain in DOMAINS), default=0)
    newest = onnx.defs.onnx_opset_version()
    refuse_if(version < 1, f"names no opset of ONNX. {EXPORT_AGAIN}")
    refuse_if(version > newest, f"has opset {version}; the installed onnx knows at most {newest}. Update onnx.")
    refuse_if(proto.functions, "holds functions of its own. Inline them with onnx.inliner.")
    attributes = [attribute for node in proto.graph.node for attribute in node.attribute]
    is_sparse = proto.graph.sparse_initializer or any(each.HasField("sparse_tensor") for each in attributes)
    refuse_if(is_sparse, "holds sparse tensors. Export the network with dense ones.")
    for node in proto.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        is_known = node.domain in DOMAINS and onnx.defs.has(node.op_type, version)
        is_quantized = node.domain == "com.microsoft" and node.op_type in MICROSOFT_OPERATORS
        is_compiled = node.op_type == "EPContext"
        branches = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        refuse_if(is_compiled, "was compiled for one chip and runs only there. Give the model.onnx it was made from.")
        is_custom = not is_known and not is_quantized
        refuse_if(is_custom, f"has the operator {name}, which is not in opset {version}. {STANDARD_ONLY}")
        refuse_if(branches, f"has the operator {name}, which branches or loops. Export the network without it.")
    return version


def _header(proto: onnx.ModelProto, opset: int) -> OnnxHeader:
    """Infer the shapes of a network and return its header.

    Only what the evaluation needs is checked: `onnx.checker` refuses files that ONNX Runtime runs.
    """
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        elements = math.prod(max(dimension.dim_value, 1) for dimension in value.type.tensor_type.shape.dim)
        computed = f"computes the tensor {value.name} of {elements} elements"
        refuse_if(elements > MAX_ELEMENTS, f"{computed}; no FFNet has one as large. {EXPORT_AGAIN}")
    index = GraphIndex.of(proto.graph)
    _check_class_ids(inferred.output, index)
    inputs = [value for value in inferred.input if value.name not in index.constants]
    image, shape = _single(inputs, "input", 3)
    logits, output_shape = _single(inferred.output, "output", None)
    is_batched = shape[0] not in (1, None)
    refuse_if(is_batched, f"takes batches of {shape[0]} images. Export it with batch size 1 or a variable one.")
    input_values = _quantized_values(image, "input", index.consumers[image.name], index)
    writer = index.producers.get(logits.name)
    output_values = _quantized_values(logits, "output", [writer] if writer else [], index)
    input_type = (FLOATS | INTEGERS)[image.type.tensor_type.elem_type]
    return OnnxHeader(opset, image.name, shape, logits.name, output_shape, input_type, input_values, output_values)


def _check_class_ids(outputs: Iterable[onnx.ValueInfoProto], index: GraphIndex) -> None:
    """Check that no output is the class per pixel."""
    for output in outputs:
        node = index.producer_behind(output.name, SHAPE_OPERATORS)
        if node is not None and node.op_type == "ArgMax":
            raise InvalidError(
                f"has the output {output.name!r} of class ids ({node.name or node.output[0]}, ArgMax). Export it "
                "without ArgMax: the evaluation needs logits, which it resizes to the labels before choosing the class."
            )


def _single(
    values: Sequence[onnx.ValueInfoProto], kind: str, channels: int | None
) -> tuple[onnx.ValueInfoProto, tuple[int | None, ...]]:
    """Return the only input or output and its shape (N, channels, H, W); it must be of floats or quantized values.

    If `channels` is None, it may have any known number of them.
    """
    wanted = channels or "classes"
    refuse_if(len(values) != 1, f"has {len(values)} {kind}s. Export it with one {kind} (N, {wanted}, height, width).")
    tensor = values[0].type.tensor_type
    dims = tensor.shape.dim
    shape = tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims)
    known_type = tensor.elem_type in FLOATS or tensor.elem_type in INTEGERS
    if not known_type or len(shape) != 4 or shape[1] != (channels or shape[1] or 0) or 0 in shape:
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
        shown = ", ".join("?" if length is None else str(length) for length in shape)
        last = f" Its channels are last; on AI Hub, leave out --force_channel_last_{kind}." * (shape[3:] == (channels,))
        raise InvalidError(
            f"has the {kind} {values[0].name!r} of {dtype} ({shown}). Export it as float32 (N, {wanted}, height, "
            f"width).{last}"
        )
    return values[0], shape


def _quantized_values(
    value: onnx.ValueInfoProto, kind: str, nodes: Sequence[onnx.NodeProto], index: GraphIndex
) -> QuantizedValues | None:
    """Return what the integers of an input or output stand for; None for floats.

    All `nodes` that read the input or write the output must have the same constant scale. An input that only Cast nodes
    read stands for itself.
    """
    operator = {"input": "DequantizeLinear", "output": "QuantizeLinear"}[kind]
    dtype = INTEGERS.get(value.type.tensor_type.elem_type)
    if dtype is None:
        return None
    if kind == "input" and {node.op_type for node in nodes} == {"Cast"}:
        return QuantizedValues(dtype)
    quantizations = [index.quantization(node) if node.op_type == operator else None for node in nodes]
    found = {
        QuantizedValues(dtype, *(array.item() for array in each))
        if each and each[0].size == each[1].size == 1 and each[0] > 0
        else None
        for each in quantizations
    }
    is_known = len(found) == 1 and None not in found
    required = f"no {operator} with one positive constant scale there"
    refuse_if(not is_known, f"has the {kind} {value.name!r} of integers, and {required}. Export it as float32.")
    return found.pop()


def describe_head(proto: onnx.ModelProto, output_name: str) -> str | None:
    """Return a note if a network returns probabilities in place of logits; None otherwise.

    A LogSoftmax needs none: it subtracts the same from all logits of a pixel, also after resizing.
    """
    node = GraphIndex.of(proto.graph).producer_behind(output_name, VALUE_OPERATORS)
    if node is None or node.op_type not in PROBABILITIES:
        return None
    return (
        f"The file returns probabilities ({node.name or node.output[0]}, {node.op_type}), which are resized to the "
        "size of the labels in place of logits. At the borders of objects this gives other predictions, and mostly a "
        "lower mIoU (2.5 percentage points in the demo). Export the network without that operator to score its logits."
    )
