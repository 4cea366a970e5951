"""Find the layer that ONNX Runtime computes differently, in files that were changed on purpose."""

import onnx
import pytest

from ffnet.config import MODEL_FILE
from ffnet.onnx.divergence import compare_layers, describe_divergence
from ffnet.quantization.layers import Sqnr, noisiest
from ffnet.quantization.lowering import lower
from ffnet.quantization.sites import quantizer_sites
from ffnet.system.errors import UserError
from tests.helpers.onnx_files import convolution_network, save


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
    assert len(found) >= 4 and list(found)[0] == "image" and list(found)[-1] == "logits"
    assert min(each.own for each in found.values() if each.own is not None) > 45


def test_the_layer_that_diverges_is_named_and_the_layers_after_it_differ_in_total_only(small_export, tmp_path):
    found = divergences(small_export, with_changed_biases(small_export, tmp_path / "other.onnx", ("2.bias_q",)))
    assert noisiest(found)[0] == "3" and found["3"].own < 20 and found["3"].total < 20
    assert found["image"] == Sqnr(None, None) and found["1"].total == found["1"].own
    assert found["logits"].total < 20 and (found["logits"].own is None or found["logits"].own > 45)
    sentence = describe_divergence(found, "INT8 NPU")
    assert sentence.startswith("For the same input, 3 of INT8 NPU is farthest from the simulation, with an SQNR of ")
    assert describe_divergence({"image": found["image"]}, "NPU").startswith("For the same input, every layer of NPU ")


def test_a_file_of_another_network_is_refused(small_export, tmp_path):
    with pytest.raises(UserError, match=r"other\.onnx: this file has no layer image"):
        divergences(small_export, save(tmp_path / "other.onnx", convolution_network()))


@pytest.mark.slow
def test_biases_that_fit_into_int32_are_computed_as_simulated(dead_channel_exports):
    overflowing, fitting = (divergences(files) for files in dead_channel_exports)
    assert [name for name in noisiest(overflowing) if overflowing[name].own < 30] == ["3"]
    assert all(fitting[name].own > 30 for name in noisiest(fitting))
