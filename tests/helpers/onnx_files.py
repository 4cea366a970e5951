"""ONNX files that no exporter of this project wrote."""

import numpy as np
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
