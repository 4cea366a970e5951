"""Rewritten graphs compute what the original ones do: by hand, with ONNX Runtime, and against the simulation."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ffnet.config import MODEL_FILE
from ffnet.onnx.divergence import open_with_onnx_runtime
from ffnet.onnx.export import export
from ffnet.onnx.graph import GraphIndex, keep_scale_in_resizes, unify_bit_widths, widen
from ffnet.quantization.lowering import lower
from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.exports import export_mix, exported
from tests.helpers.networks import PRE_DOWN, random_batches, three_layer_network
from tests.helpers.onnx_files import constant
from tests.helpers.simulations import simulate, small_network

IMAGE = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)
MIXES = (  # activations of 16 bits and weights of 8 in the small network, otherwise W4A8
    ["block.conv2"],
    ["image", "block.module_relu_1", "block.conv1.weight"],
    ["module_cat", "block.relu", "adapter.layers.0.weight"],
    ["stem.layers.2", "block.downsample.0", "logits", "classifier.weight"],
)


def network(nodes, constants, size=4):
    """A network of the given nodes from `image` (1, 1, 4, 4) to `logits`."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 1, 4, 4))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 1, size, size))
    graph = helper.make_graph(nodes, "test", [image], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def pair(tensor, name, output=None):
    """A Q/DQ pair."""
    scale = [f"{name}_scale", f"{name}_zero"]
    return (
        helper.make_node("QuantizeLinear", [tensor, *scale], [f"{name}_q"], f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *scale], [output or f"{name}_dq"], f"{name}_dq"),
    )


def quantization(name, scale, zero_point, kind=TensorProto.UINT8):
    return constant(f"{name}_scale", scale), constant(f"{name}_zero", zero_point, kind)


def resize(mode):
    """An image of scale 0.5, doubled in size and quantized with scale 0.3."""
    up = helper.make_node("Resize", ["fine_dq", "", "factors"], ["up"], "up", mode=mode)
    nodes = [*pair("image", "fine"), up, *pair("up", "coarse", "logits")]
    constants = [*quantization("fine", 0.5, 100), *quantization("coarse", 0.3, 100), constant("factors", (1, 1, 2, 2))]
    return network(nodes, constants, size=8)


def add_of_two_widths():
    """An image of 8 bits, scale 0.5, added to itself in 16 bits, scale 0.010123; the sum has 8 bits, scale 0.3."""
    add = helper.make_node("Add", ["narrow_dq", "wide_dq"], ["sum"], "sum")
    nodes = [*pair("image", "narrow"), *pair("image", "wide"), add, *pair("sum", "logits", "logits")]
    wide = quantization("wide", 0.010123, 30000, TensorProto.UINT16)
    return network(nodes, [*quantization("narrow", 0.5, 100), *wide, *quantization("logits", 0.3, 128)])


def run(proto, image=IMAGE):
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image})[0]


def operators(proto):
    return [node.op_type for node in proto.graph.node]


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
def test_an_exported_network_has_no_quantizer_of_a_float_layer_and_equal_scales_around_resizes():
    graph = onnx.load(exported(PRE_DOWN).folder / MODEL_FILE).graph
    index = GraphIndex.of(graph)
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    floats = [node for node in convolutions if index.operator(node.input[0]) != "DequantizeLinear"]
    assert [node.name for node in floats] == ["backbone_model.conv0"]
    assert not any(tensor in index.producers for node in floats for tensor in node.input[1:])
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    assert len(resizes) == 6
    for node in resizes:
        (consumer,) = index.consumers[node.output[0]]
        assert consumer.input[1:] == index.producers[node.input[0]].input[1:]


def widths(node, index):
    """The types of the activations that a layer reads and of its output, behind its ReLU."""
    types = set()
    for name in node.input:
        dequantizer = index.producers.get(name)
        if dequantizer is not None and dequantizer.op_type == "DequantizeLinear":
            quantizer = index.producers.get(dequantizer.input[0])
            if quantizer is not None and quantizer.input[0] not in index.constants:
                types.add(index.integer_type(dequantizer))
    (consumer,) = index.consumers[node.output[0]]
    (quantizer,) = index.consumers[consumer.output[0]] if consumer.op_type == "Relu" else (consumer,)
    return types | {index.integer_type(quantizer)}


def largest_bias_error(proto):
    """The largest relative difference of a bias's scale to the input's scale times the weight's."""
    index = GraphIndex.of(proto.graph)
    scales = [
        [
            numpy_helper.to_array(index.constants[index.producers[name].input[1]]).astype(np.float64)
            for name in node.input
        ]
        for node in proto.graph.node
        if node.op_type == "Conv" and node.input[1] not in index.constants
    ]
    return max(np.abs(bias / (source * weight.flatten()) - 1).max() for source, weight, bias in scales)


def test_a_layer_of_two_widths_reads_and_writes_16_bits_and_computes_the_same():
    proto = add_of_two_widths()
    expected = run(proto)
    unify_bit_widths(proto.graph)
    index = GraphIndex.of(proto.graph)
    assert widths(index.producers["sum"], index) == {"uint16"}
    assert index.integer_type(index.producers["logits_q"]) == "uint8"
    assert np.array_equal(run(proto), expected)


def test_8_bit_values_are_exact_in_16_bits_and_rounding_twice_is_rounding_once():
    scale, zero_point = np.array(0.0213, np.float32), np.array(130)
    wide_scale, wide_zero_point = widen(scale, zero_point)

    def quantize(values, scale, zero_point, largest):
        return np.clip(np.rint(values / scale.astype(np.float64)) + zero_point, 0, largest)

    integers = np.arange(256)
    assert np.array_equal(
        quantize((integers - zero_point) * scale.astype(np.float64), wide_scale, wide_zero_point, 65535), integers * 257
    )
    values = np.random.default_rng(0).uniform(-4, 4, 1_000_000)
    twice = (quantize(values, wide_scale, wide_zero_point, 65535) - wide_zero_point) * wide_scale.astype(np.float64)
    differing = quantize(twice, scale, zero_point, 255) != quantize(values, scale, zero_point, 255)
    assert differing.mean() < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("tensors", MIXES, ids=" ".join)
def test_each_layer_of_a_mixed_file_has_one_width_and_onnx_runtime_agrees_with_the_simulation(tensors, tmp_path):
    sim, path = export_mix(small_network(), tensors, tmp_path / "out")
    proto = onnx.load(path)
    index = GraphIndex.of(proto.graph)
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Add", "Concat", "Resize", "MaxPool")]
    assert len(layers) == 10 and all(len(widths(node, index)) == 1 for node in layers)
    assert largest_bias_error(proto) < 1e-5
    image = random_batches()[0][:1]
    with torch.no_grad():
        expected = lower(sim)(image).numpy()
    with open_with_onnx_runtime(path) as execute:
        logits = execute(image.numpy())["logits"]
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.98
    assert np.abs(logits - expected).mean() < 0.01 * expected.std()


def test_a_bias_that_does_not_fit_stays_in_float(tmp_path):
    model = three_layer_network()
    with torch.no_grad():
        model[2].weight[3], model[2].bias[3] = 1e-12, 40
    sim = simulate(model, cle=False, quant_scheme="tf")
    raise_weight_scales(sim)
    sim.model.get_submodule("3").output_quantizers[0].qmax = 65535  # without raising the weight scales again
    proto = onnx.load(export(sim, (64, 128), tmp_path / "out", {}) / MODEL_FILE)
    index = GraphIndex.of(proto.graph)
    biases = [index.operator(node.input[2]) for node in proto.graph.node if node.op_type == "Conv"]
    assert biases == ["DequantizeLinear", "", "DequantizeLinear"]
