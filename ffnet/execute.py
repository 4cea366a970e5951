"""ONNX files executed by ONNX Runtime's CPU kernels, and what is found in them."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ffnet.errors import UserError
from ffnet.fast import image_by_image
from ffnet.onnx_check import Header, check_onnx

CONVOLUTIONS = ("Conv", "QLinearConv", "ConvInteger")
INTEGER = ("QLinearConv", "ConvInteger")  # what ONNX Runtime's optimized graph calls a convolution in integers


@dataclass(frozen=True)
class OnnxFacts:
    """What is in an ONNX file, and how ONNX Runtime runs it here."""

    header: Header
    quantized: bool
    convolutions: int
    integer: int  # of them, run by integer kernels
    floats: dict[str, str]  # in a quantized file: convolution that stays in float -> why

    def lines(self):
        """The facts as lines of text."""
        size = self.header.input_shape[2:]
        if None in size:
            fed = "any size, so images are taken as they are"
        else:
            fed = f"{size[0]}x{size[1]}; images of another size are resized bilinearly to it, logits to the label's"
        kind = "quantized (QDQ or integer operators)" if self.quantized else "float, not quantized"
        yield f"{kind}, opset {self.header.opset}, input {self.header.input_name!r}: {fed}"
        yield f"{self.integer} of {self.convolutions} convolutions run by integer kernels"
        for name, reason in self.floats.items():
            yield f"in float: {name}, {reason}"


class OnnxNetwork:
    """An ONNX file as a pass: normalized float32 (N, 3, H, W) -> float32 CPU logits (N, 19, h, w).

    Images of another size than the file's are resized to it. As many threads as torch has. UserError where the file
    can't be run.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.header = check_onnx(path)
        self.session = open_session(path)
        self.feed = torch.empty(0)  # one place for all inputs: a new one each time costs a tenth of a pass

    def __call__(self, inputs):
        inputs = resized(inputs.cpu(), self.header.input_shape[2:])
        return image_by_image(self.run)(inputs) if self.header.input_shape[0] == 1 else self.run(inputs)

    def run(self, batch):
        """Logits of one batch of the file's own shape."""
        if self.feed.shape != batch.shape:
            self.feed = torch.empty(batch.shape)
        feed = {self.header.input_name: self.feed.copy_(batch).numpy()}
        (logits,) = run_session(self.session, [self.header.output_name], feed, self.path)
        return torch.from_numpy(logits)


def resized(inputs, size):
    """Images (N, 3, H, W) bilinearly at `size`, (height, width); a None leaves that side as it is.

    Normalizing is the same affine function everywhere, so it may come before the resizing as well as after.
    """
    size = tuple(wanted or length for wanted, length in zip(size, inputs.shape[2:], strict=True))
    if size == tuple(inputs.shape[2:]):
        return inputs
    return F.interpolate(inputs, size, mode="bilinear", align_corners=False, antialias=True)


def open_session(path, proto=None, optimized=None):
    """An onnxruntime.InferenceSession on the CPU for the file at `path`; UserError where a kernel is lacking.

    `proto`: the file's onnx.ModelProto, changed, to be run in its place. `optimized`: path to write the graph to that
    is really run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take the next pass's cores
    options.log_severity_level = 4
    if not torch.cpu._is_vnni_supported():
        # Kernels without VNNI let sums of uint8 times int8 overflow 16 bits. This takes exact ones, half as fast.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    source = proto.SerializeToString() if proto else str(path)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise UserError(f"{path}: ONNX Runtime {onnxruntime.__version__} can't run it: {reason_of(error)}") from error


def run_session(session, outputs, feed, path):
    """The arrays of the named outputs; UserError where the run fails."""
    try:
        return session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise UserError(f"{path}: ONNX Runtime failed in it: {reason_of(error)}") from error


def reason_of(error):
    """The first line of an exception's message, without ONNX Runtime's error number."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip().partition("\n")[0])


def inspect(path):
    """The OnnxFacts of a file; UserError where it is none that can be run."""
    import onnx

    header = check_onnx(path)
    proto = onnx.load(path)
    names = {}
    for index, node in enumerate(node for node in proto.graph.node if node.op_type in CONVOLUTIONS):
        names[f"convolution{index}"] = node.name or node.output[0]
    reasons = float_reasons(proto.graph)
    quantized = any("QuantizeLinear" in n.op_type or n.op_type.startswith("QLinear") for n in proto.graph.node)
    integer = integer_convolutions(path, proto)
    floats = {name: reasons.get(name, "for no known reason") for key, name in names.items() if key not in integer}
    return OnnxFacts(header, quantized, len(names), len(integer), floats if quantized else {})


def integer_convolutions(path, proto):
    """Names "convolution<index>" of those that ONNX Runtime's optimized graph runs in integers; names them so."""
    import onnx

    for index, node in enumerate(node for node in proto.graph.node if node.op_type in CONVOLUTIONS):
        node.name = f"convolution{index}"
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, proto, optimized)
        nodes = onnx.load(optimized).graph.node
    return {re.sub(r"_token_\d+$", "", node.name) for node in nodes if node.op_type in INTEGER}


def float_reasons(graph):
    """{convolution: why integer kernels can't take it} read off the Q/DQ nodes around it in an onnx.GraphProto."""
    import onnx

    producers = {output: node for node in graph.node for output in node.output}
    consumers = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    reasons = {}
    for node in graph.node:
        if node.op_type == "Conv":
            reason = (
                _unquantized(node, producers, consumers) or _wide(node, producers, types) or _pooled(node, producers)
            )
            if reason:
                reasons[node.name or node.output[0]] = reason
    return reasons


def _unquantized(node, producers, consumers):
    """Which of input, weight and output of a convolution has no Q/DQ nodes, in words, or None."""
    missing = []
    for what, name in zip(("input", "weight"), node.input, strict=False):
        source = producers.get(name)
        if source is None or source.op_type != "DequantizeLinear":
            missing.append(f"{what} ({source.name or source.op_type})" if source else what)
    behind = consumers.get(node.output[0], [])
    if len(behind) == 1 and behind[0].op_type in ("Relu", "Clip"):
        behind = consumers.get(behind[0].output[0], [])
    if not any(consumer.op_type == "QuantizeLinear" for consumer in behind):
        missing.append("output")
    return f"whose {' and '.join(missing)} {'are' if missing[1:] else 'is'} not quantized" if missing else None


def _pooled(node, producers):
    """That a convolution's input comes from a max pool through Q/DQ nodes, in words, or None."""
    source = node.input[0]
    for operator in ("DequantizeLinear", "QuantizeLinear", "MaxPool"):
        if source not in producers or producers[source].op_type != operator:
            return None
        pool, source = producers[source], producers[source].input[0]
    # Seen with 1.32: pool and quantizers become one node, and convolutions behind it are no longer looked at.
    return f"which ONNX Runtime leaves behind a max pool in integers ({pool.name})"


def _wide(node, producers, types):
    """Which integer type of a convolution's input or weight ONNX Runtime has no kernel for, in words, or None."""
    found = [types.get(producers[name].input[2], "UINT8") for name in node.input[:2] if len(producers[name].input) > 2]
    odd = [kind for kind in found if kind not in ("INT8", "UINT8")]
    return f"for which ONNX Runtime has no integer kernel ({' and '.join(odd).lower()})" if odd else None
