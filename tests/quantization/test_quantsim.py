"""Simulations: the published configuration, read off AIMET's own modules, and AIMET's own calibration."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aimet_torch.common.quantsim_config.quantsim_config import _get_config_file

from ffnet.config import QuantizationConfig, Runtime
from ffnet.model import FFNet
from ffnet.quantization.quantsim import (
    build_quantsim,
    calibrate,
    calibrate_on_images,
    check_config_file,
    check_finite_logits,
    equalize,
)
from ffnet.system.errors import UserError
from tests.helpers.networks import (
    DEMO,
    PRE_DOWN,
    TOY,
    golden_model,
    golden_state,
    random_batches,
    three_layer_network,
    toy_model,
)
from tests.helpers.simulations import calibrated_by_aimet, encodings, logits, random_images, simulate, small_network

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in (DEMO, PRE_DOWN)]
TOY_PRE_DOWN = "toy_pre_down"
OTHER_STEMS = [pytest.param(f"segmentation_{name}", marks=pytest.mark.slow) for name in ("ffnet18_dAAC", "ffnet50_AAA")]
QUIET = Runtime(quiet=True)


def network(name):
    if name == TOY_PRE_DOWN:
        model = FFNet(replace(TOY, pre_down=True)).eval()
        model.load_state_dict(golden_state(model))
        return model
    return small_network() if name == "small" else golden_model(name)


@pytest.fixture(scope="module", params=["toy", TOY_PRE_DOWN, *LARGE])
def sim(request, toy_sim):
    return toy_sim if request.param == "toy" else simulate(network(request.param), random_batches(1))


@pytest.fixture
def three_layers():
    return build_quantsim(equalize(three_layer_network()), QuantizationConfig())


def quantized_modules(sim):
    return {name: module for name, module in sim.model.named_modules() if hasattr(module, "param_quantizers")}


def weight_quantizers(sim):
    return {id(q) for module in quantized_modules(sim).values() for q in module.param_quantizers.values()}


def test_weights_are_8_bit_symmetric_per_channel_and_biases_are_not_quantized(sim):
    convolutions = [module for module in quantized_modules(sim).values() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) > 15
    for module in convolutions:
        quantizer = module.param_quantizers["weight"]
        assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-128, 127, True)
        assert quantizer.shape == (module.out_channels, 1, 1, 1)
        assert module.bias is not None and module.param_quantizers["bias"] is None


def test_activations_are_8_bit_asymmetric_per_tensor(sim):
    activations = [quantizer for quantizer in sim.quantizers() if id(quantizer) not in weight_quantizers(sim)]
    assert len(activations) > 20
    for quantizer in activations:
        assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (0, 255, False)
        assert quantizer.shape == () and quantizer.is_initialized()


def test_the_model_input_is_quantized_and_nothing_around_the_gaussian(sim):
    modules = quantized_modules(sim)
    conv0 = modules["backbone_model.conv0"]
    if "smoothing" not in modules:
        assert conv0.input_quantizers[0] is not None
        return
    pad, smoothing = modules["module_pad"], modules["smoothing"]
    assert pad.input_quantizers[0] is not None
    disabled = (pad.output_quantizers, smoothing.input_quantizers, smoothing.output_quantizers, conv0.input_quantizers)
    assert all(quantizer is None for quantizers in disabled for quantizer in quantizers)
    assert not smoothing.param_quantizers
    assert modules["backbone_model.relu"].output_quantizers[0] is not None


@pytest.mark.parametrize("cle", (True, False))
@pytest.mark.parametrize("name", ("small", *LARGE, *OTHER_STEMS))
def test_an_equalized_network_computes_the_same_function(name, cle):
    model = network(name)
    x = random_batches(1)[0]
    before = logits(model, x)
    equalized = logits(equalize(model, cle), x)
    assert torch.equal(logits(model, x), before)
    assert (equalized - before).abs().max() < 1e-4 * before.std()


def test_equalization_changes_the_weights():
    folded, equalized = (equalize(small_network(), cle).state_dict() for cle in (False, True))
    assert not torch.allclose(folded["block.conv1.weight"], equalized["block.conv1.weight"])


def test_bit_widths_and_scheme_reach_the_simulation():
    prepared = equalize(small_network())
    sim = build_quantsim(prepared, QuantizationConfig(param_bw=4, output_bw=16, quant_scheme="tf"))
    for quantizer in sim.quantizers():
        expected = (-8, 7) if id(quantizer) in weight_quantizers(sim) else (0, 65535)
        assert (quantizer.qmin, quantizer.qmax) == expected
        assert type(quantizer.encoding_analyzer).__name__ == "MinMaxEncodingAnalyzer"
    sim = build_quantsim(prepared, QuantizationConfig())
    assert {type(q.encoding_analyzer).__name__ for q in sim.quantizers()} == {"TfEnhancedEncodingAnalyzer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "memory_format"),
    (
        ("small", torch.contiguous_format),
        ("small", torch.channels_last),
        (DEMO, torch.channels_last),
        (PRE_DOWN, torch.channels_last),
    ),
)
def test_encodings_are_those_of_aimets_own_calibration(name, memory_format):
    """Later batches stay in the range of the first, exceed it, and exceed AIMET's limit for it."""
    prepared = equalize(network(name))
    batches = [scale * batch for scale, batch in zip((1, 0.5, 2, 1, 30, 1), 3 * random_batches(), strict=True)]
    batches = [batch.contiguous(memory_format=memory_format) for batch in batches]
    sim = build_quantsim(prepared, QuantizationConfig())
    calibrate(sim, batches)
    assert encodings(sim) == encodings(calibrated_by_aimet(prepared, batches, QuantizationConfig()))


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
)


def fail_on_batches(sim, error, largest=0, first=0):
    """Raise an error for batches of more than `largest` images, from the call with index `first` on; return sizes."""
    sizes = []

    def check(module, arguments):
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > largest and len(sizes) > first:
            raise error

    sim.model.register_forward_pre_hook(check)
    return sizes


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_calibration_starts_again_with_smaller_batches_if_memory_runs_out(capsys, three_layers, error):
    images, expected = random_images(8), build_quantsim(equalize(three_layer_network()), QuantizationConfig())
    assert calibrate_on_images(expected, images, replace(QUIET, batch_size=2)) == 2
    sizes = fail_on_batches(three_layers, error, largest=2, first=1)  # the second batch of 4
    assert calibrate_on_images(three_layers, images, replace(QUIET, batch_size=4)) == 2
    assert sizes == [4, 4, 2, 2, 2, 2]
    assert encodings(three_layers) == encodings(expected)
    assert "batches of 2" in capsys.readouterr().err


def test_too_little_memory_for_one_image_names_the_remedy(three_layers):
    fail_on_batches(three_layers, OUT_OF_MEMORY[0])
    with pytest.raises(UserError, match="The GPU's memory does not suffice for one image"):
        calibrate_on_images(three_layers, random_images(3), QUIET)


def test_errors_during_calibration_that_are_no_lack_of_memory_stay_as_they_are(three_layers):
    fail_on_batches(three_layers, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        calibrate_on_images(three_layers, random_images(3), QUIET)


def test_calibration_without_images_is_an_error(three_layers):
    with pytest.raises(UserError, match="4 quantizers got no encodings, the first of them 0.input"):
        calibrate(three_layers, [])


@pytest.mark.parametrize("text", ("", "[]", '{"defaults": {"unsigned_symmetric": "True"}}', "not ASCII: é"))
def test_configuration_files_that_aimet_does_not_accept_are_named_in_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"--config-file {path}: AIMET does not accept") as caught:
        check_config_file(str(path))
    assert "\n" not in str(caught.value)


def test_configurations_that_quantize_nothing_are_errors(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"defaults": {"ops": {}, "params": {}}, "params": {}, "op_type": {}, "supergroups": [], '
                    '"model_input": {}, "model_output": {}}')  # fmt: skip
    with pytest.raises(UserError, match="enables no quantizer"):
        check_config_file(str(path))


def test_aimets_own_configurations_are_accepted(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(Path(_get_config_file("htp_v81")).read_text())
    check_config_file("htp_v81")
    check_config_file(str(path))
    by_name, by_file = (simulate(three_layer_network(), config_file=name) for name in ("htp_v81", str(path)))
    assert encodings(by_name) == encodings(by_file)


def test_weights_with_which_logits_are_not_finite_are_an_error():
    model = toy_model()
    check_finite_logits(model, "x.pth")
    model.get_submodule("backbone_model.layer1.0.bn1").running_var.neg_()
    with pytest.raises(UserError, match="x.pth: .* infinite or NaN"):
        check_finite_logits(model, "x.pth")


@pytest.mark.slow
def test_importing_and_quantizing_print_nothing(capfd):
    simulate(small_network(), random_batches(1))
    assert "".join(capfd.readouterr()) == ""
    command = [sys.executable, "-c", "import ffnet.quantization.quantsim, ffnet.quantization.sensitivity"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_folder_named_default_does_not_matter_and_a_pipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()
    assert any(simulate(three_layer_network()).named_quantizers())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe, not a file"):
        simulate(three_layer_network(), config_file="pipe")
