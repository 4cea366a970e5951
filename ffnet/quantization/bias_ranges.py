"""Raise weight scales until every bias fits into int32.

Integer kernels hold a bias as int32 in units of input scale times weight scale. A channel with nearly zero weights has
so small a scale that its bias overflows: the device would clip what the simulation computes in float. AIMET's
calibration raises such scales only in layers that have an output quantizer of their own, so not if a ReLU follows.
"""

from collections.abc import Iterator

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.sites import QuantizerSite
from ffnet.quantization.weighted_layers import weighted_layers

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
    """Yield the weight's site, the bias, and the input's scale in files, of each layer with int32 arithmetic."""
    for layer in weighted_layers(sim):
        bias, scale = sim.model.get_submodule(layer.weight.layer).bias, layer.input_scale
        if bias is not None and scale is not None and layer.weight.bit_width + layer.input_bits <= MOST_BITS:
            yield layer.weight, bias, scale
