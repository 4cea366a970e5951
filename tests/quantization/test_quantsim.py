"""Simulations: the published configuration, read off AIMET's own modules, and AIMET's own calibration."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aimet_torch.common.quantsim_config.quantsim_config import _get_config_file

from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation.loading import normalize
from ffnet.model import FFNet
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import (
    build_quantsim,
    calibrate,
    calibrate_on_images,
    check_config_file,
    check_finite_logits,
    equalize,
    quantize,
    quiet_aimet,
)
from ffnet.quantization.weighted_layers import raise_weight_scales
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
from tests.helpers.simulations import encodings, logits, simulate, small_network

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in (DEMO, PRE_DOWN)]
TOY_PRE_DOWN = "toy_pre_down"
OTHER_STEMS = ("ffnet18_dAAC", "ffnet50_AAA")
QUIET = Runtime(progress=False)


def network(name):
    if name == TOY_PRE_DOWN:
        model = FFNet(dataclasses.replace(TOY, pre_down=True)).eval()
        model.load_state_dict(golden_state(model))
        return model
    small = {"small": small_network, "three_layers": three_layer_network}
    return small[name]() if name in small else golden_model(name)


def calibration_images(count=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 64, 128), generator=generator, dtype=torch.uint8)
    return [(image, torch.zeros(64, 128, dtype=torch.uint8)) for image in images]


def calibrated_by_aimet(prepared, batches, config):
    """A simulation with AIMET's own analyzers and its own search for encodings."""
    sim = build_quantsim(prepared, config)
    with quiet_aimet(), torch.no_grad():
        sim.compute_encodings(lambda model: [model(batch) for batch in batches])
    return sim


@pytest.fixture(scope="module", params=["toy", TOY_PRE_DOWN, *LARGE])
def sim(request, toy_sim):
    return toy_sim if request.param == "toy" else simulate(network(request.param), random_batches(1))


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
@pytest.mark.parametrize(
    "name",
    ("small", *LARGE, *(pytest.param(f"segmentation_{name}", marks=pytest.mark.slow) for name in OTHER_STEMS)),
)
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


@pytest.mark.parametrize("name", ("three_layers", *LARGE))
def test_two_calibrations_give_the_same_encodings(name):
    assert encodings(simulate(network(name))) == encodings(simulate(network(name)))


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
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("name", ("small", *LARGE))
def test_encodings_are_those_of_aimets_own_calibration(name, memory_format):
    """Batches of which later ones stay in the range of the first, exceed it, and exceed AIMET's limit for it."""
    prepared = equalize(network(name))
    batches = [scale * batch for scale, batch in zip((1, 0.5, 2, 1, 30, 1), 3 * random_batches(), strict=True)]
    batches = [batch.contiguous(memory_format=memory_format) for batch in batches]
    sim = build_quantsim(prepared, QuantizationConfig())
    calibrate(sim, batches)
    assert encodings(sim) == encodings(calibrated_by_aimet(prepared, batches, QuantizationConfig()))


@pytest.mark.slow
def test_quantize_equalizes_calibrates_on_the_images_and_raises_weight_scales():
    model, images = small_network(), calibration_images()
    norm = model.block.bn1
    with torch.no_grad():  # a channel of nearly zero weights with a bias
        norm.weight[3], norm.bias[3] = 1e-12, 400
    config = QuantizationConfig(cle=False, param_bw=4)
    sim = quantize(model, images, config, dataclasses.replace(QUIET, batch_size=2))
    batches = [normalize(torch.stack([image for image, _ in images[i : i + 2]])) for i in (0, 2)]
    expected = calibrated_by_aimet(equalize(model, cle=False), batches, config)
    assert encodings(sim) != encodings(expected)
    assert raise_weight_scales(expected) == {"block.conv1": 1}
    assert encodings(sim) == encodings(expected)
    assert torch.equal(logits(lower(sim), batches[0]), logits(expected.model, batches[0]))


def test_quantize_takes_encodings_from_a_file(tmp_path):
    sim = quantize(three_layer_network(), calibration_images(), QuantizationConfig(), QUIET)
    with quiet_aimet():
        sim.save_encodings_to_json(str(tmp_path), "encodings")
    config = QuantizationConfig(encodings=tmp_path / "encodings.json")
    assert encodings(quantize(three_layer_network(), [], config, QUIET)) == encodings(sim)


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_calibration_starts_again_with_smaller_batches_if_memory_runs_out(capsys, error):
    prepared = equalize(three_layer_network())
    images = calibration_images(8)
    expected = build_quantsim(prepared, QuantizationConfig())
    assert calibrate_on_images(expected, images, dataclasses.replace(QUIET, batch_size=2)) == 2

    sim = build_quantsim(prepared, QuantizationConfig())
    sizes = []

    def run_out_of_memory(module, arguments):
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 2 and sizes.count(4) > 1:  # the second batch of 4
            raise error

    sim.model.register_forward_pre_hook(run_out_of_memory)
    assert calibrate_on_images(sim, images, dataclasses.replace(QUIET, batch_size=4)) == 2
    assert sizes == [4, 4, 2, 2, 2, 2]
    assert encodings(sim) == encodings(expected)
    assert "batches of 2" in capsys.readouterr().err


def test_calibration_ends_if_memory_does_not_suffice_for_one_image():
    sim = build_quantsim(equalize(three_layer_network()), QuantizationConfig())

    def run_out_of_memory(module, arguments):
        raise torch.cuda.OutOfMemoryError

    sim.model.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(UserError, match="one image"):
        calibrate_on_images(sim, calibration_images(), QUIET)


def test_errors_during_calibration_that_are_no_lack_of_memory_stay_as_they_are():
    sim = build_quantsim(equalize(three_layer_network()), QuantizationConfig())

    def fail(module, arguments):
        raise RuntimeError("CUDA error: device-side assert triggered")

    sim.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        calibrate_on_images(sim, calibration_images(), QUIET)


def test_calibration_without_images_is_an_error():
    sim = build_quantsim(equalize(three_layer_network()), QuantizationConfig())
    with pytest.raises(UserError, match="4 quantizers got no encodings, the first of them 0.input"):
        calibrate(sim, [])


@pytest.mark.parametrize("text", ("", "hello", "[]", "{}", '{"defaults": {"unsigned_symmetric": "True"}}'))
def test_configuration_files_that_aimet_does_not_accept_are_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--config-file {path}: AIMET does not accept"):
        check_config_file(str(path))


def test_configurations_that_quantize_nothing_are_errors(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"defaults": {"ops": {}, "params": {}}, "params": {}, "op_type": {}, "supergroups": [], '
                    '"model_input": {}, "model_output": {}}')  # fmt: skip
    with pytest.raises(UserError, match="enables no quantizer"):
        check_config_file(str(path))


def test_configuration_files_are_read_alike_with_and_without_a_byte_order_mark(tmp_path):
    text = Path(_get_config_file("htp_v81")).read_text()
    expected = simulate(three_layer_network(), config_file="htp_v81")
    for encoding in ("utf-8", "utf-8-sig"):
        path = tmp_path / encoding
        path.write_text(text, encoding=encoding)
        check_config_file(str(path))
        assert encodings(simulate(three_layer_network(), config_file=str(path))) == encodings(expected)


@pytest.mark.parametrize("encoding", ("utf-16", "utf-16-be", "latin-1"))
def test_configuration_files_in_another_encoding_get_one_line(encoding, tmp_path):
    path = tmp_path / "config.json"
    text = Path(_get_config_file("htp_v81")).read_text().replace("{", '{"é": 1, ', 1)
    path.write_bytes(("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding))
    with pytest.raises(UserError, match=f"--config-file {path}: AIMET does not accept .*UTF-") as caught:
        check_config_file(str(path))
    assert "\n" not in str(caught.value)


def test_aimets_own_configurations_are_accepted():
    check_config_file("htp_v81")


def test_weights_with_which_logits_are_not_finite_are_an_error():
    model = toy_model()
    check_finite_logits(model, "x.pth")
    model.get_submodule("backbone_model.layer1.0.bn1").running_var.neg_()
    with pytest.raises(UserError, match="x.pth: .* infinite or NaN"):
        check_finite_logits(model, "x.pth")


def test_quantizing_prints_nothing(capfd):
    quantize(small_network(), calibration_images(1), runtime=QUIET)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_importing_aimet_prints_nothing():
    command = [sys.executable, "-c", "import ffnet.quantization.quantsim, ffnet.quantization.sensitivity"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
