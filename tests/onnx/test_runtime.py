"""ONNX Runtime's integer kernels against AIMET's simulation, and which convolutions run on them."""

import resource

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from ffnet.config import FLOAT_MODEL_FILE, MODEL_FILE
from ffnet.evaluation.postprocessing import predict
from ffnet.onnx.runtime import OnnxBackend, inspect_onnx, open_session, resize, run_session
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.system.errors import UserError
from tests.helpers.exports import export_simulation, exported
from tests.helpers.networks import DEMO, PRE_DOWN, random_batches, three_layer_network
from tests.helpers.onnx_files import convolution_network, external_weight, save
from tests.helpers.simulations import simulate, small_network


def agreement(files):
    """Share of pixels that ONNX Runtime and AIMET's own simulation predict the same class for."""
    with torch.inference_mode():
        simulated = predict(files.sim.model(files.inputs), files.size)
        executed = predict(OnnxBackend(files.folder / MODEL_FILE)(files.inputs), files.size)
    return (simulated == executed).float().mean().item()


def test_onnx_runtime_predicts_what_the_simulation_does(export_case):
    assert agreement(export_case) > 0.995


@pytest.mark.slow
def test_4_bit_weights_run_too():
    assert agreement(exported(DEMO, 4, 8)) > 0.99


def test_images_are_resized_to_the_size_of_the_file(export_case):
    backend = OnnxBackend(export_case.folder / MODEL_FILE)
    images = torch.randn(2, 3, 200, 300)
    expected = torch.nn.functional.interpolate(images, export_case.size, mode="bilinear", antialias=True)
    assert torch.equal(backend(images), torch.cat([backend(image[None]) for image in expected]))
    assert resize(images, (None, None)) is images


@pytest.mark.parametrize("shape", ((1, 3, 8, 8), ("n", 3, "h", "w"), (1, 3, "h", "w")), ids=str)
def test_files_of_other_tools_run(shape, tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.ones(57, np.float32).tobytes())
    path = save(tmp_path / "other.onnx", convolution_network(shape=shape, weight=external_weight("weights.bin")))
    images = torch.randn(2, 3, 12, 10)
    expected = resize(images, (8, 8)) if shape[2] == 8 else images
    logits = OnnxBackend(path)(images)
    assert torch.allclose(logits, expected.sum(1, keepdim=True).expand(-1, 19, -1, -1), atol=1e-5)


def test_errors_of_onnx_runtime_name_the_file(tmp_path):
    path = save(tmp_path / "other.onnx", convolution_network())
    with pytest.raises(UserError, match=r"other\.onnx: ONNX Runtime failed .*\(Got invalid dimensions.*\)"):
        run_session(open_session(path), ["logits"], {"image0": np.zeros((1, 3, 4, 8), np.float32)}, path)
    proto = onnx.load(path)
    proto.graph.node[0].op_type = "Convolve"
    with pytest.raises(UserError, match=r"other\.onnx: ONNX Runtime [\d.]+ can't run .*Convolve"):
        open_session(path, proto)


def test_a_full_temporary_folder_is_not_blamed_on_the_file(small_export):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^TMPDIR: .*optimized\.onnx can't be written\. Free some space"):
            inspect_onnx(small_export.folder / MODEL_FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_asks_for_too_much_memory_is_named(tmp_path):
    shape = numpy_helper.from_array(np.array([1, 2**20, 2**16, 64]), "shape")
    values = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Expand", ["x", "shape"], ["y"])], "g", *([v] for v in values), [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = save(tmp_path / "large.onnx", model)
    with pytest.raises(UserError, match=r"large\.onnx: The memory does not suffice to run this file"):
        run_session(open_session(path), ["y"], {"x": np.zeros((1, 1, 1, 1), np.float32)}, path)


def test_a_file_whose_convolutions_all_run_on_integer_kernels_is_described(small_export):
    description = inspect_onnx(small_export.folder / MODEL_FILE)
    assert description.quantized and (description.integer, description.convolutions, description.floats) == (3, 3, ())
    assert description.lines() == [
        "The file is quantized (QDQ or integer operators), of opset 21.",
        "Its input 'image' takes 64x128 pixels; other images are resized bilinearly to it, and logits to the size of "
        "the labels.",
        "Convolutions that run on integer kernels: 3 of 3.",
    ]


@pytest.mark.slow
def test_convolutions_of_a_trained_network_that_run_in_float_are_named():
    description = inspect_onnx(exported(PRE_DOWN).folder / MODEL_FILE)
    assert (description.convolutions, description.integer) == (31, 29)
    assert description.floats == ("smoothing", "backbone_model.conv0")


def with_float_weight(proto):
    (node,) = (node for node in proto.graph.node if node.name == "2")
    node.input[1] = "2.weight"
    (integers,) = (tensor for tensor in proto.graph.initializer if tensor.name == "2.weight_q")
    proto.graph.initializer.append(
        numpy_helper.from_array(numpy_helper.to_array(integers).astype(np.float32), "2.weight")
    )


def with_another_bias_scale(proto):
    (scale,) = (tensor for tensor in proto.graph.initializer if tensor.name == "2.bias_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))


@pytest.mark.parametrize("change", (with_float_weight, with_another_bias_scale))
def test_a_convolution_that_fits_no_integer_kernel_is_named(change, small_export, tmp_path):
    proto = onnx.load(small_export.folder / MODEL_FILE)
    change(proto)
    description = inspect_onnx(save(tmp_path / "other.onnx", proto))
    assert (description.integer, description.convolutions, description.floats) == (2, 3, ("2",))


def exported_anew(model, folder, **config):
    sim = simulate(model, quant_scheme="tf", **config)
    raise_weight_scales(sim)
    return export_simulation(model, sim, random_batches()[0], folder).folder / MODEL_FILE


@pytest.mark.slow
def test_weights_of_4_bits_run_in_float(tmp_path):
    description = inspect_onnx(exported_anew(three_layer_network(), tmp_path / "out", param_bw=4))
    assert description.kernel_lines() == [
        "Convolutions that run on integer kernels: 0 of 3.",
        "Convolutions that run in float: 3 (0, 2, 4).",
    ]


@pytest.mark.slow
def test_convolutions_after_a_max_pool_run_on_integer_kernels(tmp_path):
    """AIMET writes another scale for their biases, which no integer kernel takes; the export rewrites them."""
    description = inspect_onnx(exported_anew(small_network(), tmp_path / "out"))
    assert description.integer == description.convolutions and not description.floats


def test_float_files_and_files_of_any_size_are_described(small_export, tmp_path):
    description = inspect_onnx(small_export.folder / FLOAT_MODEL_FILE)
    assert not description.quantized and description.integer == 0 and not description.floats
    description = inspect_onnx(save(tmp_path / "other.onnx", convolution_network(shape=("n", 3, "h", "w"))))
    assert description.lines()[1] == "Its input 'image0' takes any size, so images are not resized."
