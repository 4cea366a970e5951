"""Files as caches and converters leave them: links, nodes in any order, outdated shapes; and data elsewhere."""

import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from ffnet.onnx.reading import MAX_BYTES, read_onnx
from ffnet.onnx.runtime import OnnxBackend, inspect_onnx
from ffnet.system.errors import UserError
from tests.helpers.onnx_files import color_network, convolution_network, external_weight, save

COLORS = np.random.default_rng(0).random((19, 3))
IMAGES = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


def stored(folder, model="model.onnx", data="model.onnx.data", location="model.onnx.data"):
    """Write a network of ones that keeps its weight in another file, and return its path."""
    for name in (model, data):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / data).write_bytes(np.ones(57, np.float32).tobytes())
    return save(folder / model, convolution_network(weight=external_weight(location)))


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def hugging_face_cache(folder):
    stored(folder / "models--x" / "blobs", "aaa", "bbb")
    snapshot = folder / "models--x" / "snapshots" / "hash" / "onnx"
    link(snapshot / "model.onnx.data", "../../../blobs/bbb")
    return link(snapshot / "model.onnx", "../../../blobs/aaa")


def test_data_is_found_behind_the_links_of_hugging_faces_cache(tmp_path):
    path = hugging_face_cache(tmp_path)
    assert OnnxBackend(path)(torch.ones(1, 3, 8, 8)).unique().item() == 3
    assert inspect_onnx(path).convolutions == 1


def test_data_outside_the_folders_of_the_file_is_refused_after_links_are_resolved(tmp_path):
    path = stored(tmp_path / "store", data="other/data", location="model.onnx.data")
    link(path.with_name("model.onnx.data"), "other/data")
    read_onnx(path)  # a link within the folder
    outside = link(tmp_path / "named" / "model.onnx.data", tmp_path / "store" / "other" / "data")
    path.rename(outside.with_name("model.onnx"))
    with pytest.raises(UserError, match="'model.onnx.data', which is outside its folder. Copy the file and its data"):
        read_onnx(outside.with_name("model.onnx"))


def test_data_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = stored(tmp_path)
    os.truncate(tmp_path / "model.onnx.data", 60 << 30)
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[0].external_data[2]  # the length
    with pytest.raises(UserError, match=f"model.onnx: this file has, with its data, more than {MAX_BYTES} bytes"):
        read_onnx(save(path, proto))


def make_the_shapes_outdated(proto):
    proto.graph.value_info.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT16, (1, 19, 8, 8)))
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 8


def break_rules_that_do_not_matter(proto):
    proto.graph.ClearField("name")
    proto.ir_version = 3  # in which constants had to be inputs, too
    for _ in range(2):
        proto.metadata_props.add(key="author", value="twice")


def convert_to_float16(proto):
    converted = convert_float_to_float16(proto, keep_io_types=True, op_block_list=["LogSoftmax"])
    assert converted.graph.node[0].input[0] != "image"  # the Cast that reads it comes last
    proto.CopyFrom(converted)


CHANGES = (
    make_the_shapes_outdated,
    break_rules_that_do_not_matter,
    convert_to_float16,
    lambda proto: proto.CopyFrom(convert_float_to_float16(proto)),  # inputs and outputs, too
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_onnx_runtime_runs_is_evaluated_although_the_checker_of_onnx_refuses_it(change, tmp_path):
    expected = OnnxBackend(save(tmp_path / "plain.onnx", color_network(COLORS, ["LogSoftmax"])))(IMAGES)
    proto = color_network(COLORS, ["LogSoftmax"])
    change(proto)
    path = save(tmp_path / "changed.onnx", proto)
    assert inspect_onnx(path).convolutions == 1
    logits = OnnxBackend(path)(IMAGES)
    assert logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=0.02)


def test_layers_in_a_circle_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("was run"))
    proto = color_network(COLORS, ["LogSoftmax"])
    proto.graph.node[0].input[0] = "logits"
    with pytest.raises(UserError, match="circle.onnx: this file has layers that depend on their own output"):
        OnnxBackend(save(tmp_path / "circle.onnx", proto))


@pytest.mark.parametrize("operator", ("Constant", "Identity", "DequantizeLinear", "Cast"))
def test_nodes_without_inputs_outputs_and_attributes_are_an_error_that_names_the_file(operator, tmp_path):
    proto = color_network(COLORS, ["Softmax"])
    proto.graph.node.append(helper.make_node(operator, [], []))
    proto.graph.node[1].op_type = operator
    del proto.graph.node[1].attribute[:], proto.graph.node[1].input[:]
    with pytest.raises(UserError, match=r"broken\.onnx: "):
        OnnxBackend(save(tmp_path / "broken.onnx", proto))
