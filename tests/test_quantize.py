"""The published recipe, read off the simulation itself."""

import pytest
import torch

from ffnet import build_model, quantize
from ffnet.errors import UserError
from ffnet.quantize import Recipe
from tests.test_model import golden_state

DEMO = "segmentation_ffnet14T_dBBB_mobile"
PRE_DOWN = "segmentation_ffnet14T_BCC_mobile_pre_down"
MODELS = (DEMO, PRE_DOWN)


def network(name):
    model = build_model(name)
    model.load_state_dict(golden_state(model))
    return model


def inputs(count=2, size=(64, 128)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, *size, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module", params=MODELS)
def sim(request):
    return quantize.quantize(network(request.param), Recipe(), inputs())


def quantized_modules(sim):
    return {name: module for name, module in sim.model.named_modules() if hasattr(module, "param_quantizers")}


def test_weights_are_8_bit_symmetric_a_channel_and_biases_are_left(sim):
    convolutions = {n: m for n, m in quantized_modules(sim).items() if isinstance(m, torch.nn.Conv2d)}
    assert len(convolutions) > 20
    for module in convolutions.values():
        quantizer = module.param_quantizers["weight"]
        assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-128, 127, True)
        assert quantizer.shape == (module.out_channels, 1, 1, 1)
        assert module.bias is not None and module.param_quantizers["bias"] is None


def test_activations_are_8_bit_asymmetric(sim):
    activations = [q for name, q in quantize.quantizers(sim) if "param_quantizers" not in name]
    assert len(activations) > 30
    for quantizer in activations:
        assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (0, 255, False)
        assert quantizer.shape == () and quantizer.is_initialized()


def test_model_input_is_quantized_and_nothing_behind_the_gaussian(sim):
    modules = quantized_modules(sim)
    conv0 = modules["backbone_model.conv0"]
    if "smoothing" not in modules:
        assert conv0.input_quantizers[0] is not None
        return
    assert modules["module_pad"].input_quantizers[0] is not None
    silent = (modules["module_pad"].output_quantizers, *_quantizers(modules["smoothing"]), conv0.input_quantizers)
    assert all(quantizer is None for quantizers in silent for quantizer in quantizers)
    assert not modules["smoothing"].param_quantizers
    assert modules["backbone_model.relu"].output_quantizers[0] is not None


def _quantizers(module):
    return module.input_quantizers, module.output_quantizers


@pytest.mark.parametrize("cle", (True, False))
@pytest.mark.parametrize(
    "name",
    (*MODELS, *(pytest.param(f"segmentation_{n}", marks=pytest.mark.slow) for n in ("ffnet18_dAAC", "ffnet50_AAA"))),
)
def test_equalized_network_computes_the_same(name, cle):
    model = network(name)
    x = inputs(1)[0]
    with torch.no_grad():
        before = model(x)
        equalized = quantize.equalize(model, cle)(x)
        assert torch.equal(model(x), before)
    assert (equalized - before).abs().max() < 1e-4 * before.std()


def test_equalization_changes_the_weights():
    plain, equalized = (quantize.equalize(network(DEMO), cle).state_dict() for cle in (False, True))
    assert not torch.allclose(plain["backbone_model.conv1.weight"], equalized["backbone_model.conv1.weight"])


def test_two_runs_give_the_same_encodings(sim):
    name = PRE_DOWN if "smoothing" in quantized_modules(sim) else DEMO
    again = quantize.quantize(network(name), Recipe(), inputs())
    for (key, one), (other_key, other) in zip(quantize.quantizers(sim), quantize.quantizers(again), strict=True):
        assert key == other_key
        assert torch.equal(one.get_scale(), other.get_scale()) and torch.equal(one.get_offset(), other.get_offset())


def test_bit_widths_and_scheme_reach_the_simulation():
    equalized = quantize.equalize(network(DEMO))
    sim = quantize.simulate(equalized, Recipe(param_bw=4, output_bw=16, quant_scheme="tf"))
    for name, quantizer in quantize.quantizers(sim):
        expected = (-8, 7) if "param_quantizers" in name else (0, 65535)
        assert (quantizer.qmin, quantizer.qmax) == expected
        assert type(quantizer.encoding_analyzer).__name__ == "MinMaxEncodingAnalyzer"
    sim = quantize.simulate(equalized, Recipe())
    assert {type(q.encoding_analyzer).__name__ for _, q in quantize.quantizers(sim)} == {"TfEnhancedEncodingAnalyzer"}


@pytest.mark.parametrize(
    ("name", "memory_format"), ((DEMO, torch.contiguous_format), (PRE_DOWN, torch.channels_last)), ids=MODELS
)
def test_encodings_are_those_of_aimets_own_calibration(name, memory_format):
    """Batches of which later ones stay in the first one's range, go beyond it, and beyond AIMET's limit of that."""
    equalized = quantize.equalize(network(name))
    batches = [scale * batch for scale, batch in zip((1, 0.5, 2, 1, 30, 1), 3 * inputs(), strict=True)]
    batches = [batch.contiguous(memory_format=memory_format) for batch in batches]
    ours, aimets = (quantize.simulate(equalized, Recipe()) for _ in range(2))
    quantize.calibrate(ours, batches)
    with quantize.quiet_aimet(), torch.no_grad():
        aimets.compute_encodings(lambda model: [model(batch) for batch in batches])
    for (key, one), (other_key, other) in zip(quantize.quantizers(ours), quantize.quantizers(aimets), strict=True):
        assert key == other_key
        assert torch.equal(one.get_scale(), other.get_scale()) and torch.equal(one.get_offset(), other.get_offset())


def test_a_simulation_that_saw_no_image_is_refused():
    sim = quantize.simulate(quantize.equalize(network(DEMO)), Recipe())
    with pytest.raises(UserError, match="without encodings"):
        quantize.calibrate(sim, [])


@pytest.mark.parametrize("text", ("", "hello", "[]", "{}", '{"defaults": {"unsigned_symmetric": "True"}}'))
def test_configuration_files_that_aimet_refuses_are_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--config-file {path}"):
        quantize.check_config_file(str(path))


def test_configurations_that_quantize_nothing_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"defaults": {"ops": {}, "params": {}}, "params": {}, "op_type": {}, "supergroups": [], '
                    '"model_input": {}, "model_output": {}}')  # fmt: skip
    with pytest.raises(UserError, match="quantizes nothing"):
        quantize.check_config_file(str(path))


def test_weights_that_give_no_numbers_are_refused():
    model = network(DEMO)
    quantize.check_finite(model, "x.pth")
    model.get_submodule("backbone_model.layer1.0.bn1").running_var.neg_()
    with pytest.raises(UserError, match="x.pth"):
        quantize.check_finite(model, "x.pth")


def test_aimets_own_configurations_are_taken():
    quantize.check_config_file("htp_v81")


def test_aimet_is_silent(capfd):
    quantize.quantize(network(DEMO), Recipe(), inputs(1))
    assert "".join(capfd.readouterr()) == ""
