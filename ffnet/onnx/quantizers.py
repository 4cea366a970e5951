"""Put Q/DQ nodes into a float ONNX network where an encodings file says."""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ffnet.onnx.graph import (
    GraphIndex,
    keep_scale_in_resizes,
    quantizer_pair,
    remove_unused,
    replace_nodes,
    unify_bit_widths,
)
from ffnet.onnx.placement import TYPES, WEIGHTED, Encodings, Placement, bias_of, bit_width, channel_axis
from ffnet.quantization.encodings_file import Encoding

LARGEST = np.iinfo(np.int32).max
OPSET_OF_CHANNELS, OPSET_OF_ALL_TYPES = 13, 21  # the first with scales per channel, and with 4 and 16 bits


def insert_quantizers(proto: onnx.ModelProto, placement: Placement) -> onnx.ModelProto:
    """Return the network with the quantizers of `placement`, in a form that ONNX Runtime and the NPU take.

    Weights and biases are integers, biases in steps of the input's scale times the weight's, or in float if they would
    not fit. Operators with a float input get float weights with the quantized values: the NPU runs such a convolution
    only if its weight and bias are plain constants. Activations are unsigned integers, with the same values.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    constants = GraphIndex.of(graph).constants
    replace_nodes(graph, [node for node in graph.node if not set(node.output) & constants.keys()])
    del graph.initializer[:]
    graph.initializer.extend(_named(tensor, name) for name, tensor in constants.items())
    encodings = {**placement.entries, **placement.implied}
    _quantize_activations(graph, {name: entry for name, entry in encodings.items() if name not in constants})
    keep_scale_in_resizes(graph)
    index = GraphIndex.of(graph)
    unify_bit_widths(graph, {node.output[0] for node in graph.node if _computes_in_float(node, index, encodings)})
    _quantize_constants(graph, encodings)
    remove_unused(graph)
    _choose_operators(result, placement)
    return result


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    named = onnx.TensorProto()
    named.CopyFrom(tensor)
    named.name = name
    return named


def _quantize_activations(graph: onnx.GraphProto, encodings: Encodings) -> None:
    """Put a Q/DQ pair behind every tensor with an encoding, in place; the network's outputs keep their names."""
    outputs = {output.name for output in graph.output}

    def pairs(tensors: Iterable[str]) -> Iterator[onnx.NodeProto]:
        for name in tensors:
            if entry := encodings.get(name):
                zero = np.array(-entry.qmin - entry.offsets[0], TYPES[bit_width(entry)][1])
                arrays = {"scale": np.array(entry.scales[0], np.float32), "zero_point": zero}
                scale = [_add(graph, f"{name}_{suffix}", array) for suffix, array in arrays.items()]
                ends = (f"{name}_qdq", name) if name in outputs else (name, f"{name}_qdq")
                yield from quantizer_pair(ends[0], scale, ends[1], name)

    nodes = list(pairs(value.name for value in graph.input))
    for node in graph.node:
        names = list(node.output)
        node.input[:] = [f"{name}_qdq" if name in encodings and name not in outputs else name for name in node.input]
        node.output[:] = [f"{name}_qdq" if name in encodings and name in outputs else name for name in names]
        nodes += [node, *pairs(names)]
    replace_nodes(graph, nodes)


def _computes_in_float(node: onnx.NodeProto, index: GraphIndex, encodings: Encodings) -> bool:
    """Return whether a node has weights, and these or its input stay in float."""
    is_weighted = node.op_type in WEIGHTED and node.input[1] in index.constants
    return is_weighted and not (node.input[1] in encodings and index.operator(node.input[0]) == "DequantizeLinear")


def _quantize_constants(graph: onnx.GraphProto, encodings: Encodings) -> None:
    """Quantize the weights and biases that have an encoding, and the biases of quantized weights, in place."""
    index, nodes, done = GraphIndex.of(graph), [], set[str]()
    for node in graph.node:
        is_weighted = node.op_type in WEIGHTED
        source = index.producers.get(node.input[0]) if is_weighted else None
        step = index.quantization(source) if source and source.op_type == "DequantizeLinear" else None
        weight = encodings.get(node.input[1]) if is_weighted else None
        bias = bias_of(node) if weight else None
        for position, name in enumerate(node.input):
            entry = encodings.get(name)
            if name not in index.constants or not (entry or name == bias):
                continue
            values = numpy_helper.to_array(index.constants[name])
            axis = channel_axis(node) % values.ndim if is_weighted and position == 1 else 0
            rounded = _dequantized(values, entry, axis) if entry and bit_width(entry) in TYPES else values
            if name == bias and weight and step:
                quantized = _quantized_bias(rounded, step[0] * np.array(weight.scales, np.float32))
            elif name == bias:  # AIMET writes the bias of an operator with a float input like this
                scale = np.maximum(np.abs(rounded) / np.float32(LARGEST), np.finfo(np.float32).tiny)
                rounded, quantized = _rounded(rounded, scale) * scale, None
            else:
                quantized = _quantized(values, entry, axis) if entry and not (is_weighted and step is None) else None
            node.input[position] = f"{name}_rounded" if quantized is None else f"{name}_qdq"
            if quantized is None and node.input[position] not in done:
                _add(graph, f"{name}_rounded", rounded)
            elif quantized and node.input[position] not in done:
                nodes.append(_dequantizer(graph, name, quantized, axis))
            done.add(node.input[position])
        nodes.append(node)
    replace_nodes(graph, nodes)


def _quantized_bias(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return a bias as integers, their scales and zero points; None if it does not fit into int32."""
    integers = _rounded(values, scale)
    if np.abs(integers).max(initial=0) > LARGEST:
        return None
    return integers.astype(np.int32), scale, np.zeros(scale.shape, np.int32)


def _quantized(values: np.ndarray, entry: Encoding, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a constant as integers, their scales and zero points."""
    dtype = TYPES[bit_width(entry)][0 if entry.qmin < 0 else 1]
    integers = _integers(values, entry, axis).astype(dtype)
    return integers, np.array(entry.scales, np.float32), (-np.array(entry.offsets)).astype(dtype)


def _dequantizer(
    graph: onnx.GraphProto, name: str, quantized: tuple[np.ndarray, np.ndarray, np.ndarray], axis: int
) -> onnx.NodeProto:
    """Add the constants of a quantized constant, and return the node that dequantizes it."""
    shape, axes = (quantized[1].shape, {"axis": axis}) if quantized[1].size > 1 else ((), {})
    arrays = quantized[0], quantized[1].reshape(shape), quantized[2].reshape(shape)
    names = (f"{name}_{suffix}" for suffix in ("q", "scale", "zero_point"))
    inputs = [_add(graph, each, array) for each, array in zip(names, arrays, strict=True)]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}_qdq"], f"{name}_dq", **axes)


def _add(graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
    """Add an initializer, and return its name."""
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _integers(values: np.ndarray, entry: Encoding, axis: int) -> np.ndarray:
    scale, offset = (_along(np.array(each), values, axis) for each in (entry.scales, entry.offsets))
    return np.clip(_rounded(values, scale.astype(np.float32)) - offset, entry.qmin, entry.qmax)


def _rounded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return values in steps of `scale`, rounded as AIMET does: another order of operations moves some by a step."""
    return np.rint(values * (np.float32(1) / scale))


def _dequantized(values: np.ndarray, entry: Encoding, axis: int) -> np.ndarray:
    scale, offset = (_along(np.array(each), values, axis) for each in (entry.scales, entry.offsets))
    return ((_integers(values, entry, axis) + offset) * scale.astype(np.float32)).astype(np.float32)


def _along(channels: np.ndarray, values: np.ndarray, axis: int) -> np.ndarray:
    """Return one value per channel in a shape that can be computed with `values`."""
    return channels.reshape([-1 if i == axis else 1 for i in range(values.ndim)])


def _choose_operators(proto: onnx.ModelProto, placement: Placement) -> None:
    """Use ONNX Runtime's own Q/DQ operators where the file's opset lacks the types, in place."""
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    is_wide = any(bit_width(entry) != 8 for entry in placement.entries.values() if bit_width(entry) in TYPES)
    if opset >= (OPSET_OF_ALL_TYPES if is_wide else OPSET_OF_CHANNELS):
        return
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = "com.microsoft"
    if not any(entry.domain == "com.microsoft" for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
