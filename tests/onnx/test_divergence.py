"""Find the layer that ONNX Runtime computes differently, in files that were changed on purpose."""

import onnx
import pytest

from ffnet.config import MODEL_FILE
from ffnet.onnx.divergence import compare_layers, first_divergence, largest_divergence
from ffnet.quantization.layers import Difference, LayerDivergence
from ffnet.quantization.lowering import lower
from ffnet.quantization.sites import quantizer_sites
from ffnet.system.errors import UserError
from tests.helpers.onnx_files import convolution_network, save

EQUAL = Difference(values=1000)


def divergences(files, path=None):
    path = path or files.folder / MODEL_FILE
    return compare_layers(lower(files.sim), quantizer_sites(files.sim), path, files.inputs[1:][None])


def with_changed_biases(files, path, names):
    """Write the file of an export with 20,000 added to the integers of some biases."""
    proto = onnx.load(files.folder / MODEL_FILE)
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + 20_000, tensor.name))
    return save(path, proto)


def test_all_layers_agree_if_they_get_the_same_inputs(export_case):
    found = divergences(export_case)
    assert len(found) >= 4 and found[0].layer == "image" and found[-1].layer == "logits"
    assert max(layer.own.largest_steps for layer in found) <= 1
    assert max(layer.own.differing for layer in found) < 0.01


def test_the_first_layer_that_diverges_is_named(export_case, tmp_path):
    changed, diverging = ("2.bias_q", "4.bias_q"), "3"
    if hasattr(export_case.model, "backbone_model"):
        changed = ("backbone_model.layer3.0.conv1.bias_q", "head.layers.1.fam_4.layers.0.bias_q")
        diverging = "backbone_model.layer3.0.relu"
    path = with_changed_biases(export_case, tmp_path / "other.onnx", changed)
    divergence = first_divergence(divergences(export_case, path))
    assert divergence.layer == diverging and divergence.own.largest_steps > 1


def test_a_difference_is_its_layers_own_and_in_total_reaches_the_layers_after_it(small_export, tmp_path):
    path = with_changed_biases(small_export, tmp_path / "other.onnx", ("2.bias_q",))
    image, first, second, logits = divergences(small_export, path)
    assert image.total == image.own and image.total.largest_steps == 0 and first.total == first.own
    assert second.own.mean_steps > 1 and second.total.mean_steps > 1
    assert logits.own.largest_steps <= 1 < logits.total.mean_steps


def test_the_layer_that_adds_most_has_the_largest_mean_difference_for_the_same_input():
    layers = [
        LayerDivergence("image", EQUAL, EQUAL),
        LayerDivergence("often by one", Difference(1000, 300, 300, 1), Difference(1000, 300, 300, 1)),
        LayerDivergence("rarely by much", Difference(1000, 10, 200, 20), Difference(1000, 900, 5000, 20)),
    ]
    assert largest_divergence(layers).layer == "often by one"
    assert first_divergence(layers).layer == "often by one"
    assert largest_divergence(layers[:1]) is None and first_divergence(layers[:1]) is None


def test_a_file_of_another_network_is_refused(small_export, tmp_path):
    with pytest.raises(UserError, match=r"other\.onnx: this file has no layer image"):
        divergences(small_export, save(tmp_path / "other.onnx", convolution_network()))


@pytest.mark.slow
def test_biases_that_fit_into_int32_are_computed_as_simulated(dead_channel_exports):
    overflowing, fitting = (divergences(files) for files in dead_channel_exports)
    assert [layer.layer for layer in overflowing if layer.own.largest_steps > 1] == ["3"]
    assert max(layer.own.largest_steps for layer in fitting) <= 1
