"""The lowered network against AIMET's own simulation, bit for bit."""

import pytest
import torch

from ffnet import quantize
from ffnet.errors import UserError
from ffnet.lower import FakeQuantize, lower
from ffnet.quantize import Recipe
from tests.test_quantize import DEMO, MODELS, inputs, network

PUBLISHED = (
    "segmentation_ffnet78S_dBBB_mobile",
    "segmentation_ffnet54S_dBBB_mobile",
    "segmentation_ffnet40S_dBBB_mobile",
    "segmentation_ffnet78S_BCC_mobile_pre_down",
    "segmentation_ffnet122NS_CCC_mobile_pre_down",
)


def assert_same_bits(sim):
    x = inputs(3)[2]
    with torch.no_grad():
        assert torch.equal(lower(sim)(x), sim.model(x).as_subclass(torch.Tensor))


@pytest.mark.parametrize("cle", (True, False))
@pytest.mark.parametrize("name", (*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)))
def test_logits_are_the_simulations_bit_for_bit(name, cle):
    assert_same_bits(quantize.quantize(network(name), Recipe(cle=cle), inputs()))


OTHER_RECIPES = (
    Recipe(param_bw=4, output_bw=16),
    *(
        pytest.param(recipe, marks=pytest.mark.slow)
        for recipe in (
            Recipe(param_bw=16, output_bw=31),
            Recipe(quant_scheme="tf"),
            Recipe(config_file="htp_v81"),
            Recipe(config_file="htp_v66"),
        )
    ),
)


@pytest.mark.parametrize("recipe", OTHER_RECIPES, ids=str)
def test_other_recipes_lower_too(recipe):
    assert_same_bits(quantize.quantize(network(DEMO), recipe, inputs()))


@pytest.fixture
def sim():
    return quantize.quantize(network(DEMO), Recipe(), inputs(1))


def test_disabled_and_rearranged_quantizers_are_read_off_the_simulation(sim):
    from aimet_torch.quantization.affine import QuantizeDequantize

    model = sim.model
    model.backbone_model.relu.output_quantizers[0] = None
    model.backbone_model.conv1.param_quantizers["weight"] = None
    added = model.get_submodule("head.layers.1.module_add_6")
    added.input_quantizers[1] = QuantizeDequantize((), 0, 15, False)
    quantize.calibrate(sim, inputs(1))
    channels = QuantizeDequantize((32, 1, 1), -8, 7, True)
    channels.set_range(*(sign * torch.linspace(0.5, 2, 32).view(32, 1, 1) for sign in (-1, 1)))
    model.get_submodule("backbone_model.layer1.0.conv1").output_quantizers[0] = channels
    kinds = [(m.qmin, m.qmax, m.axis) for m in lower(sim).modules() if isinstance(m, FakeQuantize)]
    assert (0, 15, None) in kinds and (-8, 7, 1) in kinds
    assert_same_bits(sim)


def test_one_fake_quantizer_stands_for_each_of_aimets(sim):
    places = [
        quantizer
        for module in sim.model.modules()
        if hasattr(module, "param_quantizers")
        for quantizer in (*module.input_quantizers, *module.output_quantizers)
        if quantizer is not None
    ]
    assert len(places) > 40
    assert sum(isinstance(module, FakeQuantize) for module in lower(sim).modules()) == len(places)


def test_unknown_and_uncalibrated_quantizers_are_errors(sim):
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantization.float import FloatQuantizeDequantize

    relu = sim.model.backbone_model.relu
    for stranger in (
        FloatQuantizeDequantize(exponent_bits=4, mantissa_bits=3),
        QuantizeDequantize((4, 1, 1), 0, 255, False, block_size=(4, 1, 1)),
        QuantizeDequantize((), 0, 255, False),
    ):
        relu.output_quantizers[0] = stranger
        with pytest.raises(UserError, match="backbone_model.relu_output_quantizer"):
            lower(sim)


def test_lowering_leaves_the_simulation_as_it_was(sim):
    x = inputs(1)[0]
    with torch.no_grad():
        before = sim.model(x)
        lowered = lower(sim)
        for parameter in lowered.parameters():
            parameter.zero_()
        assert torch.equal(sim.model(x), before)


def test_compiled_arithmetic_is_the_operators():
    x = torch.cat([torch.randn(100_000) * 3, torch.arange(-64, 64) * 0.05])
    quantizer = FakeQuantize(torch.tensor(0.1), torch.tensor(7, dtype=torch.int32), 0, 255)
    assert torch.equal(torch.compile(quantizer)(x), quantizer(x))
