"""Lowered networks against AIMET's own simulation, bit for bit."""

import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.float import FloatQuantizeDequantize

from ffnet.quantization.lowering import FakeQuantize, lower
from ffnet.quantization.quantsim import calibrate
from ffnet.system.errors import UserError
from tests.helpers.networks import DEMO, PRE_DOWN, golden_model, random_batches, three_layer_network
from tests.helpers.simulations import logits, simulate, small_network


def assert_same_bits(sim, lowered=None):
    x = random_batches(3)[2]
    assert torch.equal(logits(lowered or lower(sim), x), logits(sim.model, x))


def test_logits_of_the_toy_network_are_the_simulations_bit_for_bit(toy_sim, toy_lowered):
    assert_same_bits(toy_sim, toy_lowered)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cle"), ((DEMO, True), (PRE_DOWN, False), ("segmentation_ffnet40S_dBBB_mobile", True))
)
def test_logits_are_the_simulations_bit_for_bit(name, cle):
    assert_same_bits(simulate(golden_model(name), cle=cle))


CONFIGS = (
    {"param_bw": 4, "output_bw": 16},
    {"param_bw": 16, "output_bw": 31},
    {"quant_scheme": "tf"},
    {"config_file": "htp_v81"},
    {"config_file": "htp_v66"},
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_other_configs_give_the_same_bits_too(config):
    assert_same_bits(simulate(three_layer_network(), random_batches(1), **config))


@pytest.fixture
def sim():
    return simulate(three_layer_network(), random_batches(1))


@pytest.mark.slow
def test_disabled_and_added_quantizers_of_the_simulation_are_lowered():
    sim = simulate(small_network(), random_batches(1))
    model = sim.model
    model.block.relu.output_quantizers[0] = None
    model.block.conv1.param_quantizers["weight"] = None
    addition = model.get_submodule("block.module_add")
    addition.input_quantizers[1] = QuantizeDequantize((), 0, 15, False)
    calibrate(sim, random_batches(1))
    assert (0, 15) in [
        (module.qmin, module.qmax) for module in lower(sim).modules() if isinstance(module, FakeQuantize)
    ]
    assert_same_bits(sim)


def calibrated_channels():
    quantizer = QuantizeDequantize((8, 1, 1), -8, 7, True)
    quantizer.set_range(-torch.ones(8, 1, 1), torch.ones(8, 1, 1))
    return quantizer


def test_unsupported_and_uncalibrated_quantizers_are_errors(sim):
    for quantizer in (
        FloatQuantizeDequantize(exponent_bits=4, mantissa_bits=3),
        QuantizeDequantize((4, 1, 1), 0, 255, False, block_size=(4, 1, 1)),
        QuantizeDequantize((), 0, 255, False),
        calibrated_channels(),
    ):
        sim.model.get_submodule("1").output_quantizers[0] = quantizer
        with pytest.raises(UserError, match="1.output_quantizers.0"):
            lower(sim)


def test_lowering_does_not_change_the_simulation(sim):
    x = random_batches(1)[0]
    before = logits(sim.model, x)
    for parameter in lower(sim).parameters():
        parameter.data.zero_()
    assert torch.equal(logits(sim.model, x), before)


@pytest.mark.slow
def test_compiled_arithmetic_is_the_same_as_the_operators():
    x = torch.cat([torch.randn(100_000) * 3, torch.arange(-64, 64) * 0.05])
    quantizer = FakeQuantize(torch.tensor(0.1), torch.tensor(7, dtype=torch.int32), 0, 255)
    assert torch.equal(torch.compile(quantizer)(x), quantizer(x))
