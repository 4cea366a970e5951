"""Quantizer sites: which quantizer sits where, and its names in the lowered network and in ONNX files."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

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


def site_parameter(sim: QuantizationSimModel, site: QuantizerSite) -> nn.Parameter:
    """Return the parameter that a site of kind WEIGHT quantizes, not quantized."""
    return sim.model.get_submodule(site.layer).get_parameter(str(site.key))


def tensor_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes whose tensors a layer takes; AIMET numbers its input quantizers in this order."""
    return [argument for argument in node.args if isinstance(argument, torch.fx.Node)]
