"""Costs, worked by hand."""

import dataclasses

import pytest
from torch import nn

from ffnet.config import QuantizationConfig
from ffnet.model import FFNet
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.weighted_layers import Cost, multiply_accumulates, relative_cost, total_multiply_accumulates
from tests.helpers.networks import TOY, golden_state, three_layer_network
from tests.helpers.simulations import small_network

SIZE = (64, 128)
THREE_LAYERS = {"0": 32 * 64 * 27 * 8, "2": 16 * 32 * 72 * 8, "4": 16 * 32 * 8 * 19}
WEIGHTS = 27 * 8 + 72 * 8 + 8 * 19


@pytest.fixture(scope="module")
def prepared():
    return equalize(three_layer_network())


@pytest.fixture(scope="module")
def pre_down():
    """The toy network whose input is smoothed and halved, equalized."""
    model = FFNet(dataclasses.replace(TOY, pre_down=True)).eval()
    model.load_state_dict(golden_state(model))
    return equalize(model)


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


def test_the_total_is_the_sum_over_all_layers(prepared):
    assert total_multiply_accumulates(prepared, SIZE) == sum(THREE_LAYERS.values())


def test_the_total_counts_the_smoothing_of_a_pre_down_network():
    """A depthwise 5x5 convolution of 3 channels with stride 2, after the height is padded by 2."""
    network = FFNet(dataclasses.replace(TOY, pre_down=True)).eval()
    smoothing = total_multiply_accumulates(network, SIZE) - sum(multiply_accumulates(network, SIZE).values())
    assert smoothing == 31 * 62 * 3 * 25


def test_counting_neither_changes_nor_moves_the_network(prepared):
    multiply_accumulates(prepared, SIZE)
    assert {parameter.device.type for parameter in prepared.parameters()} == {"cpu"}


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


def test_a_layer_with_float_input_counts_only_in_the_weight_bytes(pre_down):
    first = "backbone_model.conv0"
    operations = multiply_accumulates(pre_down, SIZE)
    # Smoothed: ((64 + 2 - 5) // 2 + 1, (128 - 5) // 2 + 1) = (31, 62); conv0 has stride 2 and padding 1.
    assert operations[first] == 16 * 31 * pre_down.get_submodule(first).weight.numel()
    assert "smoothing" not in operations
    sim = build_quantsim(pre_down, QuantizationConfig())
    quantizer = sim.model.get_submodule(first).param_quantizers["weight"]
    quantizer.qmin, quantizer.qmax = -8, 7
    sizes = {name: layer.weight.numel() for name, layer in pre_down.named_modules() if isinstance(layer, nn.Conv2d)}
    sizes.pop("smoothing", None)
    expected = 1 - sizes[first] / 2 / sum(sizes.values())
    assert relative_cost(sim, operations) == Cost(1, pytest.approx(expected))


def test_a_network_without_quantized_weights_costs_the_same(prepared):
    sim = build_quantsim(prepared, QuantizationConfig())
    for layer in THREE_LAYERS:
        sim.model.get_submodule(layer).param_quantizers["weight"] = None
    assert relative_cost(sim, THREE_LAYERS) == Cost(1, 1)
