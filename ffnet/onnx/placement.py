"""Compare an encodings file with the float ONNX network that it belongs to: which tensors are quantized, and which not.

A tensor without an entry stays in float, as with `--float_fallback` of QAIRT's converters. Operators that only move
values share one encoding between their inputs and outputs, as in what AIMET exports for QAIRT.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from ffnet.onnx.graph import GraphIndex
from ffnet.quantization.encodings_file import Encoding, EncodingsFile
from ffnet.quantization.sites import describe_bits
from ffnet.system.errors import UserError
from ffnet.system.text import count, list_names

Encodings = Mapping[str, Encoding]  # name of a tensor -> its encoding

TYPES = {4: (ml_dtypes.int4, ml_dtypes.uint4), 8: (np.int8, np.uint8), 16: (np.int16, np.uint16)}  # bits -> types
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators with weights, and with biases apart from MatMul
# Operators whose output has the values of their inputs; QAIRT gives an interpolation the encoding of its input, too.
INTERPOLATING = ("Resize", "Upsample")
COPYING = ("DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice",
           "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze")  # fmt: skip
MOVING = (*COPYING, *INTERPOLATING, "Concat")
# Activation functions that devices fuse with the operator before them; the published configuration fuses the last two.
FUSED = ("BatchNormalization", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Sigmoid", "Tanh")
PUBLISHED_FUSED = ("Clip", "Relu")
MAKE_AGAIN = "Give encodings that were made for this file."


@dataclass(frozen=True)
class Placement:
    """Which tensors of a network an encodings file quantizes."""

    entries: Encodings  # entries that name a float tensor of the network
    implied: Encodings  # encodings of the tensors that share that of an entry
    missing: tuple[str, ...]  # tensors of quantized operators without an encoding
    unexpected: tuple[str, ...]  # entries that name no float tensor
    floats: tuple[str, ...]  # entries of floats
    float_operators: tuple[str, ...]  # operators with weights of which no tensor is quantized
    surplus: tuple[str, ...]  # tensors that the file quantizes and the published configuration does not
    lacking: tuple[str, ...]  # the reverse
    weights: frozenset[str]  # entries of weights
    constants: frozenset[str]  # entries of weights, biases and other constants

    @property
    def precision(self) -> str:
        """The bits of weights and activations, as the names of backends show them."""
        names = self.weights, self.activations
        weights, activations = ({bit_width(self.entries[name]) for name in each} for each in names)
        return describe_bits(weights, activations)

    @property
    def activations(self) -> list[str]:
        """The entries that name activations."""
        return [name for name in self.entries if name not in self.constants]

    def differences(self) -> list[tuple[str, str]]:
        """Return the tensors that only one of the file and the published configuration quantizes, and which one."""
        rows = [(name, "the encodings") for name in self.surplus]
        return rows + [(name, "the published configuration") for name in self.lacking]

    def notes(self) -> list[str]:
        """Return sentences on what has no encoding, and on what differs from the published configuration."""
        lists = {
            "Tensors of quantized operators without an encoding, which stay in float": self.missing,
            "Entries that name no float32 tensor and were ignored": self.unexpected,
            "Entries of floats, whose tensors stay in float, and which converters may turn into INT8": self.floats,
            "Operators with weights that the encodings leave in float": self.float_operators,
        }
        found = [f"{title} ({len(names)}): {list_names(names)}." for title, names in lists.items() if names]
        if not (self.surplus or self.lacking):
            return [*found, "The encodings quantize the tensors that the published configuration quantizes."]
        quantized, floats = count(len(self.surplus), "tensor"), count(len(self.lacking), "tensor")
        return [
            *found,
            f"The encodings quantize {quantized} that the published configuration leaves in float, and leave {floats} "
            "in float that it quantizes.",
        ]


def bit_width(entry: Encoding) -> int:
    """Return the bit width of an encoding."""
    return (entry.qmax - entry.qmin).bit_length()


class _Network:
    """The float tensors of a graph, and the operators around them."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = [node for node in proto.graph.node if node.op_type != "Constant"]
        self.index = GraphIndex.of(proto.graph)
        self.constants = self.index.constants
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {name: tensor.data_type for name, tensor in self.index.constants.items()}
        self.floats = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
        self.outputs = {output.name for output in proto.graph.output}
        self.inputs = self.activations(value.name for value in inferred.input)
        self.weights = {
            node.input[1]: node for node in self.nodes if node.op_type in WEIGHTED and node.input[1] in self.constants
        }

    def activations(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.floats and name not in self.constants]

    def fused(self, tensor: str, operators: Collection[str]) -> str | None:
        """Return the output of the only reader of a tensor if it is one of the activation functions `operators`."""
        readers = self.index.consumers.get(tensor, ())
        fuses = len(readers) == 1 and readers[0].op_type in operators and tensor not in self.outputs
        return readers[0].output[0] if fuses else None


def bias_of(node: onnx.NodeProto) -> str | None:
    """Return the bias of an operator with weights."""
    return node.input[2] if node.op_type in WEIGHTED and len(node.input) == 3 else None


def channel_axis(node: onnx.NodeProto) -> int:
    """Return the axis of the output channels in the weight of an operator."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1, "MatMul": -1}[node.op_type]


def place(proto: onnx.ModelProto, file: EncodingsFile, source: Path) -> Placement:
    """Compare an encodings file with the network of the file `source`.

    Raises:
        UserError: If the network is quantized, if no entry names one of its tensors, or if one doesn't suit its tensor.
    """
    if any("Quantize" in node.op_type or node.op_type.startswith("QLinear") for node in proto.graph.node):
        raise UserError(f"--encodings: {source} is quantized already. Give --onnx the float file of the encodings.")
    network = _Network(proto)
    entries = {name: entry for name, entry in file.entries.items() if name in network.floats}
    unexpected = tuple(name for name in file.entries if name not in entries)
    if not entries:
        raise UserError(
            f"--encodings {file.path}: no entry names a float32 tensor of {source}; the entries are "
            f"{list_names(unexpected)}. Give the encodings that were written beside this file."
        )
    for name, entry in entries.items():
        if problem := _problem(name, entry, network):
            raise UserError(f"--encodings {file.path}: the entry {name!r} {problem}. {MAKE_AGAIN}")
    implied = {name: entry for name, entry in _implied(entries, network).items() if name not in file.floats}
    missing, left = _gaps(entries | implied, network)
    published = _published(network)
    compared = [name for name in entries if bit_width(entries[name]) in TYPES and not _is_copied(name, network)]
    return Placement(
        entries,
        implied,
        tuple(name for name in missing if name not in file.floats),
        unexpected,
        file.floats,
        left,
        tuple(name for name in compared if name not in published),
        tuple(name for name in published if name not in entries and name not in implied),
        frozenset(entries.keys() & network.weights.keys()),
        frozenset(entries.keys() & network.constants.keys()),
    )


def _problem(name: str, entry: Encoding, network: _Network) -> str | None:
    """Return why an entry can't quantize the tensor that it names."""
    bits, scales, node = bit_width(entry), len(entry.scales), network.weights.get(name)
    if name not in network.constants:
        if scales > 1:
            return f"has {scales} scales, but activations have one"
    elif scales > 1:
        dims = network.constants[name].dims
        axis = (channel_axis(node) if node else 0) % len(dims)
        if entry.axis is not None and entry.axis % len(dims) != axis:
            return f"has its scales along axis {entry.axis}, but the output channels are on axis {axis}"
        if dims[axis] != scales:
            return f"has {scales} scales, but the tensor has {count(dims[axis], 'output channel')}"
    is_bias = name in network.constants and node is None
    if bits not in TYPES and not (is_bias and bits == 32):
        return f"has {bits} bits, but ONNX has integers of {list_names(tuple(map(str, TYPES)))} bits"
    return None


def _implied(entries: Encodings, network: _Network) -> dict[str, Encoding]:
    """Return the encodings of tensors that have the values of tensors with an entry."""
    found = dict(entries)
    for node in (*network.nodes, *reversed(network.nodes)):
        if node.op_type not in MOVING:
            continue
        inputs, outputs = network.activations(node.input), network.activations(node.output)
        after, before = ({found.get(name) for name in names} for names in (outputs, inputs))
        if len(after) == 1 and (encoding := after.pop()) and node.op_type not in INTERPOLATING:
            for name in inputs:
                if len(network.index.consumers[name]) == 1 and name not in network.outputs:
                    found.setdefault(name, encoding)
        if len(before) == 1 and (encoding := before.pop()):
            for name in outputs:
                found.setdefault(name, encoding)
    return {name: encoding for name, encoding in found.items() if name not in entries}


def _gaps(encodings: Encodings, network: _Network) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tensors of quantized operators without an encoding, and the names of float operators with weights."""
    missing, floats, quantized = dict[str, None](), [], set[str]()

    def is_covered(tensor: str) -> bool:
        following = network.fused(tensor, (*FUSED, *PUBLISHED_FUSED))
        return tensor in encodings or (following is not None and is_covered(following))

    for node in network.nodes:
        outputs = network.activations(node.output)
        weight = node.input[1] if node.op_type in WEIGHTED and node.input[1] in network.constants else None
        inputs = () if weight else network.activations(node.input)
        if any(map(is_covered, outputs)) or weight in encodings or any(name in encodings for name in inputs):
            quantized.update(node.input)
            names = [name for name in outputs if not is_covered(name)]
            missing |= dict.fromkeys(names if weight is None or weight in encodings else [weight, *names])
        elif weight:
            floats.append(node.name or node.output[0])
    for node in reversed(network.nodes):
        if node.op_type in MOVING and not quantized.isdisjoint(node.output):
            quantized.update(node.input)
    first = [name for name in network.inputs if name in quantized and name not in encodings]
    return (*first, *missing), tuple(floats)


def _published(network: _Network) -> list[str]:
    """Return the tensors that the published configuration quantizes, apart from those whose values are copies.

    It leaves the fixed convolution in float that smooths the image of the pre_down variants.
    """
    found = [*network.inputs, *network.weights]
    for node in network.nodes:
        fuses = node.op_type in ("Conv", "ConvTranspose", "Gemm", "Add")
        outputs = network.activations(node.output)
        found += [name for name in outputs if not (fuses and network.fused(name, PUBLISHED_FUSED))]
    smoothing = {
        tensor
        for weight, node in network.weights.items()
        if list(network.constants[weight].dims[:2]) == [3, 1]
        for tensor in (weight, *node.output)
    }
    return [name for name in found if name not in smoothing and not _is_copied(name, network)]


def _is_copied(tensor: str, network: _Network) -> bool:
    return network.index.operator(tensor) in COPYING
