"""Rank quantizers by their effect on the logits: only this quantizer enabled, and only this quantizer disabled.

The lowered network and the same network in FP32 share one graph and differ only in the modules that quantize. To enable
or disable one quantizer, its module is taken from the other network. Both networks are run node by node, and for each
quantizer only the layers after it are computed again.
"""

import copy
import logging
import math
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import fx, nn
from tqdm import tqdm

from ffnet.quantization.sites import ACTIVATION, WEIGHT, QuantizerSite, quantizer_sites, tensor_arguments
from ffnet.system.text import count, format_duration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SensitivityRow:
    """The effect of one activation quantizer, or of the parameter quantizers of one layer.

    SQNR is in dB and None if there is no noise. Agreement is the percentage of predictions, at the resolution of the
    logits, that equal those in FP32.
    """

    layer: str
    kind: str  # WEIGHT or ACTIVATION
    role: str  # "weight", "weight+bias", "output", "input", or "input_1" if the layer has several inputs
    position: int  # rank in order of execution, from 0
    bits: int
    sqnr_only_enabled: float | None
    agreement_only_enabled: float
    sqnr_only_disabled: float | None
    agreement_only_disabled: float


@dataclass(frozen=True)
class Sensitivity:
    """The effect of each quantizer, and of all together."""

    rows: list[SensitivityRow]  # most sensitive first: smallest SQNR if only this quantizer is enabled
    sqnr: float | None  # dB, all quantizers together
    agreement: float  # percent, all quantizers together
    images: int

    def gain(self, row: SensitivityRow) -> float | None:
        """Return how many dB the logits gain if only the row's quantizer is disabled; None if there is no noise."""
        if row.sqnr_only_disabled is None or self.sqnr is None:
            return None
        return row.sqnr_only_disabled - self.sqnr


def analyze_sensitivity(
    sim: QuantizationSimModel,
    float_network: nn.Module,
    lowered: fx.GraphModule,
    batches: Sequence[torch.Tensor],
    progress: bool = True,
) -> Sensitivity:
    """Measure how much each quantizer of a calibrated simulation changes the logits.

    The reference is the equalized network in FP32. SQNR = 10 log10(sum of squared logits / sum of squared errors), both
    summed over all images.

    Args:
        sim: The calibrated simulation.
        float_network: The equalized network from which `sim` was built.
        lowered: `lower(sim)`, not compiled.
        batches: Normalized images (N, 3, H, W) float32 on the device of `lowered`.
        progress: Whether to show a progress bar on stderr.
    """
    sites: dict[str, list[QuantizerSite]] = defaultdict(list)
    for site in quantizer_sites(sim):
        sites[site.lowered_name].append(site)
    plain = remove_quantizers(sim, float_network, lowered)
    fp32, quantized = (fx.Interpreter(model, graph=lowered.graph) for model in (plain, lowered))
    overall = LogitsComparison()
    only_enabled, only_disabled = ({name: LogitsComparison() for name in sites} for _ in range(2))
    total = len(batches) * len(sites)
    bar = tqdm(total=total, desc="sensitivity", unit="quantizer", disable=not progress, dynamic_ncols=True)
    with bar, torch.inference_mode():
        for batch in batches:
            begin = time.perf_counter()
            reference = fp32.run(batch)
            overall.add(reference, quantized.run(batch))
            if progress and bar.n == 0:  # on average, half of both networks is computed again for each quantizer
                seconds = (time.perf_counter() - begin) * (len(batches) + total / 2)
                logger.info(f"Sensitivity: {count(total, 'measurement')}, {format_duration(seconds)}.")
            switched = _switch_each(fp32, quantized, batch, sites), _switch_each(quantized, fp32, batch, sites)
            for (name, enabled), (_, disabled) in zip(*switched, strict=True):
                only_enabled[name].add(reference, enabled)
                only_disabled[name].add(reference, disabled)
                bar.update()
    rows = [_row(sites[name], i, only_enabled[name], only_disabled[name]) for i, name in enumerate(sites)]
    rows.sort(key=lambda row: math.inf if row.sqnr_only_enabled is None else row.sqnr_only_enabled)
    return Sensitivity(rows, overall.sqnr(), overall.agreement(), sum(map(len, batches)))


def remove_quantizers(sim: QuantizationSimModel, float_network: nn.Module, lowered: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the lowered network that quantizes nothing, with the weights of the float network.

    The weights of `sim` do not serve: AdaRound may have rounded them.
    """
    plain = copy.deepcopy(lowered)
    for site in quantizer_sites(sim):
        if site.kind == ACTIVATION:
            plain.set_submodule(site.lowered_name, nn.Identity())
        else:
            name = f"{site.layer}.{site.key}"
            plain.get_parameter(name).data.copy_(float_network.get_parameter(name).detach())
    return plain


def decibels(signal: float, noise: float) -> float | None:
    """Return the SQNR in dB of two sums of squares; None if one of them is 0."""
    return 10 * math.log10(signal / noise) if signal and noise else None


class LogitsComparison:
    """Sums over images that compare logits with those in FP32."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.equal = self.pixels = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """Add the logits (N, classes, h, w) of some images."""
        self.signal += reference.double().square().sum().item()
        self.noise += (reference.double() - logits.double()).square().sum().item()
        equal = reference.max(1).indices == logits.max(1).indices
        self.equal += int(equal.sum())
        self.pixels += equal.numel()

    def sqnr(self) -> float | None:
        """Return the SQNR in dB; None if there is no noise, or no signal."""
        return decibels(self.signal, self.noise)

    def agreement(self) -> float:
        """Return the percentage of equal predictions."""
        return 100 * self.equal / self.pixels


def _switch_each(
    run: fx.Interpreter, other: fx.Interpreter, batch: torch.Tensor, names: Container[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each module name and the logits of `run` with that module taken from `other`, in order of execution."""
    values: dict[fx.Node, Any] = {}  # values of the nodes so far; None if no later node needs them
    for node in run.graph.nodes:
        if node.op == "call_module" and node.target in names:
            yield node.target, run.run(batch, initial_env=values | {node: _value(other, node, values, batch)})
        values[node] = _value(run, node, values, batch)
        values |= dict.fromkeys(run.user_to_last_uses.get(node, ()))


def _value(run: fx.Interpreter, node: fx.Node, values: dict[fx.Node, Any], batch: torch.Tensor) -> Any:
    """Return what a network computes at a node from the values of earlier nodes."""
    run.env, run.args_iter = values, iter((batch,))
    return run.run_node(node)


def _row(
    sites: Sequence[QuantizerSite], position: int, enabled: LogitsComparison, disabled: LogitsComparison
) -> SensitivityRow:
    first = sites[0]
    role = first.role
    if first.kind == WEIGHT:
        role = "+".join(str(site.key) for site in sites)
    elif role == "input" and len(tensor_arguments(first.node)) > 1:
        role = f"input_{first.key}"
    measured = enabled.sqnr(), enabled.agreement(), disabled.sqnr(), disabled.agreement()
    return SensitivityRow(first.layer, first.kind, role, position, first.bit_width, *measured)
