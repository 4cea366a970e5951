"""Raised weight scales, worked by hand."""

from pathlib import Path

import aimet_torch
import numpy as np
import pytest
import torch
from torch import nn

from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.networks import random_batches, three_layer_network
from tests.helpers.simulations import encodings, logits, raise_precision, simulate

CHANNEL = 3
PER_TENSOR = str(Path(aimet_torch.__file__).parent / "common" / "quantsim_config" / "default_config.json")


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


def test_a_layer_with_an_8_bit_input_and_a_16_bit_output_has_257_times_finer_steps():
    sim = simulate(network_with_a_dead_channel(), cle=False)
    raise_weight_scales(sim)
    layer, source = sim.model.get_submodule("2"), sim.model.get_submodule("1").output_quantizers[0]
    assert largest_bias(layer, source) > 2**31 / 1.01
    raise_precision(sim, ["3"])
    assert 2**31 / 1.01 < largest_bias(layer, source) * 257 <= 2**31 - 1
    assert raise_weight_scales(sim) == {}


def test_raising_changes_next_to_nothing_in_the_logits():
    sim = simulate(network_with_a_dead_channel(), cle=False)
    x = random_batches(3)[2]
    before = logits(sim.model, x)
    raise_weight_scales(sim)
    assert (logits(sim.model, x) - before).abs().max() < 1e-5 * before.std()


@pytest.mark.parametrize("seed", range(3))
def test_raising_a_second_time_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
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


def test_the_input_scale_is_found_behind_a_max_pool_and_at_the_network_input():
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
