"""Qualcomm's runtime against ONNX Runtime and the simulation, and in processes that end during a call."""

import multiprocessing
import os
import signal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ffnet.checkpoints.loading import load_checkpoint
from ffnet.chips import CHIPS
from ffnet.config import MODEL_FILE, NpuConfig
from ffnet.npu import worker as npu_worker
from ffnet.npu.backend import NpuBackend, NpuProcess, open_on_npu, write_npu_contexts
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.divergence import open_with_onnx_runtime
from ffnet.onnx.export import export
from ffnet.quantization.lowering import lower
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.system.errors import UserError
from tests.helpers.exports import export_mix, scenes
from tests.helpers.networks import PRE_DOWN, demo_checkpoint, random_batches, three_layer_network
from tests.helpers.onnx_files import convolution_network, save
from tests.helpers.simulations import logits, simulate, small_network

pytestmark = pytest.mark.npu

CHIP = CHIPS["sm8750"]


@pytest.fixture
def target(small_export):
    return NpuTarget(small_export.folder / MODEL_FILE, CHIP)


def network_with_erf():
    """A network whose middle node, an Erf, the NPU refuses."""
    shape = (1, 3, 8, 16)
    image, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("image", "logits"))
    nodes = [
        helper.make_node("Relu", ["image"], ["first"], "first"),
        helper.make_node("Erf", ["first"], ["middle"], "middle"),
        helper.make_node("Relu", ["middle"], ["logits"], "last"),
    ]
    graph = helper.make_graph(nodes, "erf", [image], [logits], [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def session_of(target):
    with NpuProcess(target) as process:
        return process.call(npu_worker.describe_session)


def test_a_network_runs_whole_on_the_npu_and_computes_what_onnx_runtime_does(small_export, target, capfd):
    with NpuBackend(target, processes=2) as backend:
        outputs = backend(small_export.inputs.repeat(2, 1, 1, 1)[:3]).numpy()
        assert backend.session.cpu_nodes == () and len(backend.processes) == 2
        assert backend(small_export.inputs[:1, :, ::2, ::2]).shape == (1, 19, 16, 32)  # resized to the file's size
    assert capfd.readouterr().out == ""  # the library prints on stdout
    assert np.array_equal(outputs[0], outputs[2])
    with open_with_onnx_runtime(target.path) as execute:
        for image, computed in zip(small_export.inputs, outputs[:2], strict=True):
            expected = execute(image[None].numpy())["logits"]
            agreement = (computed.argmax(0) == expected[0].argmax(0)).mean()
            assert agreement > 0.97 and np.abs(computed - expected).max() < 0.1 * expected.std()


def test_a_node_that_the_npu_refuses_is_an_error_unless_the_fallback_is_allowed(tmp_path):
    path = save(tmp_path / "erf.onnx", network_with_erf())
    with pytest.raises(UserError, match=r"--npu sm8750: 1 node of .*erf\.onnx .*: middle\. Add --npu-fallback"):
        session_of(NpuTarget(path, CHIP))
    assert session_of(NpuTarget(path, CHIP, fallback=True)).cpu_nodes == ("middle",)


def test_a_chip_without_float_convolutions_refuses_one_by_name(tmp_path):
    path = save(tmp_path / "float.onnx", convolution_network(name="conv0"))
    assert session_of(NpuTarget(path, CHIP)).cpu_nodes == ()
    with pytest.raises(UserError, match=r"--npu qcs6490: .*float\.onnx can't be compiled .*: conv0 \("):
        session_of(NpuTarget(path, CHIPS["qcs6490"], fallback=True))


def test_a_compiled_network_gives_the_same_logits_in_a_fresh_process(small_export, target, tmp_path):
    (tmp_path / MODEL_FILE).write_bytes(target.path.read_bytes())
    described = write_npu_contexts(tmp_path, NpuConfig((CHIP.part,)))["npu"]
    context = tmp_path / "npu" / "sm8750" / "model_ctx.onnx"
    assert {node.op_type for node in onnx.load(context).graph.node} == {"EPContext"}
    assert [path.suffix for path in sorted(context.parent.iterdir())] == [".onnx", ".bin"]
    assert described["file"] == "npu/sm8750/model_ctx.onnx" and described["chip"]["soc_model"] == 69
    assert [(each["name"], each["shape"]) for each in described["inputs"]] == [("image", [1, 3, 64, 128])]
    (tmp_path / MODEL_FILE).unlink()  # the context does not need it
    image = small_export.inputs[:1].numpy()
    with open_on_npu(target) as execute, open_on_npu(NpuTarget(context, CHIP)) as execute_compiled:
        assert np.array_equal(execute(image)["logits"], execute_compiled(image)["logits"])


def test_a_file_with_a_variable_input_shape_is_refused(tmp_path):
    path = save(tmp_path / "variable.onnx", convolution_network(shape=(1, 3, "height", "width")))
    with pytest.raises(UserError, match=r"sm8750: .*variable\.onnx has an input of variable shape"):
        NpuBackend(NpuTarget(path, CHIP, fallback=True))


def test_ctrl_c_does_not_end_a_process_that_is_still_starting(target):
    with NpuProcess(target) as process:
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGINT)
        assert not process.call(npu_worker.describe_session).hardware


def test_a_library_that_cannot_be_loaded_is_an_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("libcdsprpc.so: cannot open shared object file")

    monkeypatch.setattr("onnxruntime.register_execution_provider_library", fail)
    with pytest.raises(UserError, match=r"--npu: onnxruntime-qnn can't be loaded \(libcdsprpc.so: cannot open"):
        npu_worker._qnn.__wrapped__()


def test_a_process_that_is_killed_is_reported_with_the_signal(target):
    with NpuProcess(target) as process:
        process.call(npu_worker.describe_session)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=f"--npu: .*{MODEL_FILE} for sm8750 was ended by SIGKILL.*memory"):
            process.call(npu_worker.describe_session)


def check_on_npu(sim, path, chip, image, agreement=0.98):
    """Check that a file runs without the CPU on a chip and computes what the simulation does."""
    expected = logits(lower(sim), image).numpy()
    with NpuBackend(NpuTarget(path, CHIPS[chip])) as backend:
        computed = backend(image).numpy()
        assert backend.session.cpu_nodes == ()
    assert (computed.argmax(1) == expected.argmax(1)).mean() > agreement
    assert np.abs(computed - expected).mean() < 0.03 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize("chip", ("sm8750", "sm8350"))
@pytest.mark.parametrize("tensors", [["1", "2.weight"], ["image", "3", "logits"]], ids=" ".join)
def test_a_file_of_mixed_bit_widths_runs_whole_on_the_npu_with_its_biases(tensors, chip, tmp_path):
    sim, path = export_mix(three_layer_network(), tensors, tmp_path / "out")
    check_on_npu(sim, path, chip, random_batches()[0][:1])


@pytest.mark.slow
def test_a_layer_behind_a_max_pool_has_its_bias_on_the_npu(tmp_path):
    sim = simulate(small_network(), quant_scheme="tf")
    raise_weight_scales(sim)
    path = export(sim, (64, 128), tmp_path / "out", {}) / MODEL_FILE
    check_on_npu(sim, path, "sm8750", random_batches()[0][:1])


@pytest.mark.slow
def test_a_mixed_file_of_a_trained_network_runs_whole_on_the_npu(tmp_path):
    tensors = ["image", "backbone_model.layer1.0.conv2", "head.layers.1.module_interpolate", "logits"]
    model = load_checkpoint(PRE_DOWN, demo_checkpoint(PRE_DOWN)).model
    sim, path = export_mix(model, tensors, tmp_path / "out", [scenes()[:1]])
    check_on_npu(sim, path, "sm8750", scenes()[1:], agreement=0.97)  # 512 predictions
