"""Which layers cost the loss: every quantizer alone on, and every quantizer alone off.

The lowered network and the same network in FP32 share one graph and differ in the modules that quantize, so a
network with one of them switched is one graph with one module of the other kind. It is not run anew: both networks
go through the graph node by node, and where a module quantizes, only what lies behind it is computed.
"""

import copy
import re
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ffnet.lower import FakeQuantize

ACTIVATION = re.compile(r"(.+)_(output|input)_quantizer(_\d+)?")  # as lower.lower names them


@dataclass(frozen=True)
class Row:
    """One quantizer; agreement is the percent of predictions, at the logits' resolution, that equal FP32's."""

    layer: str
    kind: str  # weight, activation
    place: str  # weight, output, input, or input_1 where there are several
    position: int  # in graph order, from 0
    bits: int
    sqnr_on: float | None  # dB of the logits with it alone on; None where they are FP32's exactly
    agreement_on: float
    sqnr_off: float | None  # dB with all on but it
    agreement_off: float


@dataclass(frozen=True)
class Sensitivity:
    """`rows`: first the quantizer that alone makes the most noise. The others: of all quantizers together."""

    rows: list[Row]
    sqnr: float | None  # dB
    agreement: float  # percent
    images: int

    def gain(self, row):
        """dB that the logits gain where the row's quantizer alone is off; None where there is no noise."""
        return None if None in (row.sqnr_off, self.sqnr) else row.sqnr_off - self.sqnr


def sensitivity(sim, lowered, inputs, progress=True):
    """How much each quantizer of the calibrated `sim` costs, as a Sensitivity.

    `lowered`: lower.lower(sim), not compiled. `inputs`: list of normalized float32 batches (N, 3, H, W) on its device.
    The reference is the equalized network in FP32. SQNR = 10 log10(sum of squared logits / sum of squared errors), both
    sums over all images. Without `progress` nothing is said on stderr.
    """
    plain = unquantized(sim, lowered)
    places = [node for node in lowered.graph.nodes if _quantizes(sim, lowered, node)]
    on, off, everything = [Comparison() for _ in places], [Comparison() for _ in places], Comparison()
    if progress:
        # A place costs two passes from there to the end: half a pass of each network, on average.
        a_place = sum(_seconds(model, inputs[0]) for model in (plain, lowered)) / 2
        seconds = a_place * len(inputs) * len(places)
        note = f"Sensitivity of {len(places)} quantizers on {sum(map(len, inputs))} images: about {_minutes(seconds)}."
        tqdm.write(note, file=sys.stderr)
    with tqdm(
        total=len(inputs) * len(places), desc="sensitivity", unit="quantizer", disable=not progress, dynamic_ncols=True
    ) as bar:
        for batch in inputs:
            reference, full = (_run(model, lowered.graph, batch) for model in (plain, lowered))
            everything.add(reference, full)
            for i, (alone, without) in enumerate(_switched(plain, lowered, places, batch)):
                on[i].add(reference, alone)
                off[i].add(reference, without)
                bar.update()
    rows = [_row(sim, lowered, node, i, on[i], off[i]) for i, node in enumerate(places)]
    rows.sort(key=lambda row: float("inf") if row.sqnr_on is None else row.sqnr_on)
    return Sensitivity(rows, everything.sqnr(), everything.agreement(), sum(map(len, inputs)))


def unquantized(sim, lowered):
    """A copy of `lowered` that quantizes nothing: FP32, equalized as `sim` is."""
    plain = copy.deepcopy(lowered)
    for name, module in list(plain.named_modules()):
        if isinstance(module, FakeQuantize):
            plain.set_submodule(name, nn.Identity())
        elif parameters := _quantized_parameters(sim, name):
            layer = sim.model.get_submodule(name)
            for key in parameters:
                getattr(module, key).data.copy_(getattr(layer, key).detach().as_subclass(torch.Tensor))
    return plain


def _quantized_parameters(sim, name):
    """{name: quantizer} of the parameters that are quantized in a layer."""
    try:
        layer = sim.model.get_submodule(name)
    except AttributeError:  # a FakeQuantize
        return {}
    quantizers = getattr(layer, "param_quantizers", {})
    return {key: quantizer for key, quantizer in quantizers.items() if quantizer is not None}


def _quantizes(sim, lowered, node):
    if node.op != "call_module":
        return False
    return isinstance(lowered.get_submodule(node.target), FakeQuantize) or bool(_quantized_parameters(sim, node.target))


class Comparison:
    """Logits beside those of FP32, added up over the images."""

    def __init__(self):
        self.signal = self.noise = 0.0
        self.alike = self.pixels = 0

    def add(self, reference, logits):
        """Both (N, 19, h, w)."""
        self.signal += reference.double().square().sum().item()
        self.noise += (reference.double() - logits.double()).square().sum().item()
        alike = reference.max(1).indices == logits.max(1).indices
        self.alike += alike.sum().item()
        self.pixels += alike.numel()

    def sqnr(self):
        """dB; None where there is no noise, or nothing else."""
        if not self.noise or not self.signal:
            return None
        return 10 * torch.tensor(self.signal / self.noise, dtype=torch.float64).log10().item()

    def agreement(self):
        """Percent."""
        return 100 * self.alike / self.pixels


@torch.inference_mode()
def _run(model, graph, batch):
    return torch.fx.Interpreter(model, graph=graph).run(batch)


def _switched(plain, lowered, places, batch):
    """For each of `places`, in graph order, the logits with it alone on and with it alone off."""
    base, full = (Walk(model, lowered.graph, batch) for model in (plain, lowered))
    wanted = set(places)
    for index, node in enumerate(base.nodes):
        if node in wanted:
            yield base.detour(index, full), full.detour(index, base)
        base.step(index)
        full.step(index)


class Walk:
    """A network on its way through a graph: `values` holds what later nodes still need."""

    def __init__(self, model, graph, batch):
        self.interpreter = torch.fx.Interpreter(model, graph=graph)
        self.nodes = list(graph.nodes)
        self.values = {}
        self.batch = batch

    def step(self, index):
        """Computes the value of a node and returns it."""
        node = self.nodes[index]
        self.interpreter.env, self.interpreter.args_iter = self.values, iter((self.batch,))
        with torch.inference_mode():
            self.values[node] = self.interpreter.run_node(node)
        value = self.values[node]
        for spent in self.interpreter.user_to_last_uses.get(node, ()):
            del self.values[spent]
        return value

    def detour(self, index, other):
        """The output if the node at `index` were computed by `other`'s module; the walk itself stays where it is."""
        kept = self.values
        self.values = kept.copy()
        try:
            mine, self.interpreter = self.interpreter, other.interpreter
            self.step(index)
            self.interpreter = mine
            for later in range(index + 1, len(self.nodes)):
                output = self.step(later)
            return output
        finally:
            self.interpreter, self.values = mine, kept


def _row(sim, lowered, node, position, on, off):
    module = lowered.get_submodule(node.target)
    if isinstance(module, FakeQuantize):
        layer, side, number = ACTIVATION.fullmatch(node.target).groups()
        kind, place, bits = "activation", side + (number or ""), (module.qmax - module.qmin).bit_length()
    else:
        quantizers = _quantized_parameters(sim, node.target)
        layer, kind, place = node.target, "weight", "+".join(quantizers)
        bits = next(iter(quantizers.values())).bitwidth
    return Row(layer, kind, place, position, bits, on.sqnr(), on.agreement(), off.sqnr(), off.agreement())


@torch.inference_mode()
def _seconds(model, batch):
    """Of the second of two passes."""
    for _ in range(2):
        begin = time.perf_counter()
        model(batch)[0, 0, 0, 0].item()  # waits for the device
        seconds = time.perf_counter() - begin
    return seconds


def _minutes(seconds):
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
