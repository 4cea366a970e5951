"""What a choice of bit widths costs on a device, relative to 8-bit weights and activations.

Bit operations are multiply-accumulates times the bits of the weight times those of the layer's input in exported files,
as in AIMET's automatic mixed precision. Layers with a float input cost the same in every choice and do not count.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ffnet.quantization.weighted_layers import weighted_layers

REFERENCE_BITS = 8


@dataclass(frozen=True)
class Cost:
    """The cost of a quantized network as a share of the same network's at W8A8."""

    bit_operations: float
    weight_bytes: float


def multiply_accumulates(network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Return {layer: number of multiply-accumulates} of a network's convolutions for one image of `size` (H, W)."""
    counts = _count_operations(network, size).get_flop_counts()
    operations = {name.partition(".")[2]: sum(by_kind.values()) for name, by_kind in counts.items()}
    convolutions = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {name: number // 2 for name, number in operations.items() if name in convolutions}


def total_multiply_accumulates(network: nn.Module, size: tuple[int, int]) -> int:
    """Return the number of multiply-accumulates of a whole network for one image of `size` (H, W).

    Unlike `multiply_accumulates`, it counts the smoothing of a pre_down network.
    """
    return _count_operations(network, size).get_total_flops() // 2


def _count_operations(network: nn.Module, size: tuple[int, int]) -> FlopCounterMode:
    """Return torch's counter of additions and multiplications after one image of `size` (H, W), without its data."""
    shapes_only = copy.deepcopy(network).to("meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shapes_only(torch.empty(1, 3, *size, device="meta"))
    return counter


def relative_cost(sim: QuantizationSimModel, operations: Mapping[str, int]) -> Cost:
    """Return the cost of a simulation with its present bit widths; `operations`: of each layer, per image."""
    cost = reference = weight_bits = weights = 0
    for layer in weighted_layers(sim):
        weight = layer.weight
        number = sim.model.get_submodule(weight.layer).weight.numel()
        weights += number
        weight_bits += number * weight.bit_width
        if layer.input_bits:
            reference += operations[weight.layer] * REFERENCE_BITS**2
            cost += operations[weight.layer] * weight.bit_width * layer.input_bits
    reference_bits = weights * REFERENCE_BITS
    return Cost(cost / reference if reference else 1.0, weight_bits / reference_bits if weights else 1.0)
