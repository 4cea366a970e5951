"""Raise weight scales until every bias fits into int32.

Integer kernels hold a bias as int32 in units of input scale times weight scale. A channel with nearly zero weights has
so small a scale that its bias overflows: the device would clip what the simulation computes in float. AIMET's
calibration raises such scales only in layers that have an output quantizer of their own, so not if a ReLU follows.

Exported files convert the 8-bit input of a layer with a 16-bit output to 16 bits: its steps are finer there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.quantization.precision import WIDE_STEPS
from ffnet.quantization.sites import QuantizerSite, quantizer_sites

LARGEST = 2**31 - 2**8  # of an int32, less what float32 rounds off
MOST_BITS = 24  # of weight and input together in layers with int32 arithmetic: 8 and 16, but not twice 16


def raise_weight_scales(sim: QuantizationSimModel) -> dict[str, int]:
    """Raise weight scales in place until every bias fits into int32; return {changed layer: number of its channels}.

    Call it after calibrating or loading encodings, and before lowering or export; a second call changes nothing. For a
    channel of n products of 8 bits it changes the output by less than n * 255 / 2**32 of the bias.
    """
    changed = {}
    for weight, bias, step in _biased_layers(sim):
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
    needed = bias.detach().abs() / (steps.double() * LARGEST)
    return torch.where(needed > 1, needed * (1 + 1e-6), 1.0).to(bias.dtype)


def _biased_layers(sim: QuantizationSimModel) -> Iterator[tuple[QuantizerSite, torch.Tensor, torch.Tensor]]:
    """Yield the weight's site, the bias, and the input's scale in the file, of each layer with int32 arithmetic."""
    sites = quantizer_sites(sim)
    modules = {node: sim.model.get_submodule(node.target) for node in sim.model.graph.nodes if node.op == "call_module"}
    inputs = {site.node: site for site in sites if site.role == "input" and site.key == 0}
    outputs = {site.node: site for site in sites if site.role == "output"}
    for weight in (site for site in sites if site.role == "param" and site.key == "weight"):
        bias = modules[weight.node].bias
        source = inputs.get(weight.node) or _quantized_source(weight.node, modules, outputs)
        if bias is None or source is None:
            continue
        target = _quantized_target(weight.node, outputs)
        converted = target is not None and source.bit_width == 8 and target.bit_width == 16
        if weight.bit_width + (16 if converted else source.bit_width) <= MOST_BITS:
            yield weight, bias, source.quantizer.get_scale().detach() / (WIDE_STEPS if converted else 1)


def _quantized_source(
    node: torch.fx.Node, modules: dict[torch.fx.Node, Any], outputs: dict[torch.fx.Node, QuantizerSite]
) -> QuantizerSite | None:
    """Return the site that quantizes a layer's input, before any layers that keep values as they are."""
    source = node.all_input_nodes[0]
    while source in modules:
        if source in outputs or not isinstance(modules[source], nn.Identity | nn.MaxPool2d):
            return outputs.get(source)
        source = source.all_input_nodes[0]
    return None


def _quantized_target(node: torch.fx.Node, outputs: dict[torch.fx.Node, QuantizerSite]) -> QuantizerSite | None:
    """Return the site that quantizes a layer's output, after any layers that have no quantizer, such as its ReLU."""
    while node not in outputs and len(node.users) == 1:
        (node,) = node.users
    return outputs.get(node)
