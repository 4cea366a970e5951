"""What an ONNX file does to its image before the first layer, as far as it is a scale and an offset per channel."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from ffnet.onnx.graph_index import GraphIndex, node_name

MAX_OPERATIONS = 24  # that are followed from the input on
UNCHANGED = ("Identity", "Dropout", "Cast")


@dataclass(frozen=True)
class FirstOperations:
    """A scale and an offset per channel of the input, in the input's order."""

    scale: np.ndarray = field(default_factory=lambda: np.ones(3))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    nodes: tuple[str, ...] = ()  # names of the nodes that compute them
    reversed_by: str | None = None  # name of the node that reverses the channels
    quantized_range: tuple[float, float] | None = None  # least and largest value of the input's quantizer


@dataclass(frozen=True)
class _Step:
    """A tensor on the way: FirstOperations so far, their channels in the tensor's order."""

    tensor: str
    operations: FirstOperations
    order: tuple[int, ...] = (0, 1, 2)  # the input's channel for each channel of the tensor


def first_operations(proto: onnx.ModelProto, input_name: str) -> FirstOperations:
    """Return the first operations on an input (N, 3, H, W); `proto` holds its external data."""
    graph = GraphIndex.of(proto.graph)
    step = _Step(input_name, FirstOperations())
    for _ in range(MAX_OPERATIONS):
        consumers = [node for node in graph.consumers.get(step.tensor, []) if node.op_type != "Shape"]
        if len(consumers) != 1:
            break
        (node,) = consumers
        following = STEPS.get(node.op_type, _stop)(step, node, graph)
        if following is None:
            break
        step = replace(following, tensor=node.output[0])
    back = np.argsort(step.order)
    operations = step.operations
    return replace(operations, scale=operations.scale[back], offset=operations.offset[back])


def _stop(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    return None


def _same(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    return step


def _quantizer(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    """Note the range of the first quantizer if it is the input's own."""
    operations, quantization = step.operations, graph.quantization(node)
    if operations.quantized_range or operations.nodes or quantization is None or quantization[0].size != 1:
        return step
    kind = graph.integer_type(node)
    if kind not in ("int8", "uint8", "int16", "uint16"):
        return step
    scale, zero_point = (value.item() for value in quantization)
    limits = np.iinfo(kind)
    low, high = ((limit - zero_point) * scale for limit in (limits.min, limits.max))
    return replace(step, operations=replace(operations, quantized_range=(low, high)))


def _affine(step: _Step, node: onnx.NodeProto, scale: np.ndarray, offset: np.ndarray) -> _Step:
    """Return the step after value * scale + offset per channel of the tensor."""
    before = step.operations
    after = replace(
        before,
        scale=before.scale * scale,
        offset=before.offset * scale + offset,
        nodes=(*before.nodes, node_name(node)),
    )
    return replace(step, operations=after)


def _arithmetic(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    """Add, Sub, Mul or Div with a constant."""
    image_first = node.input[0] == step.tensor
    value = _per_channel(_constant(node.input[1 if image_first else 0], graph))
    if value is None:
        return None
    one, zero = np.ones(3), np.zeros(3)
    if node.op_type == "Mul":
        return _affine(step, node, value, zero)
    if node.op_type == "Add":
        return _affine(step, node, one, value)
    if node.op_type == "Sub":
        return _affine(step, node, one, -value) if image_first else _affine(step, node, -one, value)
    return _affine(step, node, 1 / value, zero) if image_first and np.all(value) else None


def _constant(name: str, graph: GraphIndex) -> np.ndarray | None:
    """Return a constant, also one that is quantized; None if the tensor is none."""
    value, node = graph.value(name), graph.producers.get(name)
    if value is not None or node is None:
        return value
    if node.op_type in ("QuantizeLinear", "Identity"):
        return _constant(node.input[0], graph)
    if node.op_type != "DequantizeLinear":
        return None
    integers, quantization = graph.value(node.input[0]), graph.quantization(node)
    if integers is None:
        return _constant(node.input[0], graph)
    if quantization is None or quantization[0].size != 1:
        return None
    scale, zero_point = quantization
    return (integers.astype(np.float64) - zero_point) * scale


def _per_channel(value: np.ndarray | None) -> np.ndarray | None:
    """Return a constant that is broadcast to (N, 3, H, W) as three values; None if it is not one per channel."""
    if value is None or not np.issubdtype(value.dtype, np.floating):
        return None
    if value.size == 1:
        return np.full(3, value.item(), np.float64)
    is_channels = value.ndim in (3, 4) and value.shape[-3:] == (3, 1, 1) and value.size == 3
    return value.astype(np.float64).reshape(3) if is_channels else None


def _batch_norm(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    values = [graph.value(name) for name in node.input[1:5]]
    if any(value is None or value.size != 3 for value in values):
        return None
    weight, bias, mean, variance = (np.asarray(value, np.float64) for value in values)
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    scale = weight / np.sqrt(variance + epsilon)
    return _affine(step, node, scale, bias - mean * scale)


def _convolution(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    """A 1x1 convolution of each channel with itself."""
    weight = _constant(node.input[1], graph)
    bias = _constant(node.input[2], graph) if node.input[2:] else np.zeros(3)
    if weight is None or bias is None or weight.shape != (3, 1, 1, 1):
        return None
    return _affine(step, node, weight.astype(np.float64).reshape(3), bias.astype(np.float64))


def _reverse(step: _Step, node: onnx.NodeProto) -> _Step:
    """Return the step after the channels were reversed."""
    before = step.operations
    after = replace(
        before,
        scale=before.scale[::-1],
        offset=before.offset[::-1],
        reversed_by=None if before.reversed_by else node_name(node),
    )
    return replace(step, operations=after, order=step.order[::-1])


def _gather(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    indices = graph.value(node.input[1])
    if axis not in (1, -3) or indices is None:
        return None
    return {(2, 1, 0): _reverse(step, node), (0, 1, 2): step}.get(tuple(indices.flatten() % 3))


def _slice(step: _Step, node: onnx.NodeProto, graph: GraphIndex) -> _Step | None:
    starts, ends, axes, steps = [graph.value(name) for name in node.input[1:5]] if len(node.input) == 5 else [None] * 4
    if starts is None or ends is None or axes is None or steps is None:
        return None
    whole = starts.tolist() in ([-1], [2]) and ends.item() < -3 if ends.size == 1 else False
    return _reverse(step, node) if whole and axes.tolist() in ([1], [-3]) and steps.tolist() == [-1] else None


STEPS: dict[str, Callable[[_Step, onnx.NodeProto, GraphIndex], _Step | None]] = {
    **dict.fromkeys(UNCHANGED, _same),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantizer),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "BatchNormalization": _batch_norm,
    "Conv": _convolution,
    "Gather": _gather,
    "Slice": _slice,
}
