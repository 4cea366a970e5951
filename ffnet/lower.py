"""A calibrated simulation -> the same arithmetic in plain torch modules, fast.

AIMET's simulation quantizes the weights anew in every forward pass and dispatches in Python. Here weights are quantized
once, and one fake quantizer stands where AIMET has one. Eager, the logits are `sim.model`'s bit for bit.
"""

import copy

import torch
from torch import nn

from ffnet.errors import UserError


class FakeQuantize(nn.Module):
    """Quantizes and dequantizes a float32 tensor, per tensor or along one axis: round half to even, then clamp.

    `scale`: float32 and `zero_point`: int32, each of one element or one a channel along `axis`.
    """

    def __init__(self, scale, zero_point, qmin, qmax, axis=None):
        super().__init__()
        self.qmin, self.qmax, self.axis = qmin, qmax, axis
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        if axis is None:  # numbers, so that compiled code holds them as constants
            self.step, self.zero = scale.item(), int(zero_point.item())
            self.reciprocal = (1 / scale).item()  # in float32, by which torch's own kernel multiplies

    def forward(self, x):
        if self.axis is not None:
            return torch.fake_quantize_per_channel_affine(
                x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax
            )
        if torch.compiler.is_compiling():  # one fused kernel, where the operator would be a call of its own
            rounded = torch.round(x * self.reciprocal) + self.zero
            return (rounded.clamp(self.qmin, self.qmax) - self.zero) * self.step
        return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, self.qmin, self.qmax)


def lower(sim):
    """The calibrated simulation as a torch.fx.GraphModule of plain modules, in eval mode.

    Names of layers stay; the quantizer at an output or input is `<layer>_output_quantizer`, `<layer>_input_quantizer`
    (a number behind it where there are several). UserError names a quantizer that has no counterpart here.
    """
    graph = torch.fx.Graph()
    modules = {}
    values = {}
    for node in sim.model.graph.nodes:
        module = sim.model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Identity):
            values[node] = values[node.args[0]]
        elif hasattr(module, "param_quantizers"):
            values[node] = _lower_layer(graph, node, module, modules, values)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if module is not None:
                modules[node.target] = copy.deepcopy(module)
    graph.lint()
    return torch.fx.GraphModule(_tree(modules), graph).eval()


def _lower_layer(graph, node, module, modules, values):
    """Adds a quantized layer to `graph` with its quantizers as layers of their own; returns its last node."""
    tensors = [argument for argument in node.args if isinstance(argument, torch.fx.Node)]
    sources = {}
    for source, (quantizer, name) in zip(
        tensors, _named(node, module.input_quantizers, "input", len(tensors)), strict=True
    ):
        sources[source] = _quantized(graph, values[source], quantizer, name, modules)
    modules[node.target] = _plain(module, node.target)
    result = graph.node_copy(node, lambda source: sources.get(source, values[source]))
    ((quantizer, name),) = _named(node, module.output_quantizers, "output", 1)
    return _quantized(graph, result, quantizer, name, modules)


def _named(node, quantizers, side, count):
    """(quantizer or None, name for it) of each of `count` tensors at one side of a layer."""
    quantizers = list(quantizers)
    if any(quantizer is not None for quantizer in quantizers[count:]):
        raise UserError(f"{node.target}: has more {side} quantizers than {side}s")
    quantizers = (quantizers + [None] * count)[:count]
    base = f"{node.target}_{side}_quantizer"
    return [(quantizer, f"{base}_{i}" if count > 1 else base) for i, quantizer in enumerate(quantizers)]


def _quantized(graph, value, quantizer, name, modules):
    if quantizer is None:
        return value
    modules[name] = fake_quantizer(quantizer, name)
    return graph.create_node("call_module", name, (value,))


def fake_quantizer(quantizer, name):
    """The FakeQuantize that computes what AIMET's quantizer does; UserError where there is none."""
    _check_known(quantizer, name)
    scale = quantizer.get_scale().detach().float()
    zero_point = -quantizer.get_offset().detach().to(torch.int32)
    if scale.numel() == 1:
        return FakeQuantize(scale.reshape(()), zero_point.reshape(()), quantizer.qmin, quantizer.qmax)
    wide = [i - scale.dim() for i, length in enumerate(scale.shape) if length > 1]
    if len(wide) > 1 or wide[0] < -3:
        raise UserError(f"{name}: scales of shape {tuple(scale.shape)} lie along no single channel axis")
    return FakeQuantize(scale.flatten(), zero_point.flatten(), quantizer.qmin, quantizer.qmax, axis=4 + wide[0])


def _check_known(quantizer, name):
    """UserError unless the quantizer is affine, of one scale a tensor or channel, and calibrated."""
    from aimet_torch.quantization.affine import QuantizeDequantize

    if type(quantizer) is not QuantizeDequantize or quantizer.block_size or quantizer.zero_point_shift:
        raise UserError(f"{name}: {quantizer} is no quantizer that can be lowered; only affine ones without blocks are")
    if not quantizer.is_initialized():
        raise UserError(f"{name}: was never calibrated")


def _plain(module, name):
    """The layer without its quantizers, its parameters quantized once."""
    plain = copy.deepcopy(module.get_original_module()).requires_grad_(False)
    for key, quantizer in module.param_quantizers.items():
        if quantizer is not None:
            _check_known(quantizer, f"{name}.{key}")
            with torch.no_grad():
                value = quantizer(getattr(module, key)).as_subclass(torch.Tensor).clone()
            setattr(plain, key, nn.Parameter(value, requires_grad=False))
    return plain


def _tree(modules):
    """A module that holds `modules`, {dotted name: module}, each under its name."""
    root = nn.Module()
    for name, module in modules.items():
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)
    return root
