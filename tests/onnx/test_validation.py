"""Files that must be refused before anything in them runs, and files that return probabilities."""

import os
import re

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ffnet.onnx.runtime import OnnxBackend, inspect_onnx
from ffnet.onnx.validation import check_onnx, describe_head
from ffnet.system.errors import UserError
from tests.helpers.onnx_files import color_network, convolution_network, external_weight, save


def branching():
    proto = convolution_network()
    branch = helper.make_graph([], "branch", [], [])
    proto.graph.node.append(helper.make_node("If", ["image0"], [], then_branch=branch, else_branch=branch))
    return proto


def with_function():
    proto = convolution_network()
    proto.functions.add(name="f", domain="mine")
    return proto


def without_opset():
    proto = convolution_network()
    del proto.opset_import[:]
    return proto


def huge_inside():
    proto = convolution_network()
    shape = numpy_helper.from_array(np.array([2**20, 2**20]), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["huge"]))
    return proto


def with_constant(value):
    proto = convolution_network()
    proto.graph.node.append(helper.make_node("Constant", [], ["constant"], value=value))
    return proto


def with_sparse_constant():
    proto = convolution_network()
    sparse_value = helper.make_sparse_tensor(external_weight("weights.bin"), TensorProto(name="indices"), [19, 3, 1, 1])
    proto.graph.node.append(helper.make_node("Constant", [], ["constant"], sparse_value=sparse_value))
    return proto


def class_ids():
    """A network that ends in an ArgMax."""
    proto = convolution_network()
    proto.graph.node[0].output[0] = "scores"
    proto.graph.node.append(helper.make_node("ArgMax", ["scores"], ["ids"], "argmax", axis=1))
    proto.graph.node.append(helper.make_node("Identity", ["ids"], ["logits"]))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.INT64, (1, 1, 8, 8)))
    return proto


def integer_input(*scales):
    """A network whose input is uint8 and read by a DequantizeLinear for each of the scales."""
    proto = convolution_network()
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    for number, scale in enumerate(scales):
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(scale), f"scale{number}"))
        node = helper.make_node("DequantizeLinear", ["image0", f"scale{number}"], [f"real{number}"])
        proto.graph.node.insert(number, node)
    proto.graph.node[-1].input[0] = "real0"
    return proto


HOSTILE = {
    "empty": (b"", "not an ONNX file"),
    "zip": (b"PK\x03\x04....", "zip archive"),
    "pickle": (b"\x80\x02}.", "pickle"),
    "html": (b"<!doctype html>", "HTML page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    "cut off": (convolution_network().SerializeToString()[:-40], "cut off|not an ONNX file"),
    "without nodes": (helper.make_model(helper.make_graph([], "none", [], [])), "holds no network"),
    "two inputs": (convolution_network(inputs=2), "2 inputs"),
    "batch of 4": (convolution_network(shape=(4, 3, 8, 8)), "batches of 4"),
    "endless side": (convolution_network(shape=(1, 3, 2**24, 2**24)), "of 844424930131968 elements"),
    "channels last": (
        convolution_network(shape=(1, 8, 8, 3)),
        "rules|channels are last; on AI Hub, leave out --force_",
    ),
    "class ids": (class_ids(), r"class ids \(argmax, ArgMax\). Export it without ArgMax"),
    "integers of a negative scale": (integer_input(-0.1), "no DequantizeLinear with one positive constant scale"),
    "integers of two scales": (integer_input(0.1, 0.2), "input 'image0' of integers, and no DequantizeLinear"),
    "compiled for a chip": (convolution_network(domain="com.microsoft", op="EPContext"), "compiled for one chip"),
    "custom operator": (convolution_network(domain="evil", op="Conv"), "operator evil.Conv, which is not in opset 17"),
    "branches": (branching(), "If, which branches"),
    "functions": (with_function(), "functions"),
    "sparse constant": (with_sparse_constant(), "sparse tensors"),
    "no opset": (without_opset(), "opset"),
    "huge tensor": (huge_inside(), "huge"),
    "missing data": (convolution_network(weight=external_weight("weights.bin")), "weights.bin.*not a regular file"),
    "data above": (convolution_network(weight=external_weight("../weights.bin")), "outside"),
    "data by a link": (convolution_network(weight=external_weight("link.bin")), "outside its folder"),
    "data in a device": (convolution_network(weight=external_weight("folder")), "not a regular file"),
    "data of an attribute above": (with_constant(external_weight("../weights.bin")), "outside"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_are_no_network_are_refused_and_never_run(case, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("was run"))
    folder = tmp_path / "given"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(bytes(228))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    content, message = HOSTILE[case]
    path = save(folder / "case.onnx", content)
    for use in (check_onnx, inspect_onnx, OnnxBackend):
        with pytest.raises(UserError, match=rf"case\.onnx: this file .*({message}).*\.$"):
            use(path)


@pytest.mark.parametrize(
    ("name", "offset", "problem"),
    (("short.bin", 0, "'short.bin', which has only 100 bytes"), ("whole.bin", -4, "External data .* tensor 'weight'")),
)
def test_data_beyond_the_file_that_should_hold_it_is_an_error(name, offset, problem, tmp_path):
    (tmp_path / "short.bin").write_bytes(bytes(100))
    (tmp_path / "whole.bin").write_bytes(bytes(228))
    path = save(tmp_path / "case.onnx", convolution_network(weight=external_weight(name, offset)))
    with pytest.raises(UserError, match=rf"case\.onnx: this file .*{problem}"):
        OnnxBackend(path)


def test_paths_that_are_not_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path, tmp_path / "none.onnx", tmp_path / "pipe.onnx"):
        with pytest.raises(UserError, match=str(path)):
            check_onnx(path)


def test_the_header_tells_what_the_network_takes_and_returns(tmp_path):
    header = check_onnx(save(tmp_path / "other.onnx", convolution_network(shape=("n", 3, 8, "w"))))
    assert (header.opset, header.input_name, header.output_name) == (17, "image0", "logits")
    assert header.input_shape == (None, 3, 8, None)


@pytest.mark.parametrize(
    ("end", "note"),
    (
        ([], "None"),
        (["LogSoftmax"], "None"),
        (["Softmax"], r"The file returns probabilities \(softmax, Softmax\), which"),
    ),
    ids=str,
)
def test_probabilities_are_noticed_and_logits_and_logarithms_need_no_note(end, note):
    colors = np.random.default_rng(0).random((19, 3))
    assert re.match(note, str(describe_head(color_network(colors, end), "logits")))


def test_resized_logarithmic_probabilities_predict_what_resized_logits_do():
    logits = torch.randn(1, 19, 16, 32, dtype=torch.float64)
    resized = [
        torch.nn.functional.interpolate(values, (128, 256), mode="bilinear").argmax(1)
        for values in (logits, logits.log_softmax(1), logits.softmax(1))
    ]
    assert torch.equal(resized[0], resized[1]) and not torch.equal(resized[0], resized[2])
