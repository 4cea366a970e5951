"""Find the layer that ONNX Runtime computes differently, in files that were changed on purpose."""

import onnx
import pytest

from ffnet.errors import UserError
from ffnet.onnx.divergence import Divergence, compare_layers, first_divergence
from ffnet.onnx.formats import MODEL_FILE
from ffnet.quantization.lowering import lower
from ffnet.quantization.sites import quantizer_sites
from tests.helpers.onnx_files import convolution_network, save


def divergences(files):
    return compare_layers(lower(files.sim), quantizer_sites(files.sim), files.folder / MODEL_FILE, files.inputs[1:])


def test_all_layers_agree_if_they_get_the_same_inputs(export_case):
    found = divergences(export_case)
    assert len(found) >= 4 and found[0].layer == "image" and found[-1].layer == "logits"
    assert max(divergence.steps for divergence in found) <= 1
    assert max(divergence.differing for divergence in found) < 0.01


def test_the_first_layer_that_diverges_is_named(export_case, tmp_path):
    path = tmp_path / "other.onnx"
    proto = onnx.load(export_case.folder / MODEL_FILE)
    changed, diverging = ("2.bias_q", "4.bias_q"), "3"
    if hasattr(export_case.model, "backbone_model"):
        changed = ("backbone_model.layer3.0.conv1.bias_q", "head.layers.1.fam_4.layers.0.bias_q")
        diverging = "backbone_model.layer3.0.relu"
    for tensor in proto.graph.initializer:
        if tensor.name in changed:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + 20_000, tensor.name))
    lowered, sites = lower(export_case.sim), quantizer_sites(export_case.sim)
    divergence = first_divergence(lowered, sites, save(path, proto), export_case.inputs[1:])
    assert divergence.layer == diverging and divergence.steps > 1
    with pytest.raises(UserError, match=r"other\.onnx: this file has no layer image"):
        first_divergence(lowered, sites, save(path, convolution_network()), export_case.inputs[1:, :, :8, :8])


@pytest.mark.slow
def test_biases_that_fit_into_int32_are_computed_as_simulated(dead_channel_exports):
    overflowing, fitting = (divergences(files) for files in dead_channel_exports)
    assert [divergence.layer for divergence in overflowing if divergence.steps > 1] == ["3"]
    assert max(divergence.steps for divergence in fitting) <= 1


def test_a_divergence_reads_as_a_sentence():
    assert str(Divergence("head.relu", 0.0123, 1)) == (
        "For the same input, 1.23 % of the values of head.relu differ between ONNX Runtime and the simulation, by at "
        "most 1 quantization step."
    )
