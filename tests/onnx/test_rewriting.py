"""Rewritten graphs compute what the original ones do, worked by hand and with ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ffnet.file_names import MODEL_FILE
from ffnet.onnx.rewriting import fold_float_constants, keep_scale_in_resizes
from tests.helpers.exports import exported
from tests.helpers.networks import DEMO, PRE_DOWN

IMAGE = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)


def constant(name, value, dtype):
    return numpy_helper.from_array(np.array(value, dtype), name)


def network(nodes, constants, size=4):
    """A network of the given nodes from `image` (1, 1, 4, 4) to `logits`."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 1, 4, 4))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 1, size, size))
    graph = helper.make_graph(nodes, "test", [image], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def float_convolution():
    """A convolution with a float input, whose weight 0.9 and bias pass through Q/DQ nodes of scale 0.5 and 0.25."""
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["w_q"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w_qdq"]),
        helper.make_node("DequantizeLinear", ["b_q", "b_scale"], ["b_qdq"]),
        helper.make_node("Conv", ["image", "w_qdq", "b_qdq"], ["logits"], "conv"),
    ]
    constants = [
        constant("w", [[[[0.9]]]], np.float32), constant("w_scale", 0.5, np.float32), constant("w_zero", 0, np.int8),
        constant("b_q", [3], np.int32), constant("b_scale", 0.25, np.float32),
    ]  # fmt: skip
    return network(nodes, constants)


def resize(mode):
    """An image of scale 0.5, doubled in size and quantized with scale 0.3."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "fine", "zero"], ["image_q"]),
        helper.make_node("DequantizeLinear", ["image_q", "fine", "zero"], ["image_qdq"]),
        helper.make_node("Resize", ["image_qdq", "", "factors"], ["up"], "up", mode=mode),
        helper.make_node("QuantizeLinear", ["up", "coarse", "zero"], ["up_q"]),
        helper.make_node("DequantizeLinear", ["up_q", "coarse", "zero"], ["logits"]),
    ]
    constants = [
        constant("fine", 0.5, np.float32), constant("coarse", 0.3, np.float32), constant("zero", 100, np.uint8),
        constant("factors", (1, 1, 2, 2), np.float32),
    ]  # fmt: skip
    return network(nodes, constants, size=8)


def run(proto, image=IMAGE):
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image})[0]


def operators(proto):
    return [node.op_type for node in proto.graph.node]


def test_constants_of_a_float_convolution_keep_their_quantized_values():
    proto = float_convolution()
    expected = run(proto)
    fold_float_constants(proto, {})
    assert operators(proto) == ["Conv"]
    assert {tensor.name: numpy_helper.to_array(tensor).item() for tensor in proto.graph.initializer} == {
        "w": 1.0,  # 0.9 on a grid of 0.5
        "b": 0.75,
    }
    assert np.array_equal(run(proto), expected) and np.array_equal(expected, IMAGE + np.float32(0.75))


def test_a_weight_that_is_known_is_taken_as_it_is():
    proto = float_convolution()
    fold_float_constants(proto, {"w": np.array([[[[0.5]]]], np.float32)})
    assert np.array_equal(run(proto), IMAGE * np.float32(0.5) + np.float32(0.75))


def test_a_convolution_with_a_quantized_input_keeps_its_quantizers(small_export):
    proto = onnx.load(small_export.folder / MODEL_FILE)
    before = proto.SerializeToString()
    fold_float_constants(proto, {})
    assert proto.SerializeToString() == before


def test_a_nearest_resize_gets_the_scale_of_its_input_and_the_same_values():
    proto = resize("nearest")
    expected = run(proto)
    keep_scale_in_resizes(proto.graph)
    assert operators(proto) == ["QuantizeLinear", "DequantizeLinear", "Resize"] + 2 * [
        "QuantizeLinear", "DequantizeLinear",
    ]  # fmt: skip
    assert proto.graph.node[3].input[1:] == proto.graph.node[0].input[1:]
    assert np.array_equal(run(proto), expected) and len(np.unique(expected)) > 3


def test_a_bilinear_resize_whose_values_lie_between_the_steps_stays_as_it_is():
    proto = resize("linear")
    keep_scale_in_resizes(proto.graph)
    assert proto == resize("linear")


@pytest.mark.slow
@pytest.mark.parametrize("name", (DEMO, PRE_DOWN))
def test_an_exported_network_has_no_quantizer_of_a_float_layer_and_equal_scales_around_resizes(name):
    graph = onnx.load(exported(name).folder / MODEL_FILE).graph
    producers = {node.output[0]: node for node in graph.node}
    consumers = {tensor: node for node in graph.node for tensor in node.input}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    floats = [node for node in convolutions if producers[node.input[0]].op_type != "DequantizeLinear"]
    assert [node.name for node in floats] == (["backbone_model.conv0"] if name == PRE_DOWN else [])
    assert not any(tensor in producers for node in floats for tensor in node.input[1:])
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    assert len(resizes) == 6
    for node in resizes:
        assert consumers[node.output[0]].input[1:] == producers[node.input[0]].input[1:]
