"""Small networks of FFNet's layers, their simulations, and AIMET's own answers."""

import torch
import torch.nn.functional as F
from torch import nn

from ffnet.config import QuantizationConfig
from ffnet.model import BasicBlock, ConvBNReLU
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize, quiet_aimet
from ffnet.quantization.recovery.mixed_precision import precision_groups
from ffnet.quantization.sites import WEIGHT
from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.networks import golden_state, random_batches


class SmallNetwork(nn.Module):
    """One of each layer of an FFNet that AIMET treats differently: a residual block, an interpolation, a concatenation.

    (N, 3, H, W) -> logits (N, 19, H / 2, W / 2).
    """

    def __init__(self):
        super().__init__()
        self.stem = ConvBNReLU(3, 8, 3)
        self.pool = nn.MaxPool2d(2)
        self.block = BasicBlock(8, 16, 2)
        self.adapter = ConvBNReLU(8, 8, 1)
        self.classifier = nn.Conv2d(24, 19, 1)

    def forward(self, x):
        fine = self.pool(self.stem(x))
        coarse = self.block(fine)
        fine = self.adapter(fine)
        return self.classifier(torch.cat([fine, F.interpolate(coarse, size=fine.shape[2:], mode="nearest")], dim=1))


def small_network():
    """Return a SmallNetwork with golden weights."""
    model = SmallNetwork().eval()
    model.load_state_dict(golden_state(model))
    return model


def simulate(model, batches=None, **config):
    """Return a calibrated simulation whose biases are not limited; `config`: fields of QuantizationConfig."""
    config = QuantizationConfig(**config)
    sim = build_quantsim(equalize(model, config.cle), config)
    calibrate(sim, random_batches() if batches is None else batches)
    return sim


def calibrated_by_aimet(prepared, batches, config):
    """Return a simulation with AIMET's own analyzers and its own search for encodings."""
    sim = build_quantsim(prepared, config)
    with quiet_aimet(), torch.no_grad():
        sim.compute_encodings(lambda model: [model(batch) for batch in batches])
    return sim


def random_images(number, growing=False):
    """Return unlabelled images of noise; if `growing`, each has a larger range than the one before."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (number, 3, 64, 128), generator=generator, dtype=torch.uint8)
    if growing:
        images = (images * torch.linspace(0.2, 1, number).view(-1, 1, 1, 1)).to(torch.uint8)
    return [(image, torch.zeros(64, 128, dtype=torch.uint8)) for image in images]


def compute_weight_encodings(sim):
    """Compute the encodings of all weights, as AIMET does before sequential MSE."""
    for _, module in sim.named_qmodules():
        module._compute_param_encodings(overwrite=True)


def raise_precision(sim, tensors):
    """Give activations 16 bits and weights 8 bits in their present range; `tensors`: one tensor of each group."""
    for sites in precision_groups(sim):
        if not {site.tensor for site in sites}.isdisjoint(tensors):
            quantizer = sites[0].quantizer
            low, high = (bound.detach().clone() for bound in (quantizer.min, quantizer.max))
            is_weight = sites[0].kind == WEIGHT
            quantizer.qmin, quantizer.qmax = (-128, 127) if is_weight else (0, 65535)
            quantizer.set_range(low, -low * 127 / 128 if is_weight else high)
    raise_weight_scales(sim)


def logits(model, x):
    """Return what a model computes, as a plain tensor."""
    with torch.no_grad():
        return model(x).as_subclass(torch.Tensor)


def encodings(sim):
    """Return {name: (scales, smallest and largest integer)} of the quantizers that have encodings."""
    return {
        name: (q.get_scale().tolist(), (q.get_offset() + q.qmin).tolist(), (q.get_offset() + q.qmax).tolist())
        for name, q in sim.named_quantizers()
        if q.is_initialized()
    }
