"""Rewrite a Q/DQ graph of 8-bit and 16-bit activations into layers that each read and write one bit width.

Found by trial with onnxruntime-qnn 2.7: Qualcomm's NPU runs a layer in integers only if its inputs and its output have
one type, and in some layers takes the integers of a bias to be in steps of the input's scale times the weight's scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ffnet.onnx.graph_index import GraphIndex
from ffnet.quantization.weighted_layers import WIDE_STEPS

WIDE = {"uint8": np.uint16, "int8": np.int16}  # types of 8 bits -> the types of 16 bits


def unify_bit_widths(graph: onnx.GraphProto) -> None:
    """Let each layer that has both 8-bit and 16-bit activations compute with 16 bits only, in place.

    Its 8-bit inputs are converted to 16 bits, which keeps their values. If its output has 8 bits, it is quantized to 16
    bits of the same range first. An 8-bit step has an odd number of 16-bit steps, so that rounding twice gives what
    rounding once does.
    """
    rewriter = _Rewriter(graph, GraphIndex.of(graph))
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] not in rewriter.index.constants:
            rewriter.unify(node)
    rewriter.insert_nodes()


def rescale_biases(graph: onnx.GraphProto) -> None:
    """Write the bias of every convolution in steps of the input's scale times the weight's scale, in place.

    AIMET writes other steps behind a max pool, and `unify_bit_widths` changes the scale of inputs.

    Raises:
        RuntimeError: if a bias does not fit into int32 then; `raise_weight_scales` prevents this.
    """
    index = GraphIndex.of(graph)
    for node in graph.node:
        dequantizers = [index.producers.get(name) for name in node.input] if node.op_type == "Conv" else []
        source, weight, bias = dequantizers if len(dequantizers) == 3 else (None, None, None)
        if source and weight and bias:
            _rescale_bias(node.name, bias, _scale(source, index) * _scale(weight, index), index)


def _scale(node: onnx.NodeProto, index: GraphIndex) -> np.ndarray:
    return numpy_helper.to_array(index.constants[node.input[1]]).flatten().astype(np.float64)


def _rescale_bias(layer: str, dequantizer: onnx.NodeProto, scale: np.ndarray, index: GraphIndex) -> None:
    """Give the bias that a DequantizeLinear reads another scale, unless it has that already."""
    old = _scale(dequantizer, index)
    if np.allclose(old, scale, rtol=1e-5, atol=0):
        return
    integers, scales = (index.constants[name] for name in dequantizer.input[:2])
    values = np.rint(numpy_helper.to_array(integers) * (old / scale))
    if np.abs(values).max() > np.iinfo(np.int32).max:
        raise RuntimeError(f"The bias of {layer} does not fit into int32 in steps of its input's and weight's scales.")
    integers.CopyFrom(numpy_helper.from_array(values.astype(np.int32), integers.name))
    scales.CopyFrom(numpy_helper.from_array(np.full(scales.dims, np.squeeze(scale), np.float32), scales.name))


def widen(scale: np.ndarray, zero_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point with which 16 bits cover the range of 8 bits exactly.

    Zero points are counted from the type's smallest value.
    """
    return (scale / WIDE_STEPS).astype(np.float32), zero_point.astype(np.int64) * WIDE_STEPS


@dataclass(frozen=True)
class _Rewriter:
    graph: onnx.GraphProto
    index: GraphIndex  # of the graph as it was
    before: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)  # new nodes before the one with this output
    after: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)

    def unify(self, quantizer: onnx.NodeProto) -> None:
        """Unify the layers between a quantizer of an activation and the quantizers before it."""
        inputs = list(_activation_inputs(quantizer.input[0], self.index))
        sources = [self.index.producers[node.input[i]] for node, i in inputs]
        types = {self.index.integer_type(node) for node in (quantizer, *sources)}
        if types.isdisjoint(WIDE) or types.issubset(WIDE) or not _runs_in_integers(quantizer, self.index):
            return
        for (node, i), source in zip(inputs, sources, strict=True):
            if self.index.integer_type(source) in WIDE:
                node.input[i] = self._converted(source)
        if self.index.integer_type(quantizer) in WIDE:
            tensor, quantizer.input[0] = quantizer.input[0], f"{quantizer.input[0]}_wide"
            self.before[quantizer.output[0]] = self._wide_pair(quantizer, tensor, quantizer.input[0])

    def _converted(self, source: onnx.NodeProto) -> str:
        """Return the tensor that has the values of an 8-bit DequantizeLinear in 16 bits."""
        tensor = source.output[0]
        converted = f"{tensor}_wide"
        if tensor not in self.after:
            self.after[tensor] = self._wide_pair(source, tensor, converted)
        return converted

    def _wide_pair(self, narrow: onnx.NodeProto, source: str, target: str) -> list[onnx.NodeProto]:
        """Return a Q/DQ pair of 16 bits from `source` to `target` with the range of an 8-bit Q or DQ node."""
        scale, zero_point = (self.index.constants[name] for name in narrow.input[1:3])
        wide = [f"{scale.name}_wide", f"{zero_point.name}_wide"]
        if wide[0] not in {tensor.name for tensor in self.graph.initializer}:
            offset = numpy_helper.to_array(zero_point)
            dtype = WIDE[offset.dtype.name]
            counted = offset.astype(np.int64) - np.iinfo(offset.dtype).min
            values = widen(numpy_helper.to_array(scale), counted)
            self._add_constant(wide[0], values[0])
            self._add_constant(wide[1], (values[1] + np.iinfo(dtype).min).astype(dtype))
        quantized = f"{target}_q"
        return [
            helper.make_node("QuantizeLinear", [source, *wide], [quantized], quantized),
            helper.make_node("DequantizeLinear", [quantized, *wide], [target], f"{target}_dq"),
        ]

    def _add_constant(self, name: str, value: np.ndarray) -> None:
        self.graph.initializer.append(numpy_helper.from_array(value, name))

    def insert_nodes(self) -> None:
        """Insert the new nodes into the graph."""
        nodes = []
        for node in self.graph.node:
            nodes += [*self.before.get(node.output[0], ()), node, *self.after.get(node.output[0], ())]
        del self.graph.node[:]
        self.graph.node.extend(nodes)


def _activation_inputs(tensor: str, index: GraphIndex) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Yield each node, and the position of its input, where the layers that compute a tensor read an activation."""
    node = index.producers.get(tensor)
    if node is None or node.op_type == "DequantizeLinear":
        return
    for i, name in enumerate(node.input):
        if _is_dequantized_activation(name, index):
            yield node, i
        else:
            yield from _activation_inputs(name, index)


def _is_dequantized_activation(tensor: str, index: GraphIndex) -> bool:
    """Return whether a tensor is neither in float nor a weight or a bias."""
    node = index.producers.get(tensor)
    quantizer = index.producers.get(node.input[0]) if node and node.op_type == "DequantizeLinear" else None
    return quantizer is not None and quantizer.input[0] not in index.constants


def _runs_in_integers(quantizer: onnx.NodeProto, index: GraphIndex) -> bool:
    """Return whether the layers before a quantizer have quantized weights and feed only this quantizer."""
    tensors = [quantizer.input[0]]
    while tensors:
        node = index.producers.get(tensors.pop())
        if node is None or node.op_type == "DequantizeLinear":
            continue
        if len(index.consumers_of(node)) > 1 or (node.op_type == "Conv" and node.input[1] in index.constants):
            return False
        tensors += node.input
    return True
