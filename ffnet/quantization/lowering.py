"""Convert a calibrated simulation into plain torch modules that compute the same and run faster.

AIMET's simulation quantizes the weights in every forward pass and dispatches in Python. Here weights are quantized once
and every activation quantizer becomes one module. In eager mode, the logits are those of `sim.model` bit for bit.
"""

import copy
from collections import defaultdict
from typing import Any

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.quantization.sites import QuantizerSite, quantizer_sites, tensor_arguments
from ffnet.system.errors import UserError, check_type


class FakeQuantize(nn.Module):
    """Quantizes and dequantizes a float32 tensor to integers from qmin to qmax: round half to even, then clamp.

    `scale` (float32) and `zero_point` (int32) are scalar tensors.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> None:
        super().__init__()
        self.qmin, self.qmax = qmin, qmax
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.step, self.zero = scale.item(), int(zero_point.item())  # numbers, which compiled code holds as constants
        self.reciprocal = (1 / scale).item()  # float32, by which torch's own kernel multiplies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the quantized and dequantized tensor."""
        if torch.compiler.is_compiling():  # one fused kernel; the operator would be a separate call
            rounded = torch.round(x * self.reciprocal) + self.zero
            return (rounded.clamp(self.qmin, self.qmax) - self.zero) * self.step
        return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, self.qmin, self.qmax)


def lower(sim: QuantizationSimModel) -> torch.fx.GraphModule:
    """Return a calibrated simulation as a graph of plain modules, in eval mode.

    Layers keep their names; a quantizer of an activation becomes the FakeQuantize `site.lowered_name`. Raise a
    UserError if a quantizer is not calibrated or of a kind that has no counterpart.
    """
    check_type("sim", sim, QuantizationSimModel, "Give the `sim` of a quantized network")
    graph = torch.fx.Graph()
    modules: dict[str, nn.Module] = {}
    values: dict[torch.fx.Node, torch.fx.Node] = {}  # node of the simulation -> node of `graph`
    sites: dict[tuple[torch.fx.Node, str], list[QuantizerSite]] = defaultdict(list)
    for site in quantizer_sites(sim):
        sites[site.node, site.role].append(site)
    for node in sim.model.graph.nodes:
        module = sim.model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Identity):  # a folded batch norm
            values[node] = values[node.args[0]]
            continue
        if module is not None:
            modules[node.target] = _plain_layer(module, sites[node, "param"])
        sources = dict(values)
        for site in sites[node, "input"]:
            source = tensor_arguments(node)[int(site.key)]
            sources[source] = _insert(graph, site, values[source], modules)
        values[node] = graph.node_copy(node, sources.__getitem__)
        for site in sites[node, "output"]:
            values[node] = _insert(graph, site, values[node], modules)
    graph.lint()
    return torch.fx.GraphModule(modules, graph).eval()


def _insert(
    graph: torch.fx.Graph, site: QuantizerSite, value: torch.fx.Node, modules: dict[str, nn.Module]
) -> torch.fx.Node:
    """Append the FakeQuantize of a site to the graph and the modules; return its node."""
    quantizer = _checked_quantizer(site)
    scale, offset = quantizer.get_scale().detach(), quantizer.get_offset().detach()
    if scale.numel() > 1:
        raise UserError(f"{site.name}: an activation with {scale.numel()} scales is not supported. Use one per tensor.")
    scale, zero_point = scale.float().reshape(()), -offset.to(torch.int32).reshape(())
    modules[site.lowered_name] = FakeQuantize(scale, zero_point, quantizer.qmin, quantizer.qmax)
    return graph.create_node("call_module", site.lowered_name, (value,))


def _plain_layer(module: Any, sites: list[QuantizerSite]) -> nn.Module:
    """Return a copy of a layer without its quantizers, the parameters of `sites` quantized once."""
    original = module.get_original_module() if hasattr(module, "param_quantizers") else module
    plain = copy.deepcopy(original).requires_grad_(False)
    for site in sites:
        quantizer = _checked_quantizer(site)
        with torch.no_grad():
            value = quantizer(getattr(module, str(site.key))).as_subclass(torch.Tensor).clone()
        setattr(plain, str(site.key), nn.Parameter(value, requires_grad=False))
    return plain


def _checked_quantizer(site: QuantizerSite) -> QuantizeDequantize:
    """Return the quantizer of a site; raise a UserError unless it is affine, calibrated and without blocks."""
    quantizer = site.quantizer
    if type(quantizer) is not QuantizeDequantize or quantizer.block_size or quantizer.zero_point_shift:
        raise UserError(f"{site.name}: {quantizer} is not supported. Use affine quantizers without blocks.")
    if not quantizer.is_initialized():
        raise UserError(f"{site.name}: this quantizer has no encodings. Calibrate the simulation first.")
    return quantizer
