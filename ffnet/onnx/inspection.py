"""Find which convolutions of an ONNX file ONNX Runtime runs on integer kernels, and why others run in float."""

import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnx

from ffnet.onnx.float_convolutions import float_reason
from ffnet.onnx.graph_index import GraphIndex, node_name
from ffnet.onnx.runtime import open_session
from ffnet.onnx.validation import OnnxHeader, check_onnx
from ffnet.system.text import count, list_names

INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")


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
        """Return sentences on the kernels that run the convolutions, one for each reason why some run in float."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.floats.items():
            by_reason[reason].append(name)
        floats = [
            f"{count(len(names), 'convolution')} {'runs' if len(names) == 1 else 'run'} in float: {reason} "
            f"({list_names(names)})."
            for reason, names in by_reason.items()
        ]
        return [f"Convolutions that run on integer kernels: {self.integer} of {self.convolutions}.", *floats]


def inspect_onnx(path: Path | str) -> OnnxDescription:
    """Return the description of an ONNX file, or raise a UserError if it can't be run."""
    header = check_onnx(path)
    proto = onnx.load(path)
    operators = {node.op_type for node in proto.graph.node}
    quantized = any("QuantizeLinear" in operator or operator.startswith("QLinear") for operator in operators)
    graph = GraphIndex.of(proto.graph)
    convolutions = [node for node in proto.graph.node if node.op_type in ("Conv", *INTEGER_CONVOLUTIONS)]
    names = [node_name(node) for node in convolutions]
    reasons = [float_reason(node, graph) if node.op_type == "Conv" else "" for node in convolutions]
    for index, node in enumerate(convolutions):
        node.name = f"convolution{index}"
    integer = _integer_convolutions(path, proto)
    floats = {name: reasons[i] for i, name in enumerate(names) if i not in integer}
    return OnnxDescription(header, quantized, len(names), len(integer), floats if quantized else {})


def _integer_convolutions(path: Path | str, proto: onnx.ModelProto) -> set[int]:
    """Return the numbers i of the nodes named "convolution{i}" in `proto` that run on integer kernels."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, proto, optimized)
        nodes = [node for node in onnx.load(optimized).graph.node if node.op_type in INTEGER_CONVOLUTIONS]
    names = (re.match(r"convolution(\d+)(_token_\d+)?$", node.name) for node in nodes)
    return {int(name[1]) for name in names if name}
