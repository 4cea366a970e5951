"""Compare the quantized activations of a network with a reference's, layer by layer, and describe the worst layers.

SQNR (signal-to-quantization-noise ratio) in dB is 10 log10(sum of the reference's squared values / sum of the squared
differences). Each layer is compared twice. In total, both networks compute all layers from the image. For the layer's
own error, the reference computes it from the compared network's inputs of the layer.

AIMET's QuantAnalyzer exports the total error as a mean of squares, and its LayerOutputUtil the compared activations.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import fx, nn

from ffnet.model import GaussianConv2D
from ffnet.quantization.sensitivity import decibels
from ffnet.quantization.sites import ACTIVATION, INPUT_TENSOR, WEIGHT, QuantizerSite, quantizer_sites
from ffnet.system.text import count

WORST = 5  # number of activations and of weights that are described in detail
BINS, OUTER_BINS = 64, 16  # bins of a histogram in the range of the quantizer, and on either side of it

Integers = Mapping[
    str, torch.Tensor
]  # activation -> unsigned or signed integers, of which the smallest stands for qmin


@dataclass(frozen=True)
class Difference:
    """How far values are from a reference's, as sums over all of them."""

    values: int = 0  # number of values
    unequal: int = 0  # number of values that are at least half a quantization step off
    steps: int = 0  # sum of the differences, each rounded to quantization steps
    largest_steps: int = 0
    signal: float = 0.0  # sum of the reference's squares
    noise: float = 0.0  # sum of the squared differences

    def __add__(self, other: "Difference") -> "Difference":
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Difference(**sums | {"largest_steps": max(self.largest_steps, other.largest_steps)})

    @property
    def differing(self) -> float:
        """Share of the values that are not equal."""
        return self.unequal / self.values

    @property
    def mean_steps(self) -> float:
        """Mean difference in quantization steps."""
        return self.steps / self.values

    @property
    def sqnr(self) -> float | None:
        """SQNR in dB; None if there is no noise, or no signal."""
        return decibels(self.signal, self.noise)


@dataclass(frozen=True)
class LayerDivergence:
    """The differences of one quantized activation."""

    layer: str  # name of the tensor in the exported file; "image" is the quantized input
    own: Difference  # for the same input of the layer
    total: Difference  # for the same image, including the differences of the layer's inputs

    def describe(self, runtime: str) -> str:
        """Return the layer's own differences as a sentence; `runtime`: the name of what ran the file."""
        return (
            f"For the same input, {100 * self.own.differing:.2f} % of the values of {self.layer} differ between "
            f"{runtime} and the simulation, by at most {count(self.own.largest_steps, 'quantization step')}."
        )


@dataclass(frozen=True)
class LayerRow:
    """The SQNR in dB of one quantized activation by backend: of the simulation against FP32, of others against it."""

    layer: str  # name of the network's module; functions have the module that calls them
    tensor: str  # name in the exported file
    bits: int
    sqnr: dict[str, float | None]  # for the same image; None if there is no noise
    own_sqnr: dict[str, float | None]  # for the same input of the layer


@dataclass(frozen=True)
class ActivationHistogram:
    """The values of an activation in FP32 beside the range of its quantizer.

    OUTER_BINS bins lie below the range and as many above it, where values are clipped; the outermost ones also count
    the values beyond them. All bins are equally wide.
    """

    layer: str
    low: float  # smallest value of the quantization grid
    high: float  # largest value of the quantization grid
    step: float  # distance of neighboring values of the grid
    counts: list[int]
    clipped: float  # share of the values that are more than half a step outside the grid


@dataclass(frozen=True)
class WeightRanges:
    """The largest absolute weight of each output channel of a layer, in float."""

    layer: str
    sqnr: float | None  # dB, of the quantized weight
    before: list[float]  # before equalization, with the factors of the folded batch norm
    after: list[float]


@dataclass(frozen=True)
class Layers:
    """The error of every quantized activation, in order of execution, and details of the worst layers."""

    images: list[str]  # names of the images that were compared
    rows: list[LayerRow]
    histograms: list[ActivationHistogram]  # activations whose own SQNR in the simulation is smallest, worst first
    weights: list[WeightRanges]  # weights whose SQNR is smallest, worst first

    def add(self, backend: str, divergences: Sequence[LayerDivergence]) -> "Layers":
        """Return the same with the SQNR of a backend, unless it was not compared."""
        if not divergences:
            return self
        found = {each.layer: each for each in divergences}
        rows = [
            replace(
                row,
                sqnr=row.sqnr | {backend: found[row.tensor].total.sqnr},
                own_sqnr=row.own_sqnr | {backend: found[row.tensor].own.sqnr},
            )
            for row in self.rows
        ]
        return replace(self, rows=rows)

    def largest_sqnr(self, backend: str) -> float:
        """Return the largest SQNR of a backend in any layer, at least 1."""
        return max(
            (value or 1.0 for row in self.rows for value in (row.sqnr[backend], row.own_sqnr[backend])), default=1
        )


def activations(sites: Iterable[QuantizerSite]) -> dict[str, QuantizerSite]:
    """Return the sites of quantized activations by their tensor's name in an exported file, in order of execution."""
    return {site.tensor or site.name: site for site in sites if site.kind == ACTIVATION}


def record(lowered: fx.GraphModule, sites: Mapping[str, QuantizerSite], image: torch.Tensor) -> Integers:
    """Return the integers of the simulation's activations: a byte per value, two for more than 8 bits."""
    recorded = {}

    def keep(name: str, output: torch.Tensor) -> None:
        quantizer: Any = lowered.get_submodule(sites[name].lowered_name)
        integers = torch.round(output / quantizer.scale) + (quantizer.zero_point - quantizer.qmin)
        recorded[name] = integers.to(torch.uint8 if quantizer.qmax - quantizer.qmin < 256 else torch.uint16)

    _visit(lowered, sites, keep, image)
    return recorded


def compare_activations(
    reference: fx.GraphModule,
    lowered: fx.GraphModule,
    sites: Mapping[str, QuantizerSite],
    runs: Iterable[tuple[torch.Tensor, Integers]],
) -> list[LayerDivergence]:
    """Return how far the activations of a network are from a reference's, in order of execution.

    Only the integers of one image are held; the reference's values are compared as they are computed.

    Args:
        reference: `lowered`, or the same graph in FP32.
        lowered: The simulation as plain modules, not compiled.
        sites: The compared activations.
        runs: Images (1, 3, H, W) and the integers that the compared network computed, on the device of `reference`.
    """
    sums = {name: [Difference(), Difference()] for name in sites}  # total, own
    for image, integers in runs:
        for own in (False, True):

            def compare(name: str, output: torch.Tensor, own: bool = own, found: Integers = integers) -> Any:
                quantizer: Any = lowered.get_submodule(sites[name].lowered_name)
                first = quantizer.qmin - torch.iinfo(found[name].dtype).min - quantizer.zero_point
                values = torch.empty_like(output).copy_(found[name]).add_(first).mul_(quantizer.scale)
                sums[name][own] += _difference(output, values, quantizer.scale)
                return values if own else None

            _visit(reference, sites, compare, image)
    return [LayerDivergence(name, own, total) for name, (total, own) in sums.items()]


def _visit(
    network: nn.Module,
    sites: Mapping[str, QuantizerSite],
    function: Callable[[str, torch.Tensor], torch.Tensor | None],
    image: torch.Tensor,
) -> None:
    """Run a network; call `function` with the name and output of each site, which it may replace."""
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name, site in sites.items():
            module = network.get_submodule(site.lowered_name)
            hooks.enter_context(module.register_forward_hook(lambda *call, name=name: function(name, call[2])))
        network(image)


def _difference(expected: torch.Tensor, values: torch.Tensor, step: torch.Tensor) -> Difference:
    error = expected - values
    steps = (error / step).round_().abs_()
    counts = int(steps.count_nonzero()), int(steps.sum()), int(steps.max())
    return Difference(error.numel(), *counts, _squares(expected), _squares(error))


def _squares(values: torch.Tensor) -> float:
    return values.square().sum().item()


def histograms(
    plain: fx.GraphModule,
    lowered: fx.GraphModule,
    sites: Mapping[str, QuantizerSite],
    images: Iterable[torch.Tensor],
    names: Mapping[str, str],
) -> list[ActivationHistogram]:
    """Return the histograms of activations in FP32; `names`: how they are called in the report."""
    number = BINS + 2 * OUTER_BINS
    counts = {name: torch.zeros(number, dtype=torch.int64) for name in sites}
    quantizers: dict[str, Any] = {name: lowered.get_submodule(site.lowered_name) for name, site in sites.items()}

    def add(name: str, output: torch.Tensor) -> None:
        quantizer = quantizers[name]
        width = (quantizer.qmax - quantizer.qmin + 1) / BINS
        bins = (output / quantizer.step + (quantizer.zero - quantizer.qmin + 0.5)).div_(width).add_(OUTER_BINS)
        counts[name] += bins.floor_().clamp_(0, number - 1).to(torch.uint8).flatten().bincount(minlength=number).cpu()

    for image in images:
        _visit(plain, sites, add, image)
    found = []
    for name, quantizer in quantizers.items():
        low, high = ((limit - quantizer.zero) * quantizer.step for limit in (quantizer.qmin, quantizer.qmax))
        total = counts[name].tolist()
        clipped = 1 - sum(total[OUTER_BINS:-OUTER_BINS]) / sum(total)
        found.append(ActivationHistogram(names[name], low, high, quantizer.step, total, clipped))
    return found


def worst_weights(
    model: nn.Module, sim: QuantizationSimModel, float_network: nn.Module, lowered: nn.Module
) -> list[WeightRanges]:
    """Return the weights with the smallest SQNR, the worst first; `model`: the network before equalization."""
    found = []
    factors = _batch_norm_factors(model)
    for site in quantizer_sites(sim):
        if site.kind == WEIGHT and site.key == "weight":
            weight, quantized = (each.get_parameter(f"{site.layer}.weight") for each in (float_network, lowered))
            sqnr = decibels(_squares(weight.detach()), _squares(weight.detach() - quantized.detach()))
            original = model.get_submodule(site.layer)
            ranges = _ranges(original.weight) * factors.get(site.layer, 1.0), _ranges(weight)
            found.append(
                WeightRanges(site.layer, sqnr, *([float(f"{r:.4g}") for r in each.tolist()] for each in ranges))
            )
    return sorted(found, key=lambda each: float("inf") if each.sqnr is None else each.sqnr)[:WORST]


def _ranges(weight: Any) -> torch.Tensor:
    return weight.detach().abs().amax(dim=tuple(range(1, weight.dim())))


def _batch_norm_factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return by how much folding a batch norm multiplies the channels of the layer before it."""
    factors = {}
    for node in _trace(model):
        norm = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, nn.BatchNorm2d):
            factor = norm.weight.detach() / torch.sqrt(norm.get_buffer("running_var") + norm.eps)
            factors[str(node.all_input_nodes[0].target)] = factor.abs()
    return factors


class _Tracer(fx.Tracer):
    """Traces a network as AIMET does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GaussianConv2D) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> list[fx.Node]:
    return list(_Tracer().trace(model).nodes)


def layer_names(model: nn.Module, sim: QuantizationSimModel) -> dict[str, str]:
    """Return the names of the network's modules by the names of the simulation's layers.

    AIMET makes modules of functions and of modules that are called again. They are named after the module whose forward
    calls the function, or after the module, and numbered from the second time on: "head.layers.1: add 2".
    """
    names, seen = {}, Counter[str]()
    for node, simulated in zip(_trace(model), sim.model.graph.nodes, strict=True):
        name = str(node.target)
        if node.op == "call_function":
            modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            name = ": ".join([*modules[-1:], getattr(node.target, "__name__", name).strip("_")])
        seen[name] += 1
        names[str(simulated.target)] = f"{name} {seen[name]}" if seen[name] > 1 else name
    return names


def layer_rows(sites: Mapping[str, QuantizerSite], names: Mapping[str, str]) -> list[LayerRow]:
    """Return the rows of activations, without SQNR; `names`: see `layer_names`."""
    rows = []
    for tensor, site in sites.items():
        name = names[site.layer] if site.role == "output" else f"{names[site.layer]}: input"
        rows.append(LayerRow(INPUT_TENSOR if tensor == INPUT_TENSOR else name, tensor, site.bit_width, {}, {}))
    return rows
