"""Quantizer sites: which quantizer sits where, and its names in the lowered network and in ONNX files.

The encodings and weights at all sites can be read as values, to go back to an earlier simulation or to save it.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.system.files import check_plain_file

INPUT_TENSOR, OUTPUT_TENSOR = "image", "logits"  # names of the network's input and output in exported ONNX files
WEIGHT, ACTIVATION = "weight", "activation"  # kinds of a site


@dataclass(frozen=True, eq=False)
class QuantizerSite:
    """One enabled quantizer at one position in the network. Several sites may share a quantizer."""

    node: torch.fx.Node  # the layer in sim.model.graph
    role: str  # "input", "param" or "output": what the quantizer does in that layer
    key: int | str  # index of the input or output, or name of the parameter
    container: Any  # AIMET's list or dict that holds the quantizer under `key`

    @property
    def layer(self) -> str:
        """Dotted name of the module, as in sim.model.named_modules()."""
        return str(self.node.target)

    @property
    def quantizer(self) -> QuantizerBase:
        """The current quantizer; loading encodings may replace it."""
        return self.container[self.key]

    @property
    def name(self) -> str:
        """The name of the quantizer in sim.model.named_modules(), if it is not shared with an earlier site."""
        return f"{self.layer}.{self.role}_quantizers.{self.key}"

    @property
    def kind(self) -> str:
        """WEIGHT or ACTIVATION."""
        return WEIGHT if self.role == "param" else ACTIVATION

    @property
    def bit_width(self) -> int:
        """Number of bits of the quantizer's integers."""
        return int(self.quantizer.qmax - self.quantizer.qmin).bit_length()

    @property
    def tensor(self) -> str | None:
        """Tensor in the exported ONNX file; None if the file has no tensor of its own for it."""
        if self.role == "param":
            return f"{self.layer}.{self.key}"
        if self.role == "output":
            return OUTPUT_TENSOR if any(user.op == "output" for user in self.node.users) else self.layer
        return INPUT_TENSOR if [source.op for source in tensor_arguments(self.node)] == ["placeholder"] else None

    @property
    def lowered_name(self) -> str:
        """Name of the FakeQuantize module in the lowered network; for a parameter, the layer itself."""
        if self.role == "param":
            return self.layer
        number = f"_{self.key}" if self.role == "input" and len(tensor_arguments(self.node)) > 1 else ""
        return f"{self.layer}_{self.role}_quantizer{number}"


def quantizer_sites(sim: QuantizationSimModel) -> list[QuantizerSite]:
    """Return the sites of all enabled quantizers in order of execution; within a layer: inputs, parameters, output."""
    sites = []
    for node in sim.model.graph.nodes:
        module: Any = sim.model.get_submodule(node.target) if node.op == "call_module" else None
        for role in ("input", "param", "output") if hasattr(module, "param_quantizers") else ():
            container = getattr(module, f"{role}_quantizers")
            keys = container if role == "param" else range(len(container))
            sites += [QuantizerSite(node, role, key, container) for key in keys if container[key] is not None]
    return sites


def sites_by_quantizer(sites: Iterable[QuantizerSite]) -> list[tuple[QuantizerSite, ...]]:
    """Return the sites of each quantizer, in the order of its first site.

    AIMET lets layers share a quantizer if their tensors must have the same encoding, such as the inputs and the output
    of a concatenation.
    """
    found: dict[int, list[QuantizerSite]] = defaultdict(list)
    for site in sites:
        found[id(site.quantizer)].append(site)
    return [tuple(group) for group in found.values()]


def precision(sim: QuantizationSimModel) -> str:
    """Return the bits of weights and activations, as the names of backends show them."""
    sites = quantizer_sites(sim)
    weights = {site.bit_width for site in sites if site.kind == WEIGHT}
    return describe_bits(weights, {site.bit_width for site in sites if site.kind != WEIGHT})


def describe_bits(weights: Collection[int], activations: Collection[int]) -> str:
    """Return the bit widths of weights and activations as one name.

    It is "INT8" for 8-bit weights and activations; with several bit widths the smallest one counts, as in "W4A8 mixed".
    """
    text = "".join(f"{letter}{min(bits)}" for letter, bits in (("W", weights), ("A", activations)) if bits)
    mixed = any(len(bits) > 1 for bits in (weights, activations))
    return f"{text} mixed" if mixed else "INT8" if text == "W8A8" else text


def site_parameter(sim: QuantizationSimModel, site: QuantizerSite) -> nn.Parameter:
    """Return the parameter that a site of kind WEIGHT quantizes, not quantized."""
    return sim.model.get_submodule(site.layer).get_parameter(str(site.key))


def tensor_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes whose tensors a layer takes; AIMET numbers its input quantizers in this order."""
    return [argument for argument in node.args if isinstance(argument, torch.fx.Node)]


@dataclass(frozen=True, eq=False)
class SiteState:
    """The encoding of a site's quantizer and, if it quantizes a parameter, that parameter; tensors on the CPU."""

    qmin: int
    qmax: int
    symmetric: bool
    low: torch.Tensor  # the smallest values of the range
    high: torch.Tensor
    parameter: torch.Tensor | None  # None: leave that of the simulation as it is


SimState = dict[str, SiteState]  # by name of the site


def read_state(sim: QuantizationSimModel, sites: Iterable[QuantizerSite] | None = None) -> SimState:
    """Return the state of a simulation, or only of some of its sites."""
    return {site.name: _read_site(sim, site) for site in sites or quantizer_sites(sim)}


def _read_site(sim: QuantizationSimModel, site: QuantizerSite) -> SiteState:
    quantizer = site.quantizer
    low, high = _copy(quantizer.min), _copy(quantizer.max)
    parameter = _copy(site_parameter(sim, site)) if site.kind == WEIGHT else None
    return SiteState(quantizer.qmin, quantizer.qmax, quantizer.symmetric, low, high, parameter)


@torch.no_grad()
def write_state(sim: QuantizationSimModel, state: SimState, sites: Iterable[QuantizerSite] | None = None) -> None:
    """Give a simulation of the same network, or only some of its sites, the encodings and weights of `state`."""
    for site in sites or quantizer_sites(sim):
        value, quantizer = state[site.name], site.quantizer
        quantizer.qmin, quantizer.qmax, quantizer.symmetric = value.qmin, value.qmax, value.symmetric
        device = quantizer.min.device
        quantizer.set_range(value.low.to(device), value.high.to(device))
        if value.parameter is not None:
            site_parameter(sim, site).copy_(value.parameter)


def without_parameters(state: SimState) -> SimState:
    """Return a state that leaves the parameters of a simulation as they are."""
    return {name: replace(value, parameter=None) for name, value in state.items()}


def save_state(state: SimState, description: Any) -> bytes:
    """Return the content of a safetensors file of a state and of a description that JSON can hold."""
    return safetensors.torch.save(_tensors(state), {"description": json.dumps(description)})


def _tensors(state: SimState) -> dict[str, torch.Tensor]:
    """Return everything in a state as tensors by site and field; the integers are one tensor."""
    found: dict[str, torch.Tensor | None] = {}
    for site, value in state.items():
        found[f"{site} integers"] = torch.tensor([value.qmin, value.qmax, value.symmetric])
        found |= {f"{site} low": value.low, f"{site} high": value.high, f"{site} parameter": value.parameter}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def load_state(path: Path, like: SimState) -> tuple[SimState, Any]:
    """Return the state and the description in a file of `save_state`.

    Args:
        path: The file.
        like: A state of the same sites, with tensors of the same shapes.

    Raises:
        Exception: If the file is damaged; a ValueError if its state is implausible or not that of the sites.
    """
    check_plain_file(path)
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["description"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = _tensors(like)
    for name, tensor in tensors.items():
        known = expected[name]
        if (tensor.dtype, tensor.shape) != (known.dtype, known.shape) or not tensor.isfinite().all():
            raise ValueError(f"{name}: these are not the values of a quantizer of this network")
    state = {}
    for site in like:
        qmin, qmax, symmetric = tensors[f"{site} integers"].tolist()
        low, high = tensors[f"{site} low"], tensors[f"{site} high"]
        if not (-(1 << 31) < qmin < qmax < qmin + (1 << 31) and symmetric in (0, 1) and (low <= high).all()):
            raise ValueError(f"{site}: no quantizer has this encoding")
        state[site] = SiteState(qmin, qmax, bool(symmetric), low, high, tensors.get(f"{site} parameter"))
    return state, description


class SavedStates:
    """Where finished work is saved under names, so that a later run can continue. This one saves nothing."""

    def load(self, name: str, like: SimState, form: Any) -> tuple[SimState, Any] | None:
        """Return what an earlier run saved, None if it saved nothing.

        Args:
            name: Name of the work.
            like: A state of the same sites, with tensors of the same shapes.
            form: Type of the description, see `ffnet.system.schema.parse`.
        """
        return None

    def save(self, name: str, state: SimState, description: Any = None) -> None:
        """Save a state and its description, which JSON can hold."""


UNSAVED = SavedStates()


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().as_subclass(torch.Tensor).cpu().clone()
