"""Layers with quantized weights, and the integers with which a device computes them."""

from dataclasses import dataclass

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.quantization.sites import WEIGHT, QuantizerSite, quantizer_sites

WIDE_STEPS = 257  # 16-bit steps in an 8-bit step of the same range: 65535 / 255


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
        """The step of these integers, (1,) or () float32; None for a float input."""
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
    """Return the site that quantizes a layer's input, before any layers that keep values as they are."""
    source = node.all_input_nodes[0]
    while source.op == "call_module":
        module = sim.model.get_submodule(str(source.target))
        if source in outputs or not isinstance(module, nn.Identity | nn.MaxPool2d):
            return outputs.get(source)
        source = source.all_input_nodes[0]
    return None


def _target(node: torch.fx.Node, outputs: dict[torch.fx.Node, QuantizerSite]) -> QuantizerSite | None:
    """Return the site that quantizes a layer's output, after any layers that have no quantizer, such as its ReLU."""
    while node not in outputs and len(node.users) == 1:
        (node,) = node.users
    return outputs.get(node)
