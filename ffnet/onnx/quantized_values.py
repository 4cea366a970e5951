"""Inputs and outputs of ONNX files that are integers in place of real numbers, as Qualcomm AI Hub writes them."""

from dataclasses import dataclass

import numpy as np
import onnx

from ffnet.onnx.graph_index import GraphIndex

INTEGERS = {
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT16: "uint16",
    onnx.TensorProto.INT16: "int16",
}  # that an input or output may have


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


def of_input(value: onnx.ValueInfoProto, graph: GraphIndex) -> QuantizedValues | None:
    """Return what the integers of an input stand for; None if the nodes that take it do not tell.

    They must be dequantized with one scale, or converted with Cast, so that they stand for themselves.
    """
    dtype = INTEGERS[value.type.tensor_type.elem_type]
    consumers = graph.consumers.get(value.name, [])
    if consumers and all(node.op_type == "Cast" for node in consumers):
        return QuantizedValues(dtype)
    found = {_per_tensor(node, graph, dtype) for node in consumers if node.op_type == "DequantizeLinear"}
    return found.pop() if len(found) == 1 and all(node.op_type == "DequantizeLinear" for node in consumers) else None


def of_output(value: onnx.ValueInfoProto, graph: GraphIndex) -> QuantizedValues | None:
    """Return what the integers of an output stand for; None if no QuantizeLinear with one scale writes it."""
    node = graph.producers.get(value.name)
    if node is None or node.op_type != "QuantizeLinear":
        return None
    return _per_tensor(node, graph, INTEGERS[value.type.tensor_type.elem_type])


def _per_tensor(node: onnx.NodeProto, graph: GraphIndex, dtype: str) -> QuantizedValues | None:
    quantization = graph.quantization(node)
    if quantization is None or quantization[0].size != 1:
        return None
    scale, zero_point = quantization
    return QuantizedValues(dtype, scale.item(), zero_point.item())
