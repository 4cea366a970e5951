"""Find which convolutions of an ONNX file ONNX Runtime runs on integer kernels, and why others run in float."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from ffnet.onnx.runtime import open_session
from ffnet.onnx.validation import OnnxHeader, check_onnx

INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")
Producers = Mapping[str, onnx.NodeProto]  # tensor -> the node that computes it


@dataclass(frozen=True)
class OnnxDescription:
    """What is in an ONNX file, and how ONNX Runtime runs it here."""

    header: OnnxHeader
    quantized: bool
    convolutions: int
    integer: int  # convolutions that run on integer kernels
    floats: dict[str, str]  # convolution of a quantized file that runs in float -> the reason, a clause

    def lines(self) -> list[str]:
        """Return the description as sentences."""
        height, width = self.header.input_shape[2:]
        kind = "quantized (QDQ or integer operators)" if self.quantized else "not quantized"
        size = "any size, so images are not resized."
        if height is not None and width is not None:
            size = (
                f"{height}x{width} pixels; images of another size are resized bilinearly to it, and logits to the size "
                "of the labels."
            )
        return [
            f"The file is {kind}, of opset {self.header.opset}.",
            f"Its input {self.header.input_name!r} takes {size}",
            *self.kernel_lines(),
        ]

    def kernel_lines(self) -> list[str]:
        """Return sentences on the kernels that run the convolutions."""
        floats = [f"The convolution {name} runs in float: {reason}." for name, reason in self.floats.items()]
        return [f"Convolutions that run on integer kernels: {self.integer} of {self.convolutions}.", *floats]


def inspect_onnx(path: Path | str) -> OnnxDescription:
    """Return the description of an ONNX file, or raise a UserError if it can't be run."""
    header = check_onnx(path)
    proto = onnx.load(path)
    operators = {node.op_type for node in proto.graph.node}
    quantized = any("QuantizeLinear" in operator or operator.startswith("QLinear") for operator in operators)
    reasons = float_reasons(proto.graph)
    convolutions = [node for node in proto.graph.node if node.op_type in ("Conv", *INTEGER_CONVOLUTIONS)]
    names = [_name(node) for node in convolutions]
    for index, node in enumerate(convolutions):
        node.name = f"convolution{index}"
    integer = _integer_convolutions(path, proto)
    floats = {name: reasons.get(name, "the reason is not known") for i, name in enumerate(names) if i not in integer}
    return OnnxDescription(header, quantized, len(names), len(integer), floats if quantized else {})


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _integer_convolutions(path: Path | str, proto: onnx.ModelProto) -> set[int]:
    """Return the numbers i of the nodes named "convolution{i}" in `proto` that run on integer kernels."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, proto, optimized)
        nodes = [node for node in onnx.load(optimized).graph.node if node.op_type in INTEGER_CONVOLUTIONS]
    names = (re.match(r"convolution(\d+)(_token_\d+)?$", node.name) for node in nodes)
    return {int(name[1]) for name in names if name}


def float_reasons(graph: onnx.GraphProto) -> dict[str, str]:
    """Return {convolution: why no integer kernel takes it}, as far as the Q/DQ nodes around it tell."""
    producers = {output: node for node in graph.node for output in node.output}
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    reasons = {
        _name(node): _unquantized_reason(node, producers, graph)
        or _type_reason(node, producers, types)
        or _max_pool_reason(node, producers)
        for node in graph.node
        if node.op_type == "Conv"
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _unquantized_reason(node: onnx.NodeProto, producers: Producers, graph: onnx.GraphProto) -> str | None:
    """Return which of input, weight and output of a convolution has no Q/DQ nodes, as a clause."""
    missing = []
    for what, name in zip(("input", "weight"), node.input, strict=False):
        source = producers.get(name)
        if source is None or source.op_type != "DequantizeLinear":
            missing.append(f"{what} ({source.name or source.op_type})" if source else what)
    following = _consumers(graph, node)
    if len(following) == 1 and following[0].op_type in ("Relu", "Clip"):
        following = _consumers(graph, following[0])
    if not any(consumer.op_type == "QuantizeLinear" for consumer in following):
        missing.append("output")
    return f"its {' and '.join(missing)} {'are' if missing[1:] else 'is'} not quantized" if missing else None


def _consumers(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [consumer for consumer in graph.node if node.output[0] in consumer.input]


def _type_reason(node: onnx.NodeProto, producers: Producers, types: Mapping[str, str]) -> str | None:
    """Return for which integer type of input or weight ONNX Runtime has no kernel, as a clause."""
    found = [types.get(producers[name].input[2], "UINT8") for name in node.input[:2] if len(producers[name].input) > 2]
    others = [kind.lower() for kind in found if kind not in ("INT8", "UINT8")]
    return f"ONNX Runtime has no integer kernel for {' and '.join(others)}" if others else None


def _max_pool_reason(node: onnx.NodeProto, producers: Producers) -> str | None:
    """Return after which quantized max pool a convolution comes, as a clause."""
    name = node.input[0]
    for operator in ("DequantizeLinear", "QuantizeLinear", "MaxPool"):
        if name not in producers or producers[name].op_type != operator:
            return None
        source, name = producers[name], producers[name].input[0]
    # As of ONNX Runtime 1.32: pool and quantizers become one node, and convolutions after it stay in float.
    return f"it follows the max pool {source.name}, after which ONNX Runtime uses no integer kernel"
