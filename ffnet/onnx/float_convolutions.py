"""Why ONNX Runtime runs a convolution of a quantized file in float, as far as the nodes around it tell.

ONNX Runtime 1.32 takes a convolution to an integer kernel if its input, weight and bias come from DequantizeLinear
nodes of 8 bits (32 for the bias), and if one QuantizeLinear node is all that its output goes to. A Relu or Clip
between the two is allowed if the quantizer clips likewise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from ffnet.onnx.graph_index import GraphIndex, node_name
from ffnet.system.text import list_names

KERNEL_TYPES = ("int8", "uint8")
CLIPPING = ("Relu", "Clip")  # the activations that merge with the quantizer after them
INPUTS = ("input", "weight", "bias")


@dataclass(frozen=True)
class Surroundings:
    """What a convolution's inputs come from, and what its output goes to."""

    graph: GraphIndex
    convolution: onnx.NodeProto
    sources: Mapping[str, onnx.NodeProto | None]  # "input", "weight", "bias" -> what computes it; None: a constant
    activation: onnx.NodeProto | None  # the Relu or Clip that alone takes the output
    following: list[onnx.NodeProto]  # the nodes after the convolution, or after its activation

    @classmethod
    def of(cls, convolution: onnx.NodeProto, graph: GraphIndex) -> "Surroundings":
        """Look at the nodes around a convolution."""
        named = {what: name for what, name in zip(INPUTS, convolution.input, strict=False) if name}
        following = graph.consumers_of(convolution)
        activation = following[0] if len(following) == 1 and following[0].op_type in CLIPPING else None
        return cls(
            graph,
            convolution,
            {what: None if name in graph.constants else graph.producers.get(name) for what, name in named.items()},
            activation,
            graph.consumers_of(activation) if activation else following,
        )

    @property
    def quantizers(self) -> list[onnx.NodeProto]:
        """The QuantizeLinear nodes that the output goes to."""
        return [node for node in self.following if node.op_type == "QuantizeLinear"]

    def type_of(self, what: str) -> str:
        """Return the type of "input", "weight", "bias" or "output", "float" if it is not quantized."""
        if what == "output":
            return self.graph.integer_type(self.quantizers[0]) if self.quantizers else "float"
        source = self.sources[what]
        return (
            self.graph.integer_type(source) if source is not None and source.op_type == "DequantizeLinear" else "float"
        )

    def scale(self, what: str) -> np.ndarray | None:
        """Return the scale of "input", "weight" or "bias"; None if it is not a constant."""
        source = self.sources[what]
        return None if source is None else self.graph.value(source.input[1])


def float_reason(convolution: onnx.NodeProto, graph: GraphIndex) -> str:
    """Return why ONNX Runtime runs a convolution in float, as a clause."""
    around = Surroundings.of(convolution, graph)
    found = (reason(around) for reason in REASONS)
    return next((reason for reason in found if reason), None) or _types_found(around)


def _unquantized(around: Surroundings) -> str | None:
    """Return which of input, weight and output has no Q/DQ nodes."""
    missing = []
    for what in ("input", "weight"):
        source = around.sources[what]
        if source is None or source.op_type != "DequantizeLinear":
            missing.append(f"{what} ({source.name or source.op_type})" if source is not None else what)
    if not around.quantizers:
        (*_, last) = around.following or [None]
        missing.append(f"output (to {last.name or last.op_type}, {last.op_type})" if last is not None else "output")
    return f"its {' and '.join(missing)} {'are' if missing[1:] else 'is'} not quantized" if missing else None


def _other_consumers(around: Surroundings) -> str | None:
    """Return where the output goes beside a single quantizer."""
    names = [f"{node_name(node)} ({node.op_type})" for node in around.following]
    last = around.activation or around.convolution
    names += ["the network's output"] * (last.output[0] in around.graph.outputs)
    if len(names) == 1:
        return None
    return f"its output goes to {list_names(names)}, and an integer kernel needs a single QuantizeLinear there"


def _types(around: Surroundings) -> str | None:
    """Return for which integer types of input, weight or output ONNX Runtime has no kernel."""
    types = [around.type_of(what) for what in ("input", "weight", "output")]
    others = list(dict.fromkeys(kind for kind in types if kind not in KERNEL_TYPES))
    return f"ONNX Runtime has no integer kernel for {' and '.join(others)}" if others else None


def _activation(around: Surroundings) -> str | None:
    """Return which Relu or Clip does not merge with the quantizer after it."""
    if around.activation is None:
        return None
    quantizer = around.quantizers[0]
    quantization = around.graph.quantization(quantizer)
    if quantization is None or quantization[0].size != 1:
        return None
    scale, zero_point = quantization
    limits = np.iinfo(around.graph.integer_type(quantizer))
    low, high = ((limit - zero_point.item()) * scale.item() for limit in (limits.min, limits.max))
    bounds = _bounds(around.activation, around.graph)
    if bounds is None or (bounds[0] <= low + 1e-6 and high - 1e-6 <= bounds[1]):
        return None
    return (
        f"the quantizer after {node_name(around.activation)} ({around.activation.op_type}) takes {low:.3g} to "
        f"{high:.3g}, and an integer kernel needs one that clips like that node"
    )


def _bounds(activation: onnx.NodeProto, graph: GraphIndex) -> tuple[float, float] | None:
    """Return the least and the largest value that a Relu or Clip lets through; None if they are not constants."""
    if activation.op_type == "Relu":
        return 0.0, np.inf
    attributes = {attribute.name: attribute.f for attribute in activation.attribute}
    bounds = [attributes.get("min", -np.inf), attributes.get("max", np.inf)]
    for index, name in enumerate(activation.input[1:3]):
        value = graph.value(name) if name else np.float32(bounds[index])
        if value is None:
            return None
        bounds[index] = float(value)
    return bounds[0], bounds[1]


def _bias(around: Surroundings) -> str | None:
    """Return what is wrong with the bias."""
    if "bias" not in around.sources or around.convolution.input[2] in around.graph.constants:
        return None  # ONNX Runtime quantizes constants itself
    source = around.sources["bias"]
    if source is None or source.op_type != "DequantizeLinear":
        return f"its bias ({source.name or source.op_type if source else 'an input'}) is computed and not quantized"
    if (kind := around.type_of("bias")) != "int32":
        return f"its bias is quantized as {kind}, and an integer kernel needs int32"
    bias, image, weight = (around.scale(what) for what in ("bias", "input", "weight"))
    if bias is None or image is None or weight is None:
        return "the scale of its input, weight or bias is not a constant"
    if not np.allclose(bias, image * weight, rtol=1e-3, atol=0):
        return "the scale of its bias is not that of its input times that of its weight"
    return None


REASONS: tuple[Callable[[Surroundings], str | None], ...] = (
    _unquantized,
    _other_consumers,
    _types,
    _activation,
    _bias,
)


def _types_found(around: Surroundings) -> str:
    """Return what types the file has around a convolution that none of the reasons explains."""
    types = [f"{what} {around.type_of(what)}" for what in (*around.sources, "output")]
    return (
        f"ONNX Runtime {onnxruntime.__version__} takes it to no integer kernel, although its Q/DQ nodes are complete "
        f"({', '.join(types)})"
    )
