"""ONNX files that no exporter of this project wrote."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def convolution_network(channels=19, weight=None, inputs=1, shape=(1, 3, 8, 8), kind=TensorProto.FLOAT, **node):
    """An onnx.ModelProto of one 1x1 convolution; `node`: more attributes of that."""
    weight = weight or numpy_helper.from_array(np.ones((channels, 3, 1, 1), np.float32), "weight")
    images = [helper.make_tensor_value_info(f"image{i}", kind, shape) for i in range(inputs)]
    output = helper.make_tensor_value_info("logits", kind, (None,) * 4)
    convolution = helper.make_node(node.pop("op", "Conv"), ["image0", "weight"], ["logits"], **node)
    graph = helper.make_graph([convolution], "network", images, [output], [weight])
    opsets = [helper.make_opsetid("", 17)] + [helper.make_opsetid(d, 1) for d in {node.get("domain")} - {None}]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def external_weight(location, offset=0):
    """The weight of a convolution_network whose data is in another file."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=(19, 3, 1, 1))
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": 19 * 3 * 4}.items():
        weight.external_data.add(key=key, value=str(value))
    return weight


def save(path, content):
    """Write an onnx.ModelProto, or bytes, to `path` and return it."""
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def constant(name, value, kind=TensorProto.FLOAT):
    """A constant of a graph: a number, or a numpy array, of any of ONNX's types."""
    value = np.asarray(value)
    return helper.make_tensor(name, kind, value.shape, value.flatten().tolist())


def quantized_convolution(
    activation="UINT8", weight="INT8", output=None, bias="INT32", bias_scale=4e-4, zero_point=10, after=(), **settings
):
    """An onnx.ModelProto of one 1x1 convolution "conv" with Q/DQ nodes around it, whose scales are 0.02.

    Args:
        activation: type of the quantized input.
        weight: type of the quantized weight.
        output: type of the quantized output; like the input's if None.
        bias: type of the quantized bias; "FLOAT" for one that is not quantized, None for none.
        bias_scale: of the quantized bias.
        zero_point: of the output's quantizer; the input's is 0.
        after: operators between the convolution and its quantizer.
        settings: `branch`: an operator that takes the convolution's output beside its quantizer; `float_input`,
            `float_weight`, `float_output`: leave out the Q/DQ nodes.
    """
    nodes, constants = [], [constant("scale", 0.02)]

    def zero(name, kind, value=0):
        constants.append(constant(f"{name}_zero", value, getattr(TensorProto, kind)))
        return f"{name}_zero"

    def dequantized(name, kind, value, scale="scale"):
        constants.append(constant(f"{name}_q", value, getattr(TensorProto, kind)))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero(name, kind)], [name], name))

    def round_trip(source, name, kind, value):
        quantizer = ["scale", zero(name, kind, value)]
        nodes.append(helper.make_node("QuantizeLinear", [source, *quantizer], [f"{name}_q"], f"{name}_q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *quantizer], [name], f"{name}_dq"))

    inputs = ["image", "weight"]
    if not settings.get("float_input"):
        round_trip("image", "x", activation, 0)
        inputs[0] = "x"
    if settings.get("float_weight"):
        constants.append(constant("weight", np.ones((19, 3, 1, 1))))
    else:
        dequantized("weight", weight, np.ones((19, 3, 1, 1), np.int64))
    if bias == "FLOAT":
        constants.append(constant("bias", np.ones(19)))
    elif bias:
        constants.append(constant("bias_scale", bias_scale))
        dequantized("bias", bias, np.full(19, 3), "bias_scale")
    last = "convolved"
    nodes.append(helper.make_node("Conv", inputs + ["bias"] * bool(bias), [last], "conv"))
    for operator in after:
        nodes.append(helper.make_node(operator, [last], [operator.lower()], operator.lower()))
        last = operator.lower()
    final = last
    if not settings.get("float_output"):
        round_trip(last, "y", output or activation, zero_point)
        final = "y"
    if branch := settings.get("branch"):
        nodes.append(helper.make_node(branch, [last], ["branch"], "branch"))
        nodes.append(helper.make_node("Add", [final, "branch"], ["sum"], "sum"))
        final = "sum"
    nodes.append(helper.make_node("Identity", [final], ["logits"], "end"))
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, c, 8, 16)) for n, c in (("image", 3), ("logits", 19))
    ]
    graph = helper.make_graph(nodes, "quantized", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def color_network(colors, end=(), pool=None):
    """An onnx.ModelProto that finds the nearest of 19 colors for every pixel: (1, 3, 64, 128) -> (1, 19, h, w).

    Args:
        colors: (19, 3), in the values and channels that the network is to take.
        end: operators after the logits, along the channels.
        pool: average squares of so many pixels first.
    """
    colors = np.asarray(colors, np.float64)
    scale = np.square(colors).mean()  # logits of a moderate size
    constants = [
        constant("weight", (2 * colors / scale)[:, :, None, None]),
        constant("bias", -np.square(colors).sum(1) / scale),
    ]
    nodes, last = [], "image"
    if pool:
        nodes.append(
            helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[pool] * 2, strides=[pool] * 2)
        )
        last = "pooled"
    # The Max hides the network's own operations on its input: it changes no value.
    constants.append(constant("least", -1e9))
    nodes.append(helper.make_node("Max", [last, "least"], ["same"], "hide"))
    nodes.append(helper.make_node("Conv", ["same", "weight", "bias"], ["scores"], "conv"))
    last = "scores"
    for operator in end:
        nodes.append(helper.make_node(operator, [last], [operator], operator.lower(), axis=1))
        last = operator
    nodes[-1].output[0] = "logits"
    size = [length // (pool or 1) for length in (64, 128)]
    shapes = {"image": (1, 3, 64, 128), "logits": (1, 19, *size)}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "colors", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def normalizing_inside(proto, kind=TensorProto.FLOAT):
    """The same network for images in 0..1, as Qualcomm AI Hub exports it; for uint8, as its --quantize_io does."""
    changed = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = changed.graph
    image, logits = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = ["normalized" if name == image else name for name in node.input]
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for name, value in (("mean", mean), ("std", std)):
        graph.initializer.append(constant(name, np.reshape(value, (1, 3, 1, 1))))
    real = image if kind == TensorProto.FLOAT else "real"
    graph.node.insert(0, helper.make_node("Sub", [real, "mean"], ["centred"], "sub"))
    graph.node.insert(1, helper.make_node("Div", ["centred", "std"], ["normalized"], "div"))
    if kind != TensorProto.FLOAT:
        graph.input[0].type.tensor_type.elem_type = kind
        graph.initializer.extend([constant("pixel", 1 / 255), constant("zero", 0, kind)])
        graph.node.insert(0, helper.make_node("DequantizeLinear", [image, "pixel", "zero"], ["real"], "real"))
        dequantizer = graph.node[-1]
        quantizer = next(node for node in graph.node if node.output[0] == dequantizer.input[0])
        assert (quantizer.op_type, dequantizer.op_type) == ("QuantizeLinear", "DequantizeLinear")
        quantizer.output[0] = logits
        graph.node.remove(dequantizer)
        graph.output[0].type.tensor_type.elem_type = kind
    return changed
