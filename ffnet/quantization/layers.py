"""Compare the quantized activations of a network with a reference's, layer by layer, and describe the worst layers.

SQNR (signal-to-quantization-noise ratio) in dB is 10 log10(sum of the reference's squares / sum of squared errors).
AIMET's QuantAnalyzer exports the same errors as means of squares, and its LayerOutputUtil the activations.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import fx, nn

from ffnet.evaluation.scores import SIMULATED
from ffnet.model import GaussianConv2D
from ffnet.quantization.quantize import QuantizedNetwork
from ffnet.quantization.sensitivity import decibels, remove_quantizers
from ffnet.quantization.sites import ACTIVATION, INPUT_TENSOR, WEIGHT, QuantizerSite, quantizer_sites

WORST = 5  # number of activations and of weights that are described in detail
BINS, OUTER_BINS = 64, 16  # bins of a histogram in the range of the quantizer, and on either side of it

# Tensor of an activation in exported files -> name of its FakeQuantize in the lowered network, and that module.
Activations = Mapping[str, tuple[str, Any]]
Integers = Mapping[str, torch.Tensor]  # the same tensors -> integers; the smallest of the dtype stands for qmin


@dataclass(frozen=True)
class Sqnr:
    """The SQNR of a layer in dB; None if there is no noise, or no signal."""

    total: float | None  # both networks compute all layers from the image
    own: float | None  # the reference computes the layer from the compared network's inputs of the layer


Comparison = dict[str, Sqnr]  # name of an activation -> SQNR, in order of execution


@dataclass(frozen=True)
class LayerRow:
    """The SQNR of a quantized activation by backend: of the simulation against FP32, of others against the former."""

    layer: str  # see `layer_names`; "image" is the quantized input
    tensor: str  # name in the exported file
    bits: int
    sqnr: dict[str, Sqnr]


@dataclass(frozen=True)
class ActivationHistogram:
    """The values of an activation in FP32 in BINS equal bins over the quantizer's range, and OUTER_BINS on either side.

    Values in outer bins are clipped; the outermost bins count all values beyond them, too.
    """

    layer: str
    low: float  # smallest value of the quantization grid
    high: float  # largest value of the quantization grid
    step: float  # distance of neighboring values of the grid
    counts: list[int]
    clipped: float  # share of the values


@dataclass(frozen=True)
class WeightRanges:
    """The largest absolute weight of each output channel of a layer, in float with the batch norm folded."""

    layer: str
    sqnr: float | None  # SQNR of the quantized weight in dB
    before: list[float]  # before equalization
    after: list[float]


@dataclass(frozen=True)
class Layers:
    """The SQNR of every quantized activation, in order of execution, and details of those with the smallest."""

    images: list[str]  # names of the images that were compared
    rows: list[LayerRow]
    histograms: list[ActivationHistogram]  # smallest own SQNR of the simulation first
    weights: list[WeightRanges]  # smallest SQNR first

    def add(self, backend: str, found: Comparison) -> "Layers":
        """Return the same with the SQNR of a backend."""
        rows = [replace(row, sqnr=row.sqnr | {backend: found[row.tensor]}) for row in self.rows]
        return replace(self, rows=rows)


def analyze_layers(
    model: nn.Module, network: QuantizedNetwork, images: Sequence[torch.Tensor], image_names: list[str]
) -> Layers:
    """Compare the simulation of `model` with FP32 on normalized images (1, 3, H, W) on the network's device.

    In memory are the integers of the simulation for one image; values in FP32 are compared as they are computed.
    """
    compared = activations(quantizer_sites(network.sim), network.lowered)
    plain = remove_quantizers(network.sim, network.float_network, network.lowered)
    found = compare_activations(plain, compared, ((each, record(network.lowered, compared, each)) for each in images))
    rows = layer_rows(model, network.sim)
    names = {row.tensor: row.layer for row in rows}
    worst = {tensor: names[tensor] for tensor in noisiest(found)[:WORST]}
    layers = Layers(image_names, rows, histograms(plain, compared, worst, images), worst_weights(model, network))
    return layers.add(network.names.of(SIMULATED), found)


def layer_rows(model: nn.Module, sim: QuantizationSimModel) -> list[LayerRow]:
    """Return the rows of all quantized activations, without SQNR."""
    names, rows = layer_names(model, sim), []
    for site in (site for site in quantizer_sites(sim) if site.kind == ACTIVATION):
        name = INPUT_TENSOR if site.tensor == INPUT_TENSOR else names[site.layer]
        suffix = ": input" if site.role == "input" and site.tensor is None else ""
        rows.append(LayerRow(name + suffix, site.tensor or site.name, site.bit_width, {}))
    return rows


def activations(sites: Iterable[QuantizerSite], lowered: nn.Module) -> dict[str, tuple[str, Any]]:
    """Return the quantized activations of a network that `lower` returned, in order of execution."""
    names = {site.tensor or site.name: site.lowered_name for site in sites if site.kind == ACTIVATION}
    return {tensor: (name, lowered.get_submodule(name)) for tensor, name in names.items()}


def noisiest(found: Comparison) -> list[str]:
    """Return the activations with noise of their own, smallest own SQNR first."""
    return sorted((name for name in found if found[name].own is not None), key=lambda name: found[name].own or 0.0)


def record(lowered: nn.Module, compared: Activations, image: torch.Tensor) -> Integers:
    """Return the integers of the simulation's activations, in a byte per value or, above 8 bits, in two."""
    recorded = {}

    def keep(tensor: str, quantizer: Any, output: torch.Tensor) -> None:
        integers = torch.round(output / quantizer.scale) + (quantizer.zero_point - quantizer.qmin)
        recorded[tensor] = integers.to(torch.uint8 if quantizer.qmax - quantizer.qmin < 256 else torch.uint16)

    _visit(lowered, compared, keep, image)
    return recorded


def compare_activations(
    reference: nn.Module, compared: Activations, runs: Iterable[tuple[torch.Tensor, Integers]]
) -> Comparison:
    """Compare a network's activations with those of a reference with the same graph, while these are computed.

    `runs`: images (1, 3, H, W) and the integers of the network, on the device of `reference`.
    """
    sums = {tensor: torch.zeros(2, 2, dtype=torch.float64) for tensor in compared}  # total, own; signal, noise
    for image, integers in runs:
        for own in (0, 1):

            def compare(tensor: str, quantizer: Any, output: torch.Tensor, own: int = own, all: Any = integers) -> Any:
                smallest = quantizer.qmin - quantizer.zero_point - torch.iinfo(all[tensor].dtype).min
                values = torch.empty_like(output).copy_(all[tensor]).add_(smallest).mul_(quantizer.scale)
                sums[tensor][own] += torch.tensor((_squares(output), _squares(output - values)), dtype=torch.float64)
                return values if own else None

            _visit(reference, compared, compare, image)
    return {tensor: Sqnr(*(decibels(*row) for row in each.tolist())) for tensor, each in sums.items()}


def _visit(network: nn.Module, compared: Activations, function: Callable[..., Any], image: torch.Tensor) -> None:
    """Run a network; call `function` with each tensor's name, quantizer and values, for which it may return others."""
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for tensor, (name, quantizer) in compared.items():
            hook = functools.partial(lambda known, *call: function(*known, call[-1]), (tensor, quantizer))
            hooks.enter_context(network.get_submodule(name).register_forward_hook(hook))
        network(image)


def _squares(values: torch.Tensor) -> float:
    return values.square().sum().item()


def histograms(
    plain: nn.Module, compared: Activations, names: Mapping[str, str], images: Iterable[torch.Tensor]
) -> list[ActivationHistogram]:
    """Return the histograms of the activations in `names`, which are to be called so, in the network in FP32."""
    number = BINS + 2 * OUTER_BINS
    counts = {tensor: torch.zeros(number, dtype=torch.int64) for tensor in names}

    def add(tensor: str, quantizer: Any, output: torch.Tensor) -> None:
        width = (quantizer.qmax - quantizer.qmin + 1) / BINS
        bins = (output / quantizer.step + (quantizer.zero - quantizer.qmin + 0.5)).div_(width).add_(OUTER_BINS)
        counts[tensor] += bins.floor_().clamp_(0, number - 1).to(torch.uint8).flatten().bincount(minlength=number).cpu()

    for image in images:
        _visit(plain, {tensor: compared[tensor] for tensor in names}, add, image)
    found = []
    for tensor, bins in ((tensor, each.tolist()) for tensor, each in counts.items()):
        quantizer = compared[tensor][1]
        low, high = ((limit - quantizer.zero) * quantizer.step for limit in (quantizer.qmin, quantizer.qmax))
        clipped = 1 - sum(bins[OUTER_BINS:-OUTER_BINS]) / sum(bins)
        found.append(ActivationHistogram(names[tensor], low, high, quantizer.step, bins, clipped))
    return found


def worst_weights(model: nn.Module, network: QuantizedNetwork) -> list[WeightRanges]:
    """Return the weights with the smallest SQNR, the worst first; `model`: the network before equalization."""
    factors, found = _batch_norm_factors(model), []
    for name in (s.layer for s in quantizer_sites(network.sim) if s.kind == WEIGHT and s.key == "weight"):
        networks = (model, network.float_network, network.lowered)
        original, weight, quantized = (each.get_parameter(f"{name}.weight").detach() for each in networks)
        before, after = (each.abs().flatten(1).amax(1) for each in (original, weight))
        ranges = (before * factors.get(name, 1.0)).tolist(), after.tolist()
        rounded = ([float(f"{value:.4g}") for value in each] for each in ranges)
        found.append(WeightRanges(name, decibels(_squares(weight), _squares(weight - quantized)), *rounded))
    return sorted(found, key=lambda each: math.inf if each.sqnr is None else each.sqnr)[:WORST]


def _batch_norm_factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return by how much folding a batch norm multiplies the channels of the layer before it."""
    factors = {}
    for node in _trace(model):
        norm = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, nn.BatchNorm2d):
            deviation = torch.sqrt(norm.get_buffer("running_var") + norm.eps)
            factors[str(node.all_input_nodes[0].target)] = (norm.weight.detach() / deviation).abs()
    return factors


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GaussianConv2D) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> Iterable[fx.Node]:
    return _Tracer().trace(model).nodes


def layer_names(model: nn.Module, sim: QuantizationSimModel) -> dict[str, str]:
    """Return the names of the network's modules by the names of the simulation's layers.

    AIMET makes layers of functions and of repeated calls of a module. A function is named after the module whose
    forward calls it; names are numbered from the second call on: "head.layers.1: add 2".
    """
    names, calls = {}, Counter[str]()
    for node, simulated in zip(_trace(model), sim.model.graph.nodes, strict=True):
        name = str(node.target)
        if node.op == "call_function":
            modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            name = ": ".join([*modules[-1:], getattr(node.target, "__name__", name).strip("_")])
        calls[name] += 1
        names[str(simulated.target)] = f"{name} {calls[name]}" if calls[name] > 1 else name
    return names
