"""Biases that a device can hold.

Integer kernels keep a bias as int32 in steps of input scale times weight scale. A channel whose weights are all but
zero has so small a scale that its bias overflows 32 bits: the device clips what the simulation computes in float.
"""

from dataclasses import dataclass

import torch
from torch import nn

LARGEST = 2**31 - 2**8  # of an int32, less what float32 rounds off


@dataclass(frozen=True)
class Convolution:
    """A convolution of a calibrated simulation with all that its int32 bias depends on."""

    name: str
    bias: torch.Tensor  # (channels,) float32
    quantizer: nn.Module  # of its weight, one scale a channel or one in all
    input_scale: torch.Tensor  # () float32


def fit_biases(sim):
    """Raises weight scales of the calibrated `sim`, in place, until every bias fits into int32.

    Returns {layer: channels changed}. It changes next to nothing: with n products a value of 8 bits, a channel's output
    moves by less than n * 255 / 2**32 of its bias. To be called before lowering and export.
    """
    changed = {}
    for convolution in _convolutions(sim):
        factors = overflow(convolution)
        if (factors > 1).any():
            with torch.no_grad():
                for bound in (convolution.quantizer.min, convolution.quantizer.max):
                    bound.mul_((factors if bound.numel() > 1 else factors.max()).reshape(bound.shape))
            changed[convolution.name] = int((factors > 1).sum())
    return changed


def overflow(convolution):
    """(channels,) the factors, at least 1, by which the weight's scales are too small for the bias."""
    steps = convolution.quantizer.get_scale().detach().flatten() * convolution.input_scale
    needed = convolution.bias.detach().abs() / (steps.double() * LARGEST)
    return torch.where(needed > 1, needed * (1 + 1e-6), 1.0).to(convolution.bias.dtype)


def _convolutions(sim):
    """A Convolution for each that has a bias, and scales of input and weight."""
    modules = {node: sim.model.get_submodule(node.target) for node in sim.model.graph.nodes if node.op == "call_module"}
    for node, module in modules.items():
        quantizer = dict(getattr(module, "param_quantizers", {})).get("weight")
        source = _input_quantizer(node, modules) if quantizer is not None else None
        if source is not None and module.bias is not None:
            yield Convolution(node.target, module.bias, quantizer, source.get_scale().detach())


def _input_quantizer(node, modules):
    """What quantizes the input of a layer, at the layer or where it comes from; None if nothing does."""
    if modules[node].input_quantizers[0] is not None:
        return modules[node].input_quantizers[0]
    source = node.all_input_nodes[0]
    while source in modules:
        (quantizer,) = getattr(modules[source], "output_quantizers", (None,))
        if quantizer is not None or not isinstance(modules[source], (nn.Identity, nn.MaxPool2d)):
            return quantizer
        source = source.all_input_nodes[0]
    return None
