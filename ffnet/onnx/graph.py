"""Look up the nodes of an ONNX graph, and rewrite a Q/DQ graph for Qualcomm's NPU without changing what it computes.

Found by trial with onnxruntime-qnn 2.7:

- The NPU runs a convolution in float only if its weight and bias are plain constants.
- Some chips refuse a Resize whose input and output have different scales.
- A layer runs in integers only if its inputs and its output have the same type.
- In some layers the steps of a bias must be the input's scale times the weight's scale.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ffnet.quantization.weighted_layers import WIDE_STEPS

WIDE = {"uint8": np.uint16, "int8": np.int16}  # types of 8 bits -> the types of 16 bits


@dataclass(frozen=True)
class GraphIndex:
    """The nodes and constants of a graph by the names of tensors."""

    producers: Mapping[str, onnx.NodeProto]
    consumers: Mapping[str, Sequence[onnx.NodeProto]]  # empty for a tensor that no node reads
    constants: Mapping[str, onnx.TensorProto]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> "GraphIndex":
        """Index a graph."""
        consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                consumers[name].append(node)
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = node.attribute[0].t
        return cls({output: node for node in graph.node for output in node.output}, consumers, constants)

    def operator(self, tensor: str) -> str:
        """Return the operator that computes a tensor; empty for inputs and initializers."""
        return self.producers[tensor].op_type if tensor in self.producers else ""

    def producer_behind(self, tensor: str, skipped: Collection[str]) -> onnx.NodeProto | None:
        """Return the last node before a tensor that has none of the `skipped` operators; None if there is none."""
        node = self.producers.get(tensor)
        while node is not None and node.op_type in skipped:
            node = self.producers.get(node.input[0])
        return node

    def integer_type(self, node: onnx.NodeProto) -> str:
        """Return the integer type of the zero point of a QuantizeLinear or DequantizeLinear, such as "uint8"."""
        return onnx.TensorProto.DataType.Name(self.constants[node.input[2]].data_type).lower()

    def quantization(self, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
        """Return scale and zero point of a QuantizeLinear or DequantizeLinear; None if they are not constants."""
        names = [name for name in node.input[1:3] if name]
        if not self.constants.keys() >= set(names):
            return None
        scale, *zero_point = (numpy_helper.to_array(self.constants[name]) for name in names)
        return scale, np.asarray(zero_point[0] if zero_point else 0, np.int64)


def keep_scale_in_resizes(graph: onnx.GraphProto) -> None:
    """Quantize the output of every nearest Resize with the scale of its input first, in place.

    Nearest resizing copies values, so this changes nothing; the next QuantizeLinear converts them to its own scale.
    """
    index = GraphIndex.of(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        modes = {attribute.s for attribute in node.attribute if attribute.name == "mode"}  # ONNX's default is nearest
        if node.op_type != "Resize" or index.operator(node.input[0]) != "DequantizeLinear" or modes - {b"nearest"}:
            continue
        source = index.producers[node.input[0]]
        result, node.output[0] = node.output[0], f"{node.output[0]}_copied"
        nodes += quantizer_pair(node.output[0], source.input[1:], result, node.output[0])
    replace_nodes(graph, nodes)


def quantizer_pair(source: str, scale: Sequence[str], target: str, name: str) -> list[onnx.NodeProto]:
    """Return a QuantizeLinear and a DequantizeLinear from one tensor to another; `scale`: names of its constants."""
    return [
        helper.make_node("QuantizeLinear", [source, *scale], [f"{name}_q"], f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *scale], [target], f"{name}_dq"),
    ]


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants on which no output of the graph depends, in place."""
    used = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            nodes.append(node)
            used.update(node.input)
    replace_nodes(graph, list(reversed(nodes)))
    _remove_initializers(graph, {tensor.name for tensor in graph.initializer} - used)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace all nodes of a graph, in place."""
    del graph.node[:]
    graph.node.extend(nodes)


def _remove_initializers(graph: onnx.GraphProto, names: Collection[str]) -> None:
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names]:
        graph.initializer.remove(tensor)


def widen(scale: np.ndarray, zero_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point with which 16 bits cover the range of 8 bits exactly.

    Zero points are counted from the type's smallest value.
    """
    return (scale / WIDE_STEPS).astype(np.float32), zero_point.astype(np.int64) * WIDE_STEPS


def unify_bit_widths(graph: onnx.GraphProto, floats: Collection[str] = ()) -> None:
    """Let each layer that has both 8-bit and 16-bit activations compute with 16 bits only, in place.

    The quantizers of the graph are those of activations. `floats` names the outputs of layers that compute in float.

    Its 8-bit inputs are converted to 16 bits, which keeps their values. If its output has 8 bits, it is quantized to 16
    bits of the same range first. An 8-bit step has an odd number of 16-bit steps, so that rounding twice gives what
    rounding once does.
    """
    index = GraphIndex.of(graph)
    before: dict[str, list[onnx.NodeProto]] = {}  # new nodes before the one with this output
    after: dict[str, list[onnx.NodeProto]] = {}
    for quantizer in graph.node:
        if quantizer.op_type != "QuantizeLinear":
            continue
        inputs = list(_activation_inputs(quantizer.input[0], index))
        sources = [index.producers[node.input[i]] for node, i in inputs]
        types = {index.integer_type(node) for node in (quantizer, *sources)}
        if types.isdisjoint(WIDE) or types.issubset(WIDE) or not _runs_in_integers(quantizer, index, floats):
            continue
        for (node, i), source in zip(inputs, sources, strict=True):
            if index.integer_type(source) in WIDE:
                tensor, node.input[i] = node.input[i], f"{node.input[i]}_wide"
                after[tensor] = _wide_pair(source, tensor, node.input[i], graph, index)
        if index.integer_type(quantizer) in WIDE:
            tensor, quantizer.input[0] = quantizer.input[0], f"{quantizer.input[0]}_wide"
            before[quantizer.output[0]] = _wide_pair(quantizer, tensor, quantizer.input[0], graph, index)
    nodes = [[*before.get(node.output[0], ()), node, *after.get(node.output[0], ())] for node in graph.node]
    replace_nodes(graph, list(itertools.chain.from_iterable(nodes)))


def _wide_pair(
    narrow: onnx.NodeProto, source: str, target: str, graph: onnx.GraphProto, index: GraphIndex
) -> list[onnx.NodeProto]:
    """Return a Q/DQ pair of 16 bits from `source` to `target` with the range of an 8-bit Q or DQ node."""
    scale, zero_point = (index.constants[name] for name in narrow.input[1:3])
    wide = [f"{scale.name}_wide", f"{zero_point.name}_wide"]
    if wide[0] not in {tensor.name for tensor in graph.initializer}:
        offset = numpy_helper.to_array(zero_point)
        dtype = WIDE[offset.dtype.name]
        counted = offset.astype(np.int64) - np.iinfo(offset.dtype).min
        wide_scale, counted = widen(numpy_helper.to_array(scale), counted)
        wide_offset = (counted + np.iinfo(dtype).min).astype(dtype)
        graph.initializer.append(numpy_helper.from_array(wide_scale, wide[0]))
        graph.initializer.append(numpy_helper.from_array(wide_offset, wide[1]))
    return quantizer_pair(source, wide, target, target)


def _activation_inputs(tensor: str, index: GraphIndex) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Yield each node, and the position of its input, where the layers that compute a tensor read an activation."""
    node = index.producers.get(tensor)
    if node is None or node.op_type == "DequantizeLinear":
        return
    for i, name in enumerate(node.input):
        if index.operator(name) == "DequantizeLinear":
            yield node, i
        else:
            yield from _activation_inputs(name, index)


def _runs_in_integers(quantizer: onnx.NodeProto, index: GraphIndex, floats: Collection[str]) -> bool:
    """Return whether the layers before a quantizer compute in integers and feed only this quantizer."""
    tensors = [quantizer.input[0]]
    while tensors:
        node = index.producers.get(tensors.pop())
        if node is None or node.op_type == "DequantizeLinear":
            continue
        if len(index.consumers[node.output[0]]) > 1 or node.output[0] in floats:
            return False
        tensors += node.input
    return True
