"""The nodes and constants of an ONNX graph by the names of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx


@dataclass(frozen=True)
class GraphIndex:
    """The nodes and constants of a graph by the names of tensors."""

    producers: Mapping[str, onnx.NodeProto]
    consumers: Mapping[str, list[onnx.NodeProto]]
    constants: Mapping[str, onnx.TensorProto]
    outputs: frozenset[str]  # of the graph

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> "GraphIndex":
        """Index a graph."""
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                consumers.setdefault(name, []).append(node)
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = node.attribute[0].t
        return cls(
            {output: node for node in graph.node for output in node.output},
            consumers,
            constants,
            frozenset(output.name for output in graph.output),
        )

    def value(self, name: str) -> np.ndarray | None:
        """Return a constant's value; None if the tensor is not a constant of this file."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == tensor.EXTERNAL:
            return None
        return onnx.numpy_helper.to_array(tensor)

    def integer_type(self, node: onnx.NodeProto) -> str:
        """Return the integer type that a QuantizeLinear or DequantizeLinear node writes or reads, such as "uint8"."""
        named = (self.constants.get(name) for name in (*node.input[2:3], node.input[0]))
        tensor = next((tensor for tensor in named if tensor is not None), None)
        output_type = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
        kind = output_type if tensor is None or tensor.data_type == onnx.TensorProto.FLOAT else tensor.data_type
        return onnx.TensorProto.DataType.Name(kind or onnx.TensorProto.UINT8).lower()

    def quantization(self, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
        """Return scale and zero point of a QuantizeLinear or DequantizeLinear; None if they are not constants."""
        scale = self.value(node.input[1])
        zero_point = self.value(node.input[2]) if node.input[2:] and node.input[2] else np.zeros((), np.int64)
        return None if scale is None or zero_point is None else (scale, zero_point.astype(np.int64))

    def consumers_of(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that take a node's first output."""
        return self.consumers.get(node.output[0], [])


def node_name(node: onnx.NodeProto) -> str:
    """Return the name of a node, or of its output if it has none."""
    return node.name or node.output[0]
