"""Compare the exported files with AIMET's simulation, and see what is in the folder if something goes wrong."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ffnet.config import EXPORT_FILES, FLOAT_MODEL_FILE, MODEL_FILE, QuantizationConfig
from ffnet.onnx import export as export_module
from ffnet.onnx.export import export
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.system.errors import UserError
from tests.helpers.exports import exported
from tests.helpers.networks import DEMO, three_layer_network


@pytest.fixture
def copied_models(small_export, monkeypatch):
    """Have `export` copy models instead of converting a simulation, which takes seconds."""

    def write_models(sim, size, work):
        for name in EXPORT_FILES[:-1]:
            shutil.copy(small_export.folder / name, work)

    monkeypatch.setattr(export_module, "write_models", write_models)


def first_quantized(sim, kind):
    """Name and module of the first layer of a kind whose output or weight is quantized."""
    return next(
        (name, module)
        for name, module in sim.model.named_modules()
        if isinstance(module, kind) and (module.output_quantizers[0] or dict(module.param_quantizers).get("weight"))
    )


def constants(proto):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def check_every_quantizer(sim, path):
    """Compare the Q/DQ nodes of a file with the quantizers that a walk through AIMET's modules finds."""
    proto = onnx.load(path)
    values = constants(proto)
    first, last = "0", "4"  # layers of the network of three layers
    if hasattr(sim.model, "backbone_model"):
        first = "module_pad" if hasattr(sim.model, "module_pad") else "backbone_model.conv0"
        last = "head.layers.3.last_layer.3"
    expected = {"image": sim.model.get_submodule(first).input_quantizers[0]}
    for name, module in sim.model.named_modules():
        if hasattr(module, "output_quantizers"):
            tensor = "logits" if name == last else name
            expected[tensor] = module.output_quantizers[0]
            expected[f"{name}.weight"] = dict(module.param_quantizers).get("weight")
    expected = {tensor: quantizer for tensor, quantizer in expected.items() if quantizer is not None}
    found = {node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    others = {name for name in found if name.endswith(("_copied_q", ".bias_q"))} | {"module_pad_q"}  # no sites
    folded = {"backbone_model.conv0.weight"} if "smoothing" in dict(sim.model.named_modules()) else set()
    assert {name.removesuffix("_q") for name in found.keys() - others} == expected.keys() - folded
    for tensor, quantizer in expected.items():
        if "weight" in tensor:
            with torch.no_grad():
                weight = quantizer(sim.model.get_parameter(tensor)).numpy()
            integers = np.rint(weight / quantizer.get_scale().detach().numpy())
            stored = values[f"{tensor}_rounded" if tensor in folded else f"{tensor}_q"]
            assert np.array_equal(stored.astype(np.float32), weight if tensor in folded else integers)
        if tensor in folded:
            continue
        _, scale, zero_point = found[f"{tensor}_q"].input
        assert values[scale].flatten().tolist() == quantizer.get_scale().flatten().tolist()
        assert values[zero_point].flatten().tolist() == (-quantizer.get_offset()).flatten().tolist()
    assert {id(quantizer) for quantizer in expected.values()} == {id(q) for _, q in sim.named_quantizers()}


def test_every_quantizer_is_in_the_file_with_its_scale_and_zero_point(export_case):
    check_every_quantizer(export_case.sim, export_case.folder / MODEL_FILE)


@pytest.mark.slow
def test_quantizers_of_other_bit_widths_are_in_the_file():
    files = exported(DEMO, 4, 16)
    check_every_quantizer(files.sim, files.folder / MODEL_FILE)


def test_files_pass_the_onnx_checker_and_have_static_shapes(export_case):
    for name in (MODEL_FILE, FLOAT_MODEL_FILE):
        onnx.checker.check_model(str(export_case.folder / name), full_check=True)
        proto = onnx.load(export_case.folder / name)
        ((image,), (logits,)) = proto.graph.input, proto.graph.output
        assert (image.name, logits.name) == ("image", "logits")
        assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [1, 3, *export_case.size]
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 21)]
        assert not {n.op_type for n in proto.graph.node} & {"Shape", "Slice", "Gather", "Reshape", "Cast"}
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        assert (metadata["ffnet.input"], metadata["ffnet.channels"]) == ("normalized", "rgb")


def test_files_hold_no_paths_of_the_machine_that_exported_them(small_export):
    for name in EXPORT_FILES:
        content = (small_export.folder / name).read_bytes()
        assert b"site-packages" not in content and b"stack_trace" not in content


def test_the_float_file_computes_what_the_network_does(export_case):
    session = onnxruntime.InferenceSession(export_case.folder / FLOAT_MODEL_FILE, providers=["CPUExecutionProvider"])
    image = export_case.inputs[1:]
    (logits,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        expected = export_case.model(image)
    assert np.abs(logits - expected.numpy()).max() < 1e-4 * expected.std()


def test_the_float_file_holds_the_equalized_weights(export_case):
    values = constants(onnx.load(export_case.folder / FLOAT_MODEL_FILE))
    parameters = {name: value for name, value in export_case.sim.model.named_parameters() if "_quantizers" not in name}
    assert len(parameters) >= 6
    for name, value in parameters.items():
        assert np.array_equal(values[name], value.detach().as_subclass(torch.Tensor).numpy())


def test_encodings_name_tensors_of_the_float_file_and_hold_the_simulations_scales(export_case):
    proto = onnx.load(export_case.folder / FLOAT_MODEL_FILE)
    tensors = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    encodings = json.loads((export_case.folder / "model.encodings").read_text())
    entries = {e["name"]: e for kind in ("activation_encodings", "param_encodings") for e in encodings[kind]}
    assert set(entries) <= tensors
    name, relu = first_quantized(export_case.sim, torch.nn.ReLU)
    assert entries[name]["scale"] == pytest.approx([relu.output_quantizers[0].get_scale().item()], rel=1e-6)
    name, convolution = first_quantized(export_case.sim, torch.nn.Conv2d)
    weight = convolution.param_quantizers["weight"].get_scale().flatten().tolist()
    assert entries[f"{name}.weight"]["scale"] == pytest.approx(weight, rel=1e-6)


def test_nodes_carry_the_names_of_their_layers(export_case):
    layers = {n for n, m in export_case.sim.model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ReLU)}
    for name in (MODEL_FILE, FLOAT_MODEL_FILE):
        assert layers <= {node.name for node in onnx.load(export_case.folder / name).graph.node}


def test_the_manifest_holds_provenance_and_hashes(export_case):
    manifest = json.loads((export_case.folder / "manifest.json").read_text())
    assert manifest["model"] == "of a test" and manifest["input"]["shape"] == [1, 3, *export_case.size]
    assert {path.name for path in export_case.folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((export_case.folder / name).read_bytes()).hexdigest() == entry["sha256"]


def test_an_export_leaves_the_simulation_as_it_was(export_case):
    with torch.no_grad():
        assert torch.equal(export_case.sim.model(export_case.inputs), export_case.logits)


def test_a_new_export_removes_compiled_networks_of_the_old_one_and_no_other_file(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for name in ("sm8550/model_ctx.onnx", "sm8550/model_ctx_qnn.bin", "sm8450/model_ctx.onnx", "mine/a"):
        (old / "npu" / name).parent.mkdir(parents=True, exist_ok=True)
        (old / "npu" / name).write_text("old")
    (new / "npu" / "sm8550").mkdir(parents=True)
    for name in ("npu/sm8550/model_ctx.onnx", MODEL_FILE):
        (new / name).write_text("new")
    export_module.move_files(new, old)
    files = {str(path.relative_to(old)): path.read_text() for path in old.rglob("*") if path.is_file()}
    assert files == {"npu/sm8550/model_ctx.onnx": "new", MODEL_FILE: "new", "npu/mine/a": "old"}


@pytest.mark.parametrize("stage", ("write_models", "write_manifest", "move_files"))
def test_an_interrupted_export_leaves_nothing(stage, small_export, copied_models, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(small_export.sim, (64, 128), tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_whose_encodings_lack_a_quantizer_leaves_nothing(small_export, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "layer_tensors", lambda graph: {})
    with pytest.raises(RuntimeError, match="has no entry for 1"):
        export(small_export.sim, (64, 128), tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_keeps_its_other_files(small_export, copied_models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.onnx").write_text("old")
    export(small_export.sim, (64, 128), tmp_path, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {*EXPORT_FILES, "notes.txt"}
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_further_files_are_written_beside_the_models_and_described_in_the_manifest(
    small_export, copied_models, tmp_path
):
    def compile_for(work):
        (work / "npu" / "sm8750").mkdir(parents=True)
        (work / "npu" / "sm8750" / "model_ctx.onnx").write_bytes((work / MODEL_FILE).read_bytes())
        return {"npu": {"chip": "sm8750"}}

    folder = export(small_export.sim, (64, 128), tmp_path / "out", {}, compile_for=compile_for)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["npu"] == {"chip": "sm8750"} and "npu/sm8750/model_ctx.onnx" in manifest["files"]
    assert (folder / "npu" / "sm8750" / "model_ctx.onnx").exists()


def test_simulations_that_no_file_can_express_are_refused(tmp_path):
    prepared = equalize(three_layer_network())
    for bit_widths, message in (((5, 8), "5 bits"), ((8, 4), "4 bits"), ((16, 16), "biases overflow")):
        sim = build_quantsim(prepared, QuantizationConfig(param_bw=bit_widths[0], output_bw=bit_widths[1]))
        with pytest.raises(UserError, match=message):
            export(sim, (64, 128), tmp_path / "out", {})
    sim = build_quantsim(prepared, QuantizationConfig())
    second = sim.model.get_submodule("2")
    second.input_quantizers[0] = sim.model.get_submodule("0").input_quantizers[0]
    with pytest.raises(UserError, match="--config-file: 2 quantizes its own input"):
        export(sim, (64, 128), tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_biases_of_channels_without_weights_are_exact_in_the_file(dead_channel_exports):
    _, fitting = dead_channel_exports
    values = constants(onnx.load(fitting.folder / MODEL_FILE))
    scale, bias = values["2.bias_scale"].astype(np.float64), fitting.model[2].bias.detach().numpy()
    assert np.abs(values["2.bias_q"] * scale - bias).max() <= 0.501 * scale.max()
    assert values["2.bias_q"][3] * scale[3] == pytest.approx(40)
