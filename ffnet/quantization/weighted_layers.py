"""Layers with quantized weights: the integers with which a device computes them, their bias ranges and their costs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ffnet.quantization.sites import WEIGHT, QuantizerSite, quantizer_sites

WIDE_STEPS = 257  # 16-bit steps in an 8-bit step of the same range: 65535 / 255
LARGEST_BIAS = 2**31 - 2**8  # largest int32, less the rounding error of float32
INT32_BITS = 24  # most bits of weight and input together for int32 arithmetic: 8 and 16, but not twice 16
REFERENCE_BITS = 8


@dataclass(frozen=True)
class WeightedLayer:
    """The quantizer sites around one layer; None where the layer's input or output is in float.

    Exported files convert the 8-bit input of a layer with a 16-bit output to 16 bits, because NPUs compute with one bit
    width of activations.
    """

    weight: QuantizerSite
    source: QuantizerSite | None  # quantizes the layer's input
    target: QuantizerSite | None  # quantizes its output

    @property
    def is_widened(self) -> bool:
        """Whether exported files convert the input to 16 bits."""
        return bool(self.source and self.target and self.source.bit_width == 8 and self.target.bit_width == 16)

    @property
    def input_bits(self) -> int:
        """Number of bits of the input's integers on a device; 0 for a float input."""
        return 16 if self.is_widened else (self.source.bit_width if self.source else 0)

    @property
    def input_scale(self) -> torch.Tensor | None:
        """The scale of these integers, (1,) or () float32; None for a float input."""
        if self.source is None:
            return None
        return self.source.quantizer.get_scale().detach() / (WIDE_STEPS if self.is_widened else 1)


def weighted_layers(sim: QuantizationSimModel) -> list[WeightedLayer]:
    """Return the layers of a simulation whose weight is quantized, in order of execution."""
    sites = quantizer_sites(sim)
    inputs = {site.node: site for site in sites if site.role == "input" and site.key == 0}
    outputs = {site.node: site for site in sites if site.role == "output"}
    return [
        WeightedLayer(site, inputs.get(site.node) or _source(sim, site.node, outputs), _target(site.node, outputs))
        for site in sites
        if site.kind == WEIGHT and site.key == "weight"
    ]


def _source(
    sim: QuantizationSimModel, node: torch.fx.Node, outputs: dict[torch.fx.Node, QuantizerSite]
) -> QuantizerSite | None:
    """Return the site that quantizes a layer's input, perhaps before layers that only pass values on."""
    source = node.all_input_nodes[0]
    while source.op == "call_module":
        module = sim.model.get_submodule(str(source.target))
        if source in outputs or not isinstance(module, nn.Identity | nn.MaxPool2d):
            return outputs.get(source)
        source = source.all_input_nodes[0]
    return None


def _target(node: torch.fx.Node, outputs: dict[torch.fx.Node, QuantizerSite]) -> QuantizerSite | None:
    """Return the site that quantizes a layer's output, perhaps after layers without a quantizer, such as its ReLU."""
    while node not in outputs and len(node.users) == 1:
        (node,) = node.users
    return outputs.get(node)


def raise_weight_scales(sim: QuantizationSimModel) -> dict[str, int]:
    """Raise weight scales in place until every bias fits into int32.

    Integer kernels hold a bias as int32 in units of input scale times weight scale. If a channel's weights are nearly
    zero, its scale is so small that its bias overflows: the device would clip what the simulation computes in float.
    AIMET's calibration raises such scales only in layers with an output quantizer of their own, not before a ReLU.

    Call it after calibrating or loading encodings, and before lowering or export; a second call changes nothing. For a
    channel of n products of 8 bits it changes the output by less than n * 255 / 2**32 of the bias.

    Returns:
        {changed layer: number of changed channels}.
    """
    changed = {}
    for layer in weighted_layers(sim):
        weight, bias, step = layer.weight, sim.model.get_submodule(layer.weight.layer).bias, layer.input_scale
        if bias is None or step is None or weight.bit_width + layer.input_bits > INT32_BITS:
            continue
        factors = _scale_factors(weight.quantizer, bias, step)
        if (factors > 1).any():
            with torch.no_grad():
                for bound in (weight.quantizer.min, weight.quantizer.max):
                    bound.mul_((factors if bound.numel() > 1 else factors.max()).reshape(bound.shape))
            changed[weight.layer] = int((factors > 1).sum())
    return changed


def _scale_factors(weight: QuantizerBase, bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return the factors (channels,), at least 1, by which the weight's scales are too small for the bias."""
    steps = weight.get_scale().detach().flatten() * step
    needed = bias.detach().abs() / (steps.double() * LARGEST_BIAS)
    return torch.where(needed > 1, needed * (1 + 1e-6), 1.0).to(bias.dtype)


@dataclass(frozen=True)
class Cost:
    """The cost of a quantized network on a device as a share of the same network's at W8A8.

    Bit operations are multiply-accumulates times the bits of the weight times those of the layer's input in exported
    files, as in AIMET's automatic mixed precision. Layers with a float input do not count.
    """

    bit_operations: float
    weight_bytes: float


def relative_cost(sim: QuantizationSimModel, operations: Mapping[str, int]) -> Cost:
    """Return the cost of a simulation with its present bit widths; `operations`: see `multiply_accumulates`."""
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


def multiply_accumulates(network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Return {layer: number of multiply-accumulates for one image of `size` (H, W)}; layers without any are omitted."""
    shapes_only = copy.deepcopy(network).to("meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shapes_only(torch.empty(1, 3, *size, device="meta"))
    counts = {name.partition(".")[2]: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    layers = (name for name, module in network.named_modules() if not any(module.children()))
    return {name: counts[name] // 2 for name in layers if counts.get(name)}
