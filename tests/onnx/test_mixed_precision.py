"""Files with 8-bit and 16-bit activations and 4-bit and 8-bit weights, against the simulation and worked by hand."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ffnet.checkpoints.loading import load_checkpoint
from ffnet.chips import CHIPS
from ffnet.file_names import MODEL_FILE
from ffnet.npu.backend import NpuBackend
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.divergence import run_with_onnx_runtime
from ffnet.onnx.export import check_export, export
from ffnet.onnx.graph_index import GraphIndex
from ffnet.onnx.mixed_precision import unify_bit_widths, widen
from ffnet.quantization.lowering import lower
from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.exports import scenes
from tests.helpers.networks import DEMO, PRE_DOWN, demo_checkpoint, random_batches, three_layer_network
from tests.helpers.onnx_files import constant
from tests.helpers.simulations import raise_precision, simulate, small_network

MIXES = (  # of the small network
    ["block.conv2"],
    ["image", "block.module_relu_1", "block.conv1.weight"],
    ["module_cat", "block.relu", "adapter.layers.0.weight"],
    ["stem.layers.2", "block.downsample.0", "logits", "classifier.weight"],
)
DEMO_MIXES = (
    (DEMO, ["backbone_model.relu", "backbone_model.layer2.0.conv2", "head.layers.1.module_add_6", "logits"]),
    (DEMO, ["module_cat", "backbone_model.conv0.weight", "head.layers.3.last_layer.3.weight"]),
    (PRE_DOWN, ["image", "backbone_model.layer1.0.conv2", "head.layers.1.module_interpolate"]),
)


def export_mix(model, tensors, folder, batches=None):
    """The simulation and the file of a W4A8 network whose named activations have 16 bits, weights 8."""
    batches = random_batches() if batches is None else batches
    sim = simulate(model, batches, param_bw=4, quant_scheme="tf")
    raise_weight_scales(sim)
    raise_precision(sim, tensors)
    return sim, export(sim, batches[0].shape[2:], folder, {}) / MODEL_FILE


def simulated(sim, image):
    with torch.no_grad():
        return lower(sim)(image).numpy()


def add_of_two_widths():
    """An image of 8 bits, scale 0.5, added to itself in 16 bits, scale 0.010123; the sum has 8 bits, scale 0.3."""
    nodes = [
        *pair("image", "narrow"), *pair("image", "wide"),
        helper.make_node("Add", ["narrow_dq", "wide_dq"], ["sum"], "sum"), *pair("sum", "logits", "logits"),
    ]  # fmt: skip
    constants = [
        constant("narrow_scale", 0.5), constant("narrow_zero", 100, TensorProto.UINT8),
        constant("wide_scale", 0.010123), constant("wide_zero", 30000, TensorProto.UINT16),
        constant("logits_scale", 0.3), constant("logits_zero", 128, TensorProto.UINT8),
    ]  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 4, 4)) for name in ("image", "logits")]
    graph = helper.make_graph(nodes, "add", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def pair(tensor, name, output=None):
    """A Q/DQ pair."""
    scale = [f"{name}_scale", f"{name}_zero"]
    return (
        helper.make_node("QuantizeLinear", [tensor, *scale], [f"{name}_q"], f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *scale], [output or f"{name}_dq"], f"{name}_dq"),
    )


def widths(node, index):
    """The types of the activations that a layer reads and of its output, behind its ReLU."""
    types = set()
    for name in node.input:
        dequantizer = index.producers.get(name)
        if dequantizer is not None and dequantizer.op_type == "DequantizeLinear":
            quantizer = index.producers.get(dequantizer.input[0])
            if quantizer is not None and quantizer.input[0] not in index.constants:
                types.add(index.integer_type(dequantizer))
    (consumer,) = index.consumers_of(node)
    (quantizer,) = index.consumers_of(consumer) if consumer.op_type == "Relu" else (consumer,)
    return types | {index.integer_type(quantizer)}


def largest_bias_error(proto):
    """The largest relative difference of a bias's scale to the input's scale times the weight's."""
    index = GraphIndex.of(proto.graph)
    scales = [
        [index.value(index.producers[name].input[1]).astype(np.float64) for name in node.input]
        for node in proto.graph.node
        if node.op_type == "Conv" and node.input[1] not in index.constants
    ]
    return max(np.abs(bias / (source * weight.flatten()) - 1).max() for source, weight, bias in scales)


def test_a_layer_of_two_widths_reads_and_writes_16_bits_and_computes_the_same(tmp_path):
    proto = add_of_two_widths()
    onnx.save(proto, tmp_path / "before.onnx")
    unify_bit_widths(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, tmp_path / "after.onnx")
    index = GraphIndex.of(proto.graph)
    assert widths(index.producers["sum"], index) == {"uint16"}
    assert index.integer_type(index.producers["logits_q"]) == "uint8"
    image = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)
    before, after = (run_with_onnx_runtime(tmp_path / f"{name}.onnx", image) for name in ("before", "after"))
    assert np.array_equal(before["logits"], after["logits"])


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


@pytest.mark.parametrize("tensors", MIXES, ids=" ".join)
def test_each_layer_of_a_mixed_file_has_one_width_and_onnx_runtime_agrees_with_the_simulation(tensors, tmp_path):
    sim, path = export_mix(small_network(), tensors, tmp_path / "out")
    proto = onnx.load(path)
    index = GraphIndex.of(proto.graph)
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Add", "Concat", "Resize", "MaxPool")]
    assert len(layers) == 10 and all(len(widths(node, index)) == 1 for node in layers)
    assert largest_bias_error(proto) < 1e-5
    image = random_batches()[0][:1]
    expected = simulated(sim, image)
    logits = run_with_onnx_runtime(path, image.numpy())["logits"]
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.98
    assert np.abs(logits - expected).mean() < 0.01 * expected.std()


def test_a_file_with_a_quantizer_that_the_simulation_lacks_is_refused(tmp_path):
    sim, path = export_mix(three_layer_network(), ["3"], tmp_path / "out")
    proto = onnx.load(path)
    check_export(sim, proto)
    (scale,) = (tensor for tensor in proto.graph.initializer if tensor.name == "1_scale_wide")
    value = numpy_helper.to_array(scale) * np.float32(1.001)
    scale.CopyFrom(numpy_helper.from_array(value, scale.name))
    with pytest.raises(RuntimeError, match="a quantizer at 1_qdq_wide that the simulation lacks"):
        check_export(sim, proto)


def test_a_bias_that_does_not_fit_is_an_error(tmp_path):
    model = three_layer_network()
    with torch.no_grad():
        model[2].weight[3], model[2].bias[3] = 1e-12, 40
    sim = simulate(model, cle=False, quant_scheme="tf")
    raise_weight_scales(sim)
    sim.model.get_submodule("3").output_quantizers[0].qmax = 65535  # without raising the weight scales again
    with pytest.raises(RuntimeError, match="bias of 2 does not fit into int32"):
        export(sim, (64, 128), tmp_path / "out", {})


@pytest.mark.npu
@pytest.mark.parametrize("chip", ("sm8750", "sm8350"))
@pytest.mark.parametrize("tensors", [["3"], ["1", "2.weight"], ["logits"], ["image", "3", "logits"]], ids=" ".join)
def test_a_mixed_file_runs_whole_on_the_npu_with_its_biases(tensors, chip, tmp_path):
    sim, path = export_mix(three_layer_network(), tensors, tmp_path / "out")
    check_on_npu(sim, path, chip, random_batches()[0][:1], agreement=0.98)


@pytest.mark.npu
def test_a_layer_behind_a_max_pool_has_its_bias_on_the_npu(tmp_path):
    sim = simulate(small_network(), quant_scheme="tf")
    raise_weight_scales(sim)
    path = export(sim, (64, 128), tmp_path / "out", {}) / MODEL_FILE
    check_on_npu(sim, path, "sm8750", random_batches()[0][:1], agreement=0.98)


@pytest.mark.slow
@pytest.mark.npu
@pytest.mark.parametrize(("name", "tensors"), DEMO_MIXES)
def test_mixed_files_of_trained_networks_run_whole_on_the_npu(name, tensors, tmp_path):
    model = load_checkpoint(name, demo_checkpoint(name)).model
    sim, path = export_mix(model, tensors, tmp_path / "out", [scenes()[:1]])
    check_on_npu(sim, path, "sm8750", scenes()[1:], agreement=0.97)  # of 512 predictions


def check_on_npu(sim, path, chip, image, agreement):
    """Check that a file runs without the CPU on a chip and computes what the simulation does."""
    expected = simulated(sim, image)
    with NpuBackend(NpuTarget(path, CHIPS[chip])) as backend:
        logits = backend(image).numpy()
        assert backend.session.cpu_nodes == ()
    assert (logits.argmax(1) == expected.argmax(1)).mean() > agreement
    assert np.abs(logits - expected).mean() < 0.03 * expected.std()
