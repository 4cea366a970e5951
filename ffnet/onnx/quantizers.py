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
    rescale_biases,
    unify_bit_widths,
)
from ffnet.onnx.placement import TYPES, WEIGHTED, Encodings, Placement, bias_of, bit_width, channel_axis
from ffnet.quantization.encodings_file import Encoding

LARGEST = np.iinfo(np.int32).max
OPSET_OF_CHANNELS, OPSET_OF_ALL_TYPES = 13, 21  # the first with scales per channel, and with 4 and 16 bits


def insert_quantizers(proto: onnx.ModelProto, placement: Placement) -> onnx.ModelProto:
    """Return the network with the quantizers of `placement`, in a form that ONNX Runtime and the NPU take.

    Weights and biases are integers, biases in steps of the input's scale times the weight's. Operators with a float
    input get float weights with the quantized values: the NPU runs such a convolution only if its weight and bias are
    plain constants. Activations are unsigned integers, with the same values.

    Raises:
        RuntimeError: If a bias does not fit into int32.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    index = GraphIndex.of(graph)
    encodings = {**placement.entries, **placement.implied}
    activations = {name: entry for name, entry in encodings.items() if name not in index.constants}
    replace_nodes(graph, [node for node in graph.node if not set(node.output) & index.constants.keys()])
    del graph.initializer[:]
    graph.initializer.extend(_named(tensor, name) for name, tensor in index.constants.items())
    writer = _Writer(graph, index, encodings, activations)
    nodes = list(writer.pairs(value.name for value in graph.input))
    for node in graph.node:
        nodes += writer.constants(node)
        names = list(node.output)
        for outputs, change in ((node.input, writer.read), (node.output, writer.written)):
            outputs[:] = [change(name) for name in outputs]
        nodes += [node, *writer.pairs(names)]
    replace_nodes(graph, nodes)
    remove_unused(graph)
    keep_scale_in_resizes(graph)
    unify_bit_widths(graph)
    rescale_biases(graph)
    _choose_operators(result, placement)
    return result


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    named = onnx.TensorProto()
    named.CopyFrom(tensor)
    named.name = name
    return named


class _Writer:
    """Writes the quantizers of a graph's tensors, and renames what its nodes read and write."""

    def __init__(self, graph: onnx.GraphProto, index: GraphIndex, encodings: Encodings, activations: Encodings) -> None:
        self.graph, self.index, self.encodings, self.activations = graph, index, encodings, activations
        self.outputs = {output.name for output in graph.output}
        self.done: set[str] = set()

    def read(self, name: str) -> str:
        """Return what a node reads in place of a tensor."""
        return f"{name}_qdq" if name in self.activations and name not in self.outputs else name

    def written(self, name: str) -> str:
        """Return what a node writes in place of a tensor: outputs keep their name behind their quantizer."""
        return f"{name}_qdq" if name in self.activations and name in self.outputs else name

    def pairs(self, tensors: Iterable[str]) -> Iterator[onnx.NodeProto]:
        """Write the quantizers of activations."""
        for name in tensors:
            if name in self.activations:
                entry = self.activations[name]
                zero = np.array(-entry.qmin - entry.offsets[0], TYPES[bit_width(entry)][1])
                scale = [
                    self.add(f"{name}_scale", np.array(entry.scales[0], np.float32)),
                    self.add(f"{name}_zero_point", zero),
                ]
                yield from quantizer_pair(self.written(name), scale, self.read(name), name)

    def constants(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Quantize the constants that a node reads, and let it read these."""
        bias, is_weighted = bias_of(node), node.op_type in WEIGHTED
        floats = is_weighted and node.input[0] not in self.activations
        weight = self.encodings.get(node.input[1]) if is_weighted else None
        for position, name in enumerate(node.input):
            entry = self.encodings.get(name)
            if name not in self.index.constants or (entry is None and (name != bias or weight is None)):
                continue
            values = numpy_helper.to_array(self.index.constants[name])
            if name == bias and entry and bit_width(entry) in TYPES:
                values = _dequantized(values, entry, 0)
            axis = channel_axis(node) % values.ndim if position == 1 and is_weighted else 0
            if name == bias and weight and not floats:
                scale = np.float32(self.activations[node.input[0]].scales[0]) * np.array(weight.scales, np.float32)
                integers = _rounded(values, scale)
                if np.abs(integers).max(initial=0) <= LARGEST:
                    zero = np.zeros(scale.shape, np.int32)
                    yield from self.dequantizer(node, position, integers.astype(np.int32), scale, zero)
            elif name == bias:  # AIMET writes the bias of an operator with a float input like this
                scale = np.maximum(np.abs(values) / np.float32(LARGEST), np.finfo(np.float32).tiny)
                node.input[position] = self.add(f"{name}_rounded", _rounded(values, scale) * scale)
            elif entry and floats:
                node.input[position] = self.add(f"{name}_rounded", _dequantized(values, entry, axis))
            elif entry:
                dtype = TYPES[bit_width(entry)][0 if entry.qmin < 0 else 1]
                integers = _integers(values, entry, axis).astype(dtype)
                scale, zero = np.array(entry.scales, np.float32), -np.array(entry.offsets)
                yield from self.dequantizer(node, position, integers, scale, zero.astype(dtype), axis)

    def dequantizer(
        self,
        node: onnx.NodeProto,
        position: int,
        integers: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        axis: int = 0,
    ) -> Iterator[onnx.NodeProto]:
        """Let a node read a constant of integers through a DequantizeLinear."""
        name = node.input[position]
        target = node.input[position] = f"{name}_qdq"
        if target not in self.done:
            self.done.add(target)
            shape, axes = (scale.shape, {"axis": axis}) if scale.size > 1 else ((), {})
            arrays = {"q": integers, "scale": scale.reshape(shape), "zero_point": zero.reshape(shape)}
            inputs = [self.add(f"{name}_{suffix}", array) for suffix, array in arrays.items()]
            yield helper.make_node("DequantizeLinear", inputs, [target], f"{name}_dq", **axes)

    def add(self, name: str, array: np.ndarray) -> str:
        """Add an initializer, and return its name."""
        self.graph.initializer.append(numpy_helper.from_array(array, name))
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
