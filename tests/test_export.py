"""The exported files, read back, against AIMET's simulation; and what lies under the final names if things go wrong."""

import hashlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ffnet import export
from ffnet.biases import fit_biases
from ffnet.errors import UserError
from ffnet.quantize import Recipe, quantizers
from tests.exports import SIZE, exported, simulated
from tests.test_quantize import DEMO, MODELS, network

WIDTHS = (
    (DEMO, 8, 8),
    (MODELS[1], 8, 8),
    *(pytest.param((DEMO, *bits), marks=pytest.mark.slow) for bits in ((4, 8), (8, 16))),
)


@pytest.fixture(params=MODELS)
def files(request):
    return exported(request.param, 8, 8)


def constants(proto):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize("case", WIDTHS, ids=str)
def test_every_quantizer_is_in_the_file_with_its_scale_and_zero_point(case):
    sim, folder = exported(*case).sim, exported(*case).folder
    proto = onnx.load(folder / "model.onnx")
    values = constants(proto)
    expected = {"image": _image_quantizer(sim)}
    for name, module in sim.model.named_modules():
        if hasattr(module, "output_quantizers"):
            tensor = "logits" if name == "head.layers.3.last_layer.3" else name
            expected[tensor] = module.output_quantizers[0]
            expected[f"{name}.weight"] = dict(module.param_quantizers).get("weight")
    expected = {tensor: quantizer for tensor, quantizer in expected.items() if quantizer is not None}
    found = {node.output[0]: node for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert {name.removesuffix("_q") for name in found} - {"module_pad"} == set(expected)  # the pad only moves data
    for tensor, quantizer in expected.items():
        _, scale, zero_point = found[f"{tensor}_q"].input
        assert values[scale].flatten().tolist() == quantizer.get_scale().flatten().tolist()
        assert values[zero_point].flatten().tolist() == (-quantizer.get_offset()).flatten().tolist()
    assert {id(quantizer) for quantizer in expected.values()} == {id(q) for _, q in quantizers(sim)}


def _image_quantizer(sim):
    first = sim.model.backbone_model.conv0 if not hasattr(sim.model, "module_pad") else sim.model.module_pad
    return first.input_quantizers[0]


def test_a_changed_scale_is_noticed(files):
    proto = onnx.load(files.folder / "model.onnx")
    export.compare_quantizers(files.sim, proto)
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "backbone_model.relu_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.float32(onnx.numpy_helper.to_array(scale) * 1.000001), scale.name))
    with pytest.raises(RuntimeError, match="backbone_model.relu"):
        export.compare_quantizers(files.sim, proto)


def test_files_pass_the_checker_with_the_promised_shapes_and_names(files):
    for name in ("model.onnx", "model_fp32.onnx"):
        onnx.checker.check_model(str(files.folder / name), full_check=True)
        proto = onnx.load(files.folder / name)
        ((image,), (logits,)) = proto.graph.input, proto.graph.output
        assert (image.name, logits.name) == ("image", "logits")
        assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [1, 3, *SIZE]
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 21)]
        assert not {n.op_type for n in proto.graph.node} & {"Shape", "Slice", "Gather", "Reshape", "Cast"}


def test_the_float_file_computes_what_the_network_does(files):
    session = onnxruntime.InferenceSession(files.folder / "model_fp32.onnx", providers=["CPUExecutionProvider"])
    image = files.inputs[1:]
    (logits,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        expected = files.model(image)
    assert np.abs(logits - expected.numpy()).max() < 1e-4 * expected.std()


def test_encodings_name_the_float_files_tensors_and_say_what_the_simulation_does(files):
    proto = onnx.load(files.folder / "model_fp32.onnx")
    tensors = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    encodings = json.loads((files.folder / "model.encodings").read_text())
    entries = {e["name"]: e for kind in ("activation_encodings", "param_encodings") for e in encodings[kind]}
    assert set(entries) <= tensors
    relu = files.sim.model.backbone_model.relu.output_quantizers[0]
    assert entries["backbone_model.relu"]["scale"] == pytest.approx([relu.get_scale().item()], rel=1e-6)
    weight = files.sim.model.backbone_model.conv1.param_quantizers["weight"].get_scale().flatten().tolist()
    assert entries["backbone_model.conv1.weight"]["scale"] == pytest.approx(weight, rel=1e-6)


def test_nodes_carry_their_layers_names(files):
    names = {node.name for node in onnx.load(files.folder / "model_fp32.onnx").graph.node}
    layers = {n for n, m in files.sim.model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ReLU))}
    assert layers <= names


def test_the_manifest_holds_facts_and_hashes(files):
    manifest = json.loads((files.folder / "manifest.json").read_text())
    assert manifest["model"] in MODELS and manifest["input"]["shape"] == [1, 3, *SIZE]
    assert {path.name for path in files.folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((files.folder / name).read_bytes()).hexdigest() == entry["sha256"]


def test_exporting_leaves_the_simulation_as_it_was(tmp_path):
    files = exported(DEMO, 8, 8)
    with torch.no_grad():
        before = files.sim.model(files.inputs)
        export.export(files.sim, (64, 128), tmp_path / "again", {})
        assert torch.equal(files.sim.model(files.inputs), before)


@pytest.mark.parametrize("stage", ("write_models", "compare_quantizers", "write_manifest", "move_in"))
def test_an_interrupted_export_leaves_nothing(stage, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.export(exported(DEMO, 8, 8).sim, (64, 128), tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_other_files_are_kept_and_need_force(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(UserError, match="notes.txt"):
        export.export(exported(DEMO, 8, 8).sim, (64, 128), tmp_path, {})
    assert (tmp_path / "model.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    export.export(exported(DEMO, 8, 8).sim, (64, 128), tmp_path, {}, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {*export.FILES, "notes.txt"}
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_folders_that_can_not_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=str(tmp_path / "file")):
            export.check_folder(folder)
    for folder in (tmp_path / "new", tmp_path / "a" / "b"):
        export.check_folder(folder)
        assert not folder.exists()
    with pytest.raises(UserError, match="can't be written"):
        export.check_folder("/proc/self/export")


@pytest.mark.parametrize("widths", ((5, 8), (8, 4), (8, 31), (16, 16)))
def test_bit_widths_that_nothing_executes_are_refused(widths):
    with pytest.raises(UserError, match="bits"):
        export.check_bitwidths(*widths)


def test_biases_of_dead_channels_fit_into_int32(tmp_path):
    model = network(DEMO)
    norm = model.backbone_model.layer2[1].bn1
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 1e-12, 0.7
    _, sim = simulated(DEMO, Recipe(cle=False), model)
    assert fit_biases(sim) == {}  # simulated() has done it
    export.export(sim, (64, 128), tmp_path / "out", {})
    values = constants(onnx.load(tmp_path / "out" / "model.onnx"))
    bias = "backbone_model.layer2.1.conv1.bias"
    dequantized = values[f"{bias}_q"] * values[f"{bias}_scale"].astype(np.float64)
    expected = sim.model.backbone_model.layer2.get_submodule("1.conv1").bias.detach().numpy()
    assert dequantized == pytest.approx(expected, abs=1e-6) and expected[3] == pytest.approx(0.7)
