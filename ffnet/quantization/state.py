"""The encodings and weights of a simulation as values, so that a search can go back to an earlier simulation."""

from dataclasses import dataclass

import torch
from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.sites import WEIGHT, QuantizerSite, quantizer_sites, site_parameter


@dataclass(frozen=True, eq=False)
class SiteState:
    """The encoding of a site's quantizer and, if it quantizes a parameter, that parameter; tensors on the CPU."""

    qmin: int
    qmax: int
    symmetric: bool
    low: torch.Tensor  # the smallest values of the range
    high: torch.Tensor
    parameter: torch.Tensor | None


SimState = dict[str, SiteState]  # by name of the site


def read_state(sim: QuantizationSimModel) -> SimState:
    """Return the state of a calibrated simulation."""
    return {site.name: _read_site(sim, site) for site in quantizer_sites(sim)}


def _read_site(sim: QuantizationSimModel, site: QuantizerSite) -> SiteState:
    quantizer = site.quantizer
    low, high = _copy(quantizer.min), _copy(quantizer.max)
    parameter = _copy(site_parameter(sim, site)) if site.kind == WEIGHT else None
    return SiteState(quantizer.qmin, quantizer.qmax, quantizer.symmetric, low, high, parameter)


@torch.no_grad()
def write_state(sim: QuantizationSimModel, state: SimState) -> None:
    """Give a simulation of the same network the encodings and weights of `state`."""
    for site in quantizer_sites(sim):
        value, quantizer = state[site.name], site.quantizer
        quantizer.qmin, quantizer.qmax, quantizer.symmetric = value.qmin, value.qmax, value.symmetric
        device = quantizer.min.device
        quantizer.set_range(value.low.to(device), value.high.to(device))
        if value.parameter is not None:
            site_parameter(sim, site).copy_(value.parameter)


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().as_subclass(torch.Tensor).cpu().clone()
