"""ONNX Runtime's integer execution against the simulation, and files that must be refused before anything runs."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ffnet import export, quantize
from ffnet.errors import UserError
from ffnet.evaluate import predict
from ffnet.execute import OnnxNetwork, inspect, resized
from ffnet.lower import lower
from ffnet.onnx_check import check_onnx
from ffnet.part import compare_layers, first_parting
from tests.exports import SIZE, exported, simulated
from tests.test_quantize import DEMO, MODELS
from tests.test_quantize import network as golden_network

pytestmark = pytest.mark.slow


@pytest.fixture(params=MODELS)
def files(request):
    return exported(request.param, 8, 8)


def agreement(files):
    """Share of pixels that execution and AIMET's own simulation predict alike."""
    with torch.inference_mode():
        simulated = predict(files.sim.model(files.inputs), SIZE)
        executed = predict(OnnxNetwork(files.folder / "model.onnx")(files.inputs), SIZE)
    return (simulated == executed).float().mean().item()


def test_executed_pixels_are_the_simulated_ones(files):
    assert agreement(files) > 0.995


@pytest.mark.parametrize("widths", ((4, 8), pytest.param((8, 16), marks=pytest.mark.slow)), ids=str)
def test_other_widths_execute_too(widths):
    assert agreement(exported(DEMO, *widths)) > 0.99


def test_all_convolutions_are_integer_but_the_two_in_front():
    facts = inspect(exported(DEMO, 8, 8).folder / "model.onnx")
    assert facts.quantized and (facts.integer, facts.convolutions, facts.floats) == (31, 31, {})
    facts = inspect(exported(MODELS[1], 8, 8).folder / "model.onnx")
    assert (facts.integer, facts.convolutions) == (29, 31)
    assert list(facts.floats) == ["smoothing", "backbone_model.conv0"]
    assert "input (smoothing) is not quantized" in facts.floats["backbone_model.conv0"]
    assert any("backbone_model.conv0" in line for line in facts.lines())


def test_float_files_are_called_so(files):
    facts = inspect(files.folder / "model_fp32.onnx")
    assert not facts.quantized and facts.integer == 0 and facts.header.opset == 21 and not facts.floats


@pytest.mark.slow
def test_wide_activations_are_named_as_the_reason():
    facts = inspect(exported(DEMO, 8, 16).folder / "model.onnx")
    assert facts.integer == 0 and all("uint16" in reason for reason in facts.floats.values())


@pytest.mark.slow
def test_convolutions_behind_a_max_pool_are_named(tmp_path):
    name = "segmentation_ffnet18_dAAC"
    _, sim = simulated(name, quantize.Recipe(), golden_network(name))
    facts = inspect(export.export(sim, SIZE, tmp_path / "export", {}) / "model.onnx")
    assert list(facts.floats) == [f"backbone_model.layer1.0.{layer}" for layer in ("conv1", "downsample.0")]
    assert all("behind a max pool" in reason for reason in facts.floats.values())


def test_layers_agree_when_fed_the_same(files):
    partings = compare_layers(lower(files.sim), files.folder / "model.onnx", files.inputs[1:])
    assert len(partings) > 40 and partings[0].layer == "image" and partings[-1].layer == "logits"
    assert max(parting.steps for parting in partings) <= 1
    assert max(parting.differing for parting in partings) < 0.01


def test_the_first_layer_that_parts_is_named(files, tmp_path):
    proto = onnx.load(files.folder / "model.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name in ("backbone_model.layer3.0.conv1.bias_q", "head.layers.1.fam_4.layers.0.bias_q"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 20_000, tensor.name))
    onnx.save(proto, tmp_path / "other.onnx")
    parting = first_parting(lower(files.sim), tmp_path / "other.onnx", files.inputs[1:])
    assert parting.layer == "backbone_model.layer3.0.relu" and parting.steps > 1
    with pytest.raises(UserError, match="other.onnx"):
        first_parting(lower(files.sim), save(tmp_path / "other.onnx", network()), files.inputs[1:, :, :8, :8])


def test_images_are_resized_to_the_files_size(files):
    network = OnnxNetwork(files.folder / "model.onnx")
    images = torch.randn(2, 3, 200, 300)
    expected = torch.nn.functional.interpolate(images, SIZE, mode="bilinear", antialias=True)
    assert torch.equal(network(images), torch.cat([network(image[None]) for image in expected]))
    assert resized(images, (None, None)) is images


# Files that no exporter of ours wrote


def network(channels=19, weight=None, inputs=1, shape=(1, 3, 8, 8), kind=TensorProto.FLOAT, **node):
    """A ModelProto of one 1x1 convolution."""
    weight = weight or numpy_helper.from_array(np.ones((channels, 3, 1, 1), np.float32), "weight")
    images = [helper.make_tensor_value_info(f"image{i}", kind, shape) for i in range(inputs)]
    output = helper.make_tensor_value_info("logits", kind, (None,) * 4)
    convolution = helper.make_node(node.pop("op", "Conv"), ["image0", "weight"], ["logits"], **node)
    graph = helper.make_graph([convolution], "network", images, [output], [weight])
    opsets = [helper.make_opsetid("", 17)] + [helper.make_opsetid(d, 1) for d in {node.get("domain")} - {None}]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def external(location, offset=0):
    """A weight whose data lies in another file."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=(19, 3, 1, 1))
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": 19 * 3 * 4}.items():
        weight.external_data.add(key=key, value=str(value))
    return weight


def save(path, proto):
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def branching():
    proto = network()
    branch = helper.make_graph([], "branch", [], [])
    proto.graph.node.append(helper.make_node("If", ["image0"], [], then_branch=branch, else_branch=branch))
    return proto


def with_function():
    proto = network()
    proto.functions.add(name="f", domain="mine")
    return proto


def without_opset():
    proto = network()
    del proto.opset_import[:]
    return proto


def huge_inside():
    proto = network()
    shape = numpy_helper.from_array(np.array([2**20, 2**20]), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["huge"]))
    return proto


HOSTILE = {
    "empty": (b"", "not an ONNX file"),
    "text": (b"hello, this is no network", "not an ONNX file"),
    "zip": (b"PK\x03\x04....", "zip archive"),
    "pickle": (b"\x80\x02}.", "pickle"),
    "html": (b"<!doctype html>", "HTML page"),
    "cut off": (network().SerializeToString()[:-40], "cut off|not an ONNX file"),
    "without nodes": (helper.make_model(helper.make_graph([], "none", [], [])), "no network is in it"),
    "two inputs": (network(inputs=2), "2 inputs"),
    "no input": (network(inputs=0), "rules|0 inputs"),
    "four channels in": (network(shape=(1, 4, 8, 8)), "rules|input 'image0'"),
    "double": (network(kind=TensorProto.DOUBLE), "rules|DOUBLE"),
    "rank 3": (network(shape=(3, 8, 8)), "rules|input"),
    "batch of 4": (network(shape=(4, 3, 8, 8)), "batches of 4"),
    "no height": (network(shape=(1, 3, 0, 8)), "input 'image0'"),
    "endless side": (network(shape=(1, 3, 2**20, 8)), "8192"),
    "21 channels out": (network(channels=21), "output 'logits'.*21"),
    "custom operator": (network(domain="evil", op="Conv"), "custom operator evil.Conv"),
    "operator of ONNX Runtime's": (network(domain="com.microsoft", op="EPContext"), "com.microsoft.EPContext"),
    "unknown operator": (network(op="Convolve"), "Convolve"),
    "branches": (branching(), "If, which branches"),
    "functions": (with_function(), "functions"),
    "no opset": (without_opset(), "opset"),
    "wrong attribute": (network(colour=3), "rules"),
    "huge tensor": (huge_inside(), "huge"),
    "missing data": (network(weight=external("weights.bin")), "weights.bin.*missing"),
    "data above": (network(weight=external("../weights.bin")), "outside"),
    "absolute data": (network(weight=external("/etc/passwd")), "outside"),
    "data by a link": (network(weight=external("link.bin")), "outside"),
    "data in a device": (network(weight=external("folder")), "missing"),
    "short data": (network(weight=external("short.bin")), "beyond the end"),
    "data before the start": (network(weight=external("whole.bin", -4)), "beyond the end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_unfit_files_are_named_and_never_run(case, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("was run"))
    folder = tmp_path / "given"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(bytes(228))
    (folder / "short.bin").write_bytes(bytes(100))
    (folder / "whole.bin").write_bytes(bytes(228))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    content, message = HOSTILE[case]
    path = save(folder / "case.onnx", content)
    for use in (check_onnx, inspect, OnnxNetwork):
        with pytest.raises(UserError, match=rf"case\.onnx: .*({message})"):
            use(path)


def test_paths_that_are_no_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(UserError, match=str(path)):
            check_onnx(path)


@pytest.mark.parametrize("shape", ((1, 3, 8, 8), ("n", 3, "h", "w"), (1, 3, "h", "w")), ids=str)
def test_other_tools_files_are_taken(shape, tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.ones(57, np.float32).tobytes())
    path = save(tmp_path / "other.onnx", network(shape=shape, weight=external("weights.bin")))
    images = torch.randn(2, 3, 12, 10)
    expected = resized(images, (8, 8)) if shape[2] == 8 else images
    logits = OnnxNetwork(path)(images)
    assert torch.allclose(logits, expected.sum(1, keepdim=True).expand(-1, 19, -1, -1), atol=1e-5)
    assert inspect(path).convolutions == 1 and not inspect(path).quantized
