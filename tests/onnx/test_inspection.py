"""Which convolutions run on integer kernels, and the reasons given for the others."""

import onnx
import pytest
from onnx import numpy_helper

from ffnet.config import FLOAT_MODEL_FILE, MODEL_FILE
from ffnet.onnx.inspection import inspect_onnx
from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.exports import export_simulation, exported
from tests.helpers.networks import DEMO, PRE_DOWN, golden_model, random_batches, three_layer_network
from tests.helpers.onnx_files import convolution_network, save
from tests.helpers.simulations import simulate, small_network

BIAS_SCALE = "the scale of its bias is not that of its input times that of its weight"


def test_all_convolutions_run_on_integer_kernels(small_export):
    facts = inspect_onnx(small_export.folder / MODEL_FILE)
    assert facts.quantized and (facts.integer, facts.convolutions, facts.floats) == (3, 3, {})
    assert list(facts.lines()) == [
        "The file is quantized (QDQ or integer operators), of opset 21.",
        "Its input 'image' takes 64x128 pixels; images of another size are resized bilinearly to it, and logits to the "
        "size of the labels.",
        "Convolutions that run on integer kernels: 3 of 3.",
    ]


@pytest.mark.slow
def test_only_the_first_two_convolutions_of_a_pre_down_network_run_in_float():
    facts = inspect_onnx(exported(DEMO).folder / MODEL_FILE)
    assert facts.quantized and (facts.integer, facts.convolutions, facts.floats) == (31, 31, {})
    facts = inspect_onnx(exported(PRE_DOWN).folder / MODEL_FILE)
    assert (facts.integer, facts.convolutions) == (29, 31)
    assert list(facts.floats) == ["smoothing", "backbone_model.conv0"]
    assert facts.floats["backbone_model.conv0"] == "its input (smoothing) and weight are not quantized"
    reason = facts.floats["backbone_model.conv0"]
    assert facts.lines()[-1] == f"1 convolution runs in float: {reason} (backbone_model.conv0)."


def test_a_convolution_whose_weight_is_not_quantized_is_named(small_export, tmp_path):
    proto = onnx.load(small_export.folder / MODEL_FILE)
    (node,) = (node for node in proto.graph.node if node.name == "2")
    node.input[1] = "2.weight"
    facts = inspect_onnx(save(tmp_path / "other.onnx", proto))
    assert (facts.integer, facts.convolutions) == (2, 3)
    assert facts.floats == {"2": "its weight is not quantized"}


def test_convolutions_in_float_for_the_same_reason_share_a_sentence(tmp_path):
    model = three_layer_network()
    sim = simulate(model, param_bw=4, quant_scheme="tf")
    raise_weight_scales(sim)
    facts = inspect_onnx(export_simulation(model, sim, random_batches()[0], tmp_path / "out").folder / MODEL_FILE)
    assert facts.kernel_lines() == [
        "Convolutions that run on integer kernels: 0 of 3.",
        "3 convolutions run in float: ONNX Runtime has no integer kernel for int4 (0, 2, 4).",
    ]


def test_float_files_are_recognized(export_case):
    facts = inspect_onnx(export_case.folder / FLOAT_MODEL_FILE)
    assert not facts.quantized and facts.integer == 0 and facts.header.opset == 21 and not facts.floats


def test_files_of_any_size_are_described(tmp_path):
    facts = inspect_onnx(save(tmp_path / "other.onnx", convolution_network(shape=("n", 3, "h", "w"))))
    assert facts.convolutions == 1 and not facts.quantized
    assert list(facts.lines())[1] == "Its input 'image0' takes any size, so images are not resized."


@pytest.mark.slow
def test_16_bit_activations_are_named_as_the_reason():
    facts = inspect_onnx(exported(DEMO, 8, 16).folder / MODEL_FILE)
    assert facts.integer == 0 and all("uint16" in reason for reason in facts.floats.values())


def exported_without_cache(model, folder):
    sim = simulate(model, quant_scheme="tf")
    raise_weight_scales(sim)
    return export_simulation(model, sim, random_batches()[0], folder)


def test_convolutions_after_a_max_pool_run_on_integer_kernels(tmp_path):
    """AIMET writes another scale for their biases, which no integer kernel takes; the export rewrites them."""
    facts = inspect_onnx(exported_without_cache(small_network(), tmp_path / "export").folder / MODEL_FILE)
    assert facts.integer == facts.convolutions and not facts.floats


def test_a_bias_of_another_scale_keeps_a_convolution_in_float(small_export, tmp_path):
    proto = onnx.load(small_export.folder / MODEL_FILE)
    (scale,) = (tensor for tensor in proto.graph.initializer if tensor.name == "2.bias_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    assert inspect_onnx(save(tmp_path / "other.onnx", proto)).floats == {"2": BIAS_SCALE}


@pytest.mark.slow
def test_all_convolutions_of_a_published_network_with_a_max_pool_run_on_integer_kernels(tmp_path):
    model = golden_model("segmentation_ffnet18_dAAC")
    facts = inspect_onnx(exported_without_cache(model, tmp_path / "export").folder / MODEL_FILE)
    assert facts.integer == facts.convolutions and not facts.floats
