"""Rewrite an exported Q/DQ graph, without changing what it computes, into nodes that Qualcomm's NPU takes.

Found by trial with onnxruntime-qnn 2.7: the NPU runs a convolution in float only if its weight and bias are plain
constants, and some chips refuse a Resize whose input and output have different scales.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def fold_float_constants(proto: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Write the weights and biases of convolutions with a float input as float constants, in place.

    Args:
        proto: the network.
        weights: quantized weights by name. ONNX rounds values halfway between two integers otherwise than AIMET, so
            that these are taken, where given, in place of what the Q/DQ nodes compute.
    """
    graph = proto.graph
    producers = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type != "Conv" or _operator(producers, node.input[0]) == "DequantizeLinear":
            continue
        for index, tensor in enumerate(node.input[1:], 1):
            if _operator(producers, tensor) == "DequantizeLinear":
                name = tensor.removesuffix("_qdq")
                value = weights[name] if name in weights else _constant_value(proto, producers, tensor)
                constant = numpy_helper.from_array(value, name)
                _remove_initializers(graph, [name])
                graph.initializer.append(constant)
                node.input[index] = name
    remove_unused(graph)


def keep_scale_in_resizes(graph: onnx.GraphProto) -> None:
    """Quantize the output of every nearest Resize with the scale of its input first, in place.

    Nearest resizing copies values, so this changes nothing; the next QuantizeLinear converts them to its own scale.
    """
    producers = {node.output[0]: node for node in graph.node}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        source = producers.get(node.input[0]) if node.op_type == "Resize" else None
        if source is None or source.op_type != "DequantizeLinear" or _mode(node) != b"nearest":
            continue
        copied, node.output[0] = node.output[0], f"{node.output[0]}_copied"
        quantized = f"{node.output[0]}_q"
        scale = source.input[1:]
        nodes.append(helper.make_node("QuantizeLinear", [node.output[0], *scale], [quantized], quantized))
        nodes.append(helper.make_node("DequantizeLinear", [quantized, *scale], [copied], f"{node.output[0]}_dq"))
    del graph.node[:]
    graph.node.extend(nodes)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants on which no output of the graph depends, in place."""
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    _remove_initializers(graph, {tensor.name for tensor in graph.initializer} - used)


def _operator(producers: dict[str, onnx.NodeProto], tensor: str) -> str | None:
    return producers[tensor].op_type if tensor in producers else None


def _mode(resize: onnx.NodeProto) -> bytes:
    """Return how a Resize interpolates; ONNX's default is nearest."""
    return next((attribute.s for attribute in resize.attribute if attribute.name == "mode"), b"nearest")


def _constant_value(proto: onnx.ModelProto, producers: dict[str, onnx.NodeProto], tensor: str) -> np.ndarray:
    """Return the value of a tensor that Q/DQ nodes compute from constants."""
    nodes: list[onnx.NodeProto] = []
    name = tensor
    while name in producers:
        nodes.insert(0, producers[name])
        name = producers[name].input[0]
    inputs = {name for node in nodes for name in node.input}
    constants = [constant for constant in proto.graph.initializer if constant.name in inputs]
    output = helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "constant", [], [output], constants)
    model = helper.make_model(graph, opset_imports=proto.opset_import)
    return ReferenceEvaluator(model).run(None, {})[0]


def _remove_initializers(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    for tensor in [tensor for tensor in graph.initializer if tensor.name in set(names)]:
        graph.initializer.remove(tensor)
