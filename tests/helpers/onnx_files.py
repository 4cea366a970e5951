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


def color_network(colors, end=(), pool=None):
    """An onnx.ModelProto that finds the nearest of 19 colors for every pixel: (1, 3, 64, 128) -> (1, 19, h, w).

    Args:
        colors: (19, 3), in the values and channels that the network is to take.
        end: operators after the logits, along the channels.
        pool: average squares of this width first.
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
    nodes.append(helper.make_node("Conv", [last, "weight", "bias"], ["scores"], "conv"))
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
    """The same network for images in 0..1, as Qualcomm AI Hub exports it; for uint8, as its --quantize_io does.

    The output becomes an integer only if a DequantizeLinear computes it.
    """
    changed = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = changed.graph
    del changed.metadata_props[:]
    image, logits = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = ["normalized" if name == image else name for name in node.input]
    for name, value in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
        graph.initializer.append(constant(name, np.reshape(value, (1, 3, 1, 1))))
    real = image if kind == TensorProto.FLOAT else "real"
    graph.node.insert(0, helper.make_node("Sub", [real, "mean"], ["centred"], "sub"))
    graph.node.insert(1, helper.make_node("Div", ["centred", "std"], ["normalized"], "div"))
    if kind != TensorProto.FLOAT:
        graph.input[0].type.tensor_type.elem_type = kind
        graph.initializer.extend([constant("pixel", 1 / 255), constant("zero", 0, kind)])
        graph.node.insert(0, helper.make_node("DequantizeLinear", [image, "pixel", "zero"], ["real"], "real"))
        if graph.node[-1].op_type == "DequantizeLinear":
            dequantizer = graph.node.pop()
            quantizer = next(node for node in graph.node if node.output[0] == dequantizer.input[0])
            quantizer.output[0] = logits
            graph.output[0].type.tensor_type.elem_type = kind
    return changed
