"""Quantizer sites: which quantizer sits where, and its names in the lowered network and in ONNX files."""

import itertools
from collections import defaultdict
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

    layer: str  # dotted name of the module, as in sim.model.named_modules()
    role: str  # "input", "param" or "output": what the quantizer does in that layer
    key: int | str  # index of the input or output, or name of the parameter
    container: Any  # AIMET's list or dict that holds the quantizer under `key`
    node: torch.fx.Node  # the layer in sim.model.graph
    tensor: str | None  # tensor in the exported ONNX file; None if the file has no tensor of its own for it
    lowered_name: str  # name of the FakeQuantize module in the lowered network; for a parameter, the layer itself

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


def quantizer_sites(sim: QuantizationSimModel) -> list[QuantizerSite]:
    """Return the sites of all enabled quantizers in order of execution; within a layer: inputs, parameters, output."""
    (output,) = (node for node in sim.model.graph.nodes if node.op == "output")
    layers = (node for node in sim.model.graph.nodes if node.op == "call_module")
    sites = (_layer_sites(node, sim.model.get_submodule(node.target), node is output.args[0]) for node in layers)
    return list(itertools.chain.from_iterable(sites))


def sites_by_quantizer(sim: QuantizationSimModel) -> list[list[QuantizerSite]]:
    """Return the sites of each quantizer, in order of execution.

    AIMET lets layers share a quantizer if their tensors must have the same encoding, such as the inputs and the output
    of a concatenation.
    """
    found: dict[int, list[QuantizerSite]] = defaultdict(list)
    for site in quantizer_sites(sim):
        found[id(site.quantizer)].append(site)
    return list(found.values())


def site_parameter(sim: QuantizationSimModel, site: QuantizerSite) -> nn.Parameter:
    """Return the parameter that a site of kind WEIGHT quantizes, not quantized."""
    return sim.model.get_submodule(site.layer).get_parameter(str(site.key))


def tensor_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes whose tensors a layer takes; AIMET numbers its input quantizers in this order."""
    return [argument for argument in node.args if isinstance(argument, torch.fx.Node)]


def _layer_sites(node: torch.fx.Node, module: Any, is_last: bool) -> list[QuantizerSite]:
    """Return the sites of one layer; `is_last`: its output is the network's output."""
    if not hasattr(module, "param_quantizers"):
        return []
    layer, arguments = str(node.target), tensor_arguments(node)
    input_tensor = INPUT_TENSOR if [source.op for source in arguments] == ["placeholder"] else None
    input_name = f"{layer}_input_quantizer" + ("_{}" if len(arguments) > 1 else "")
    output = OUTPUT_TENSOR if is_last else layer, f"{layer}_output_quantizer"
    inputs, params, outputs = module.input_quantizers, module.param_quantizers, module.output_quantizers
    sites = [
        *(
            QuantizerSite(layer, "input", i, inputs, node, input_tensor, input_name.format(i))
            for i in range(len(inputs))
        ),
        *(QuantizerSite(layer, "param", name, params, node, f"{layer}.{name}", layer) for name in params),
        *(QuantizerSite(layer, "output", i, outputs, node, *output) for i in range(len(outputs))),
    ]
    return [site for site in sites if site.quantizer is not None]
