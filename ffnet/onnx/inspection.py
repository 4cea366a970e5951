"""Tell which convolutions of an ONNX file ONNX Runtime runs on integer kernels, and why others run in float."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from ffnet.onnx.runtime import open_session
from ffnet.onnx.validation import OnnxHeader, check_onnx

CONVOLUTIONS = ("Conv", "QLinearConv", "ConvInteger")
INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")  # in the graph that ONNX Runtime really runs
Producers = Mapping[str, onnx.NodeProto]  # tensor -> the node that computes it


@dataclass(frozen=True)
class OnnxFacts:
    """What is in an ONNX file, and how ONNX Runtime runs it here."""

    header: OnnxHeader
    quantized: bool
    convolutions: int
    integer: int  # convolutions that run on integer kernels
    floats: dict[str, str]  # convolution of a quantized file that runs in float -> the reason, a clause

    def lines(self) -> Iterator[str]:
        """Yield the facts as sentences."""
        height, width = self.header.input_shape[2:]
        kind = "quantized (QDQ or integer operators)" if self.quantized else "not quantized"
        yield f"The file is {kind}, of opset {self.header.opset}."
        if height is None or width is None:
            yield f"Its input {self.header.input_name!r} takes any size, so images are not resized."
        else:
            yield (
                f"Its input {self.header.input_name!r} takes {height}x{width} pixels; images of another size are "
                "resized bilinearly to it, and logits to the size of the labels."
            )
        yield f"Convolutions that run on integer kernels: {self.integer} of {self.convolutions}."
        for name, reason in self.floats.items():
            yield f"The convolution {name} runs in float: {reason}."


def inspect_onnx(path: Path | str) -> OnnxFacts:
    """Return the facts of an ONNX file.

    Raises:
        UserError: if the file can't be run.
    """
    header = check_onnx(path)
    proto = onnx.load(path)
    operators = {node.op_type for node in proto.graph.node}
    quantized = any("QuantizeLinear" in operator or operator.startswith("QLinear") for operator in operators)
    reasons = float_reasons(proto.graph)
    names = [node.name or node.output[0] for node in proto.graph.node if node.op_type in CONVOLUTIONS]
    integer = integer_convolutions(path, proto)
    floats = {
        name: reasons.get(name, "the reason is not known") for index, name in enumerate(names) if index not in integer
    }
    return OnnxFacts(header, quantized, len(names), len(integer), floats if quantized else {})


def integer_convolutions(path: Path | str, proto: onnx.ModelProto) -> set[int]:
    """Return the indices of the convolutions that run on integer kernels; `proto`, the file's content, is changed."""
    for index, node in enumerate(node for node in proto.graph.node if node.op_type in CONVOLUTIONS):
        node.name = f"convolution{index}"
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, proto, optimized)
        nodes = [node for node in onnx.load(optimized).graph.node if node.op_type in INTEGER_CONVOLUTIONS]
    names = (re.match(r"convolution(\d+)(_token_\d+)?$", node.name) for node in nodes)
    return {int(name[1]) for name in names if name}


def float_reasons(graph: onnx.GraphProto) -> dict[str, str]:
    """Return {convolution: why no integer kernel takes it}, as far as the Q/DQ nodes around it tell."""
    producers = {output: node for node in graph.node for output in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    reasons = {}
    for node in (node for node in graph.node if node.op_type == "Conv"):
        reason = (
            _unquantized_reason(node, producers, consumers)
            or _type_reason(node, producers, types)
            or _max_pool_reason(node, producers)
        )
        if reason:
            reasons[node.name or node.output[0]] = reason
    return reasons


def _unquantized_reason(
    node: onnx.NodeProto, producers: Producers, consumers: Mapping[str, list[onnx.NodeProto]]
) -> str | None:
    """Return which of input, weight and output of a convolution has no Q/DQ nodes, as a clause."""
    missing = []
    for what, name in zip(("input", "weight"), node.input, strict=False):
        source = producers.get(name)
        if source is None or source.op_type != "DequantizeLinear":
            missing.append(f"{what} ({source.name or source.op_type})" if source else what)
    following = consumers.get(node.output[0], [])
    if len(following) == 1 and following[0].op_type in ("Relu", "Clip"):
        following = consumers.get(following[0].output[0], [])
    if not any(consumer.op_type == "QuantizeLinear" for consumer in following):
        missing.append("output")
    return f"its {' and '.join(missing)} {'are' if missing[1:] else 'is'} not quantized" if missing else None


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
    # Seen with 1.32: pool and quantizers become one node, and ONNX Runtime does not look at convolutions after it.
    return f"it follows the max pool {source.name}, after which ONNX Runtime uses no integer kernel"
