"""Raised weight scales and costs, worked by hand."""

import dataclasses
from pathlib import Path

import aimet_torch
import numpy as np
import pytest
import torch
from torch import nn

from ffnet.config import QuantizationConfig
from ffnet.model import FFNet
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.weighted_layers import Cost, multiply_accumulates, raise_weight_scales, relative_cost
from tests.helpers.networks import TOY, golden_state, random_batches, three_layer_network
from tests.helpers.simulations import encodings, logits, raise_precision, simulate, small_network

CHANNEL = 3
PER_TENSOR = str(Path(aimet_torch.__file__).parent / "common" / "quantsim_config" / "default_config.json")
SIZE = (64, 128)
THREE_LAYERS = {"0": 32 * 64 * 27 * 8, "2": 16 * 32 * 72 * 8, "4": 16 * 32 * 8 * 19}
WEIGHTS = 27 * 8 + 72 * 8 + 8 * 19


def network_with_a_dead_channel(weight=1e-12, bias=40.0):
    """Three layers; in channel 3 of the second one, all weights are nearly zero."""
    model = three_layer_network()
    with torch.no_grad():
        model[2].weight[CHANNEL] = weight
        model[2].bias[CHANNEL] = bias
    return model


def largest_bias(layer, input_quantizer):
    """The largest integer of a layer's biases, as a device computes them."""
    scale = layer.param_quantizers["weight"].get_scale().detach().double().flatten().numpy()
    steps = scale * float(input_quantizer.get_scale().detach().double())
    return np.abs(np.rint(layer.bias.detach().double().numpy() / steps)).max()


def test_the_scale_of_a_channel_is_raised_to_the_smallest_that_holds_its_bias():
    sim = simulate(network_with_a_dead_channel(), cle=False)
    x = random_batches(3)[2]
    logits_before = logits(sim.model, x)
    layer, source = sim.model.get_submodule("2"), sim.model.get_submodule("1").output_quantizers[0]
    quantizer = layer.param_quantizers["weight"]
    before = quantizer.get_scale().detach().flatten().clone()
    assert largest_bias(layer, source) > 2**31 - 1
    assert raise_weight_scales(sim) == {"2": 1}
    after = quantizer.get_scale().detach().flatten()
    smallest = 40 / (source.get_scale().item() * (2**31 - 1))
    assert after[CHANNEL].item() == pytest.approx(smallest, rel=2e-6) and after[CHANNEL].item() > smallest
    others = torch.arange(len(after)) != CHANNEL
    assert torch.equal(after[others], before[others])
    assert largest_bias(layer, source) <= 2**31 - 1
    assert quantizer.get_offset().count_nonzero() == 0
    assert (logits(sim.model, x) - logits_before).abs().max() < 1e-5 * logits_before.std()


def test_a_layer_with_an_8_bit_input_and_a_16_bit_output_has_257_times_finer_steps():
    sim = simulate(network_with_a_dead_channel(), cle=False)
    raise_weight_scales(sim)
    layer, source = sim.model.get_submodule("2"), sim.model.get_submodule("1").output_quantizers[0]
    assert largest_bias(layer, source) > 2**31 / 1.01
    raise_precision(sim, ["3"])
    assert 2**31 / 1.01 < largest_bias(layer, source) * 257 <= 2**31 - 1
    assert raise_weight_scales(sim) == {}


def test_raising_a_second_time_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    model = three_layer_network()
    with torch.no_grad():
        layer = model[2]
        layer.weight *= 10 ** -torch.randint(5, 13, (len(layer.bias), 1, 1, 1), generator=generator).float()
        layer.bias.copy_(1000 * torch.randn(len(layer.bias), generator=generator))
    sim = simulate(model, random_batches(1), cle=False)
    assert raise_weight_scales(sim)["2"] > 2
    raised = encodings(sim)
    assert raise_weight_scales(sim) == {}
    assert encodings(sim) == raised


def test_networks_whose_biases_fit_are_not_changed(toy_sim):
    before = encodings(toy_sim)
    assert raise_weight_scales(toy_sim) == {} and encodings(toy_sim) == before


def test_one_scale_for_all_channels_is_raised_for_the_largest_bias():
    model = network_with_a_dead_channel(bias=400)
    with torch.no_grad():
        model[2].weight.fill_(1e-12)
    sim = simulate(model, cle=False, config_file=PER_TENSOR)
    layer, source = sim.model.get_submodule("2"), sim.model.get_submodule("1").output_quantizers[0]
    assert layer.param_quantizers["weight"].get_scale().numel() == 1
    assert raise_weight_scales(sim) == {"2": 1}
    assert 2**31 - 2**13 < largest_bias(layer, source) <= 2**31 - 1


def test_the_input_scale_is_found_before_a_max_pool_and_at_the_network_input():
    first = nn.Conv2d(3, 8, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 19, 1), nn.ReLU()).eval()
    with torch.no_grad():
        for layer, bias in ((first, 40), (model[3], 4000)):
            layer.weight[CHANNEL], layer.bias[CHANNEL] = 1e-12, bias
    sim = simulate(model, cle=False)
    assert raise_weight_scales(sim) == {"0": 1, "3": 1}
    modules = dict(sim.model.named_modules())
    assert largest_bias(modules["0"], modules["0"].input_quantizers[0]) <= 2**31 - 1
    assert largest_bias(modules["3"], modules["1"].output_quantizers[0]) <= 2**31 - 1


@pytest.mark.parametrize(("param_bw", "output_bw", "layers"), ((16, 16, 0), (8, 31, 0), (8, 16, 1), (16, 8, 1)))
def test_layers_too_wide_for_int32_arithmetic_are_not_changed(param_bw, output_bw, layers):
    sim = simulate(network_with_a_dead_channel(), cle=False, param_bw=param_bw, output_bw=output_bw)
    assert len(raise_weight_scales(sim)) == layers


@pytest.fixture(scope="module")
def prepared():
    return equalize(three_layer_network())


def test_multiply_accumulates_of_a_three_layer_network(prepared):
    assert multiply_accumulates(prepared, SIZE) == THREE_LAYERS
    assert multiply_accumulates(three_layer_network(), SIZE) == THREE_LAYERS


def test_multiply_accumulates_of_nested_modules():
    pixels, half = 32 * 64, 16 * 32  # after the pool, and after the block
    assert multiply_accumulates(equalize(small_network()), SIZE) == {
        "stem.layers.0": 64 * 128 * 27 * 8,
        "block.conv1": half * 72 * 16,
        "block.conv2": half * 144 * 16,
        "block.downsample.0": half * 8 * 16,
        "adapter.layers.0": pixels * 8 * 8,
        "classifier": pixels * 24 * 19,
    }


@pytest.mark.parametrize(
    ("param_bw", "output_bw", "expected"),
    ((8, 8, Cost(1, 1)), (4, 8, Cost(0.5, 0.5)), (8, 16, Cost(2, 1)), (4, 16, Cost(1, 0.5)), (16, 8, Cost(2, 2))),
)
def test_costs_of_one_bit_width_for_all(prepared, param_bw, output_bw, expected):
    sim = build_quantsim(prepared, QuantizationConfig(param_bw=param_bw, output_bw=output_bw))
    assert relative_cost(sim, THREE_LAYERS) == expected


def test_costs_of_mixed_precision(prepared):
    """The second layer has 4-bit weights and a 16-bit output, to which its input is converted; the third reads that."""
    sim = build_quantsim(prepared, QuantizationConfig())
    weight, source = sim.model.get_submodule("2").param_quantizers["weight"], sim.model.get_submodule("3")
    weight.qmin, weight.qmax = -8, 7
    source.output_quantizers[0].qmax = 65535
    cost = relative_cost(sim, THREE_LAYERS)
    operations = THREE_LAYERS["0"] + THREE_LAYERS["2"] / 2 * 2 + THREE_LAYERS["4"] * 2
    assert cost.bit_operations == pytest.approx(operations / sum(THREE_LAYERS.values()))
    assert cost.weight_bytes == pytest.approx((WEIGHTS - 72 * 8 / 2) / WEIGHTS)


def test_smoothing_has_operations_but_no_cost_and_its_reader_with_float_input_counts_only_in_the_weight_bytes():
    model = FFNet(dataclasses.replace(TOY, pre_down=True)).eval()
    model.load_state_dict(golden_state(model))
    network = equalize(model)
    operations = multiply_accumulates(network, SIZE)
    # Smoothed to ((64 + 2 - 5) // 2 + 1, (128 - 5) // 2 + 1) = (31, 62) by a depthwise 5x5 convolution of 3 channels.
    assert operations["smoothing"] == 31 * 62 * 3 * 25
    first = "backbone_model.conv0"  # has stride 2 and padding 1
    assert operations[first] == 16 * 31 * network.get_submodule(first).weight.numel()
    sim = build_quantsim(network, QuantizationConfig())
    quantizer = sim.model.get_submodule(first).param_quantizers["weight"]
    quantizer.qmin, quantizer.qmax = -8, 7
    sizes = {name: layer.weight.numel() for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    sizes.pop("smoothing", None)
    expected = 1 - sizes[first] / 2 / sum(sizes.values())
    assert relative_cost(sim, operations) == Cost(1, pytest.approx(expected))


def test_a_network_without_quantized_weights_costs_the_same(prepared):
    sim = build_quantsim(prepared, QuantizationConfig())
    for layer in THREE_LAYERS:
        sim.model.get_submodule(layer).param_quantizers["weight"] = None
    assert relative_cost(sim, THREE_LAYERS) == Cost(1, 1)
