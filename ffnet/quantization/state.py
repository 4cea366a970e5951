"""The encodings and weights of a simulation as values, to go back to an earlier simulation or to write it to disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
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
INTEGERS, TENSORS = ("qmin", "qmax", "symmetric"), ("low", "high")  # fields of a SiteState; `parameter` may be None


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


def save_state(state: SimState, description: Mapping[str, Any], parameters: bool) -> bytes:
    """Return the content of a safetensors file of a state.

    Args:
        state: of a simulation.
        description: of anything that JSON can hold.
        parameters: whether the file holds the parameters too; without them, `write_state` leaves those of the
            simulation as they are.
    """
    names = [*TENSORS, "parameter"] if parameters else list(TENSORS)
    tensors: dict[str, torch.Tensor] = {}
    integers = {}
    for site, value in state.items():
        present = {name: getattr(value, name) for name in names}
        tensors |= {f"{site} {name}": tensor.contiguous() for name, tensor in present.items() if tensor is not None}
        integers[site] = {name: getattr(value, name) for name in INTEGERS}
    return safetensors.torch.save(tensors, {"sites": json.dumps(integers), "description": json.dumps(description)})


def load_state(path: Path) -> tuple[SimState, dict[str, Any]]:
    """Return the state and the description in a file that `save_state` made; raise a SafetensorError if damaged."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        state = {}
        for site, integers in json.loads(metadata["sites"]).items():
            keys = {name: f"{site} {name}" for name in (*TENSORS, "parameter")}
            tensors: dict[str, Any] = {n: file.get_tensor(key) if key in names else None for n, key in keys.items()}
            state[site] = SiteState(**integers, **tensors)
    return state, json.loads(metadata["description"])


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().as_subclass(torch.Tensor).cpu().clone()
