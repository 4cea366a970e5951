"""Better weights at the same cost: AIMET's sequential MSE searches their ranges, AdaRound rounds them up or down.

AdaRound: M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020, arXiv 2004.10568. The
objective and its constants are those of AIMET's AdaRound, which takes hours on a CPU because it runs all images through
a layer in every iteration. Here every iteration takes some positions of the layer's inputs.
"""

import contextlib
import functools
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import SeqMseParams, SequentialMse
from aimet_torch.utils import remove_activation_quantizers
from torch import fx, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from ffnet.quantization.quantsim import quiet_aimet
from ffnet.quantization.sites import (
    UNSAVED,
    WEIGHT,
    QuantizerSite,
    SavedStates,
    quantizer_sites,
    read_state,
    without_parameters,
    write_state,
)

POSITIONS = 1024  # positions of a layer's output that are drawn from each image
BATCH = 512  # positions in one iteration
SUMMED_LEARNING_RATE = 15.0  # over all iterations: how far Adam can move a parameter; as AIMET's 15,000 times 1e-3
ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to this range and clipped, so that it reaches 0 and 1
REGULARIZATION = 0.01  # factor of the term that drives every rounding to 0 or 1
WARM_START = 0.2  # share of the iterations without that term
BETA = 20.0, 2.0  # exponent of that term in the first and in the last iteration


class FinishedLayers:
    """The layers whose weights a step has finished, each of which is saved."""

    def __init__(self, sim: QuantizationSimModel, step: str, saved: SavedStates) -> None:
        self.sites = {s.layer: s for s in quantizer_sites(sim) if s.kind == WEIGHT and s.key == "weight"}
        self.sim, self._step, self._saved = sim, step, saved

    def restore(self, layer: str) -> bool:
        """Give a layer what an earlier run found for it, and freeze its encoding; return whether there was anything."""
        sites = [self.sites[layer]]
        found = self._saved.load(f"{self._step}-{layer}", read_state(self.sim, sites), type(None))
        if found:
            write_state(self.sim, found[0], sites)
            sites[0].quantizer.allow_overwrite(False)
        return found is not None

    def save(self, layer: str, parameter: bool) -> None:
        """Save the encoding of a finished layer, and its weight if the step changes it."""
        state = read_state(self.sim, [self.sites[layer]])
        self._saved.save(f"{self._step}-{layer}", state if parameter else without_parameters(state))


class _SequentialMse(SequentialMse):
    """AIMET's sequential MSE with FinishedLayers in place of its cache of files, which a kill can leave incomplete."""

    @classmethod
    def get_module_names_from_cache(cls, cache_dir: Any) -> list[str]:
        return [layer for layer in cache_dir.sites if cache_dir.restore(layer)]

    @classmethod
    def load_cached_optimized_params(cls, *_: object) -> None:
        """Do nothing: they are restored already."""

    @classmethod
    def save_to_cache(cls, module_qualified_name: str, quant_module: object, cache_dir: Any) -> None:
        cache_dir.save(module_qualified_name, parameter=False)


def apply_seq_mse(
    sim: QuantizationSimModel,
    float_network: fx.GraphModule,
    images: Sequence[torch.Tensor],
    progress: bool = True,
    saved: SavedStates = UNSAVED,
) -> None:
    """Search and freeze the ranges of all weights of at most 4 bits; calibrate the activations afterwards.

    For each channel, AIMET takes the one of 20 shares of the calibrated range that changes the layer's output least.

    Args:
        sim: A simulation.
        float_network: The equalized network from which `sim` was built.
        images: Normalized (1, 3, H, W) float32 on the device of `sim`.
        progress: Show a progress bar on stderr.
        saved: Where finished layers are saved.
    """
    loader: Any = DataLoader(images, batch_size=None)  # type: ignore[arg-type]
    layers = FinishedLayers(sim, "seq-mse", saved)
    with quiet_aimet(), contextlib.redirect_stderr(sys.stderr if progress else io.StringIO()):
        _SequentialMse.apply_seq_mse(float_network, sim, loader, SeqMseParams(None), cache_dir=layers)


def apply_adaround(
    sim: QuantizationSimModel,
    float_network: fx.GraphModule,
    images: Sequence[torch.Tensor],
    iterations: int,
    progress: bool = True,
    saved: SavedStates = UNSAVED,
) -> None:
    """Round the weights of every convolution anew, in order of execution; calibrate the activations afterwards.

    A layer's error is that of its output against the float network's, after a ReLU that follows it, for the input that
    it gets from the layers that are rounded already. No activation is quantized meanwhile. The rounded weights replace
    the float weights in `sim`, so that its quantizers do not change them. Memory holds all values of the network that
    later layers need, for all images.

    Args:
        sim: A simulation whose weights have encodings, from AIMET or sequential MSE. These are frozen.
        float_network: The equalized network from which `sim` was built.
        images: Normalized (1, 3, H, W) float32 on the device of `sim`.
        iterations: Number of iterations per layer.
        progress: Show a progress bar on stderr.
        saved: Where finished layers are saved.
    """
    layers = FinishedLayers(sim, "adaround", saved)
    finished = {layer for layer in layers.sites if layers.restore(layer)}
    if finished < layers.sites.keys():
        _round_layers(layers, finished, float_network, images, iterations, progress)


def _round_layers(
    layers: FinishedLayers,
    finished: set[str],
    float_network: fx.GraphModule,
    images: Sequence[torch.Tensor],
    iterations: int,
    progress: bool,
) -> None:
    """Round the layers that are not `finished`, and save each; the arguments are those of `apply_adaround`."""
    sim, sites = layers.sim, {site.node: site for site in layers.sites.values()}
    targets = _sample_targets(float_network, [site.layer for site in sites.values()], images)
    runs = [fx.Interpreter(sim.model) for _ in images]
    for run, image in zip(runs, images, strict=True):
        run.env, run.args_iter = {}, iter((image,))
    bar = tqdm(total=len(sites), desc="AdaRound", unit="layer", disable=not progress, dynamic_ncols=True)
    with contextlib.ExitStack() as stack, bar, torch.no_grad():
        for _, module in sim.named_qmodules():
            stack.enter_context(remove_activation_quantizers(module))
        for node in sim.model.graph.nodes:
            if node in sites:
                layer = sites[node].layer
                if layer not in finished:
                    inputs = [run.env[node.args[0]] for run in runs]
                    _round_layer(sim, sites[node], inputs, targets.pop(layer), iterations)
                    layers.save(layer, parameter=True)
                bar.update()
            for run in runs:
                run.env[node] = run.run_node(node)
                for value in run.user_to_last_uses.get(node, ()):
                    del run.env[value]


@dataclass(frozen=True)
class Targets:
    """Outputs of a layer of the float network at some positions on one image."""

    positions: torch.Tensor  # (POSITIONS,) int64: row * width + column
    values: torch.Tensor  # (POSITIONS, output channels) float32


@torch.no_grad()
def _sample_targets(
    network: nn.Module, layers: Sequence[str], images: Sequence[torch.Tensor]
) -> dict[str, list[Targets]]:
    """Return the outputs of the given layers for each image at random positions, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Targets]] = {layer: [] for layer in layers}

    def sample(layer: str, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        outputs = output[0].flatten(1)
        positions = torch.randint(outputs.shape[1], (POSITIONS,), generator=generator).to(output.device)
        found[layer].append(Targets(positions, outputs[:, positions].T))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            module = network.get_submodule(layer)
            hooks.enter_context(module.register_forward_hook(functools.partial(sample, layer)))
        for image in images:
            network(image)
    return found


def _round_layer(
    sim: QuantizationSimModel,
    site: QuantizerSite,
    inputs: Sequence[torch.Tensor],
    targets: Sequence[Targets],
    iterations: int,
) -> None:
    """Replace a convolution's weight by its rounded one; `inputs`: (1, C, H, W) for each image."""
    layer = sim.model.get_submodule(site.layer)
    patches = [input_patches(layer, values, each.positions) for values, each in zip(inputs, targets, strict=True)]
    samples = LayerSamples(
        torch.cat(patches),
        torch.cat([each.values for each in targets]),
        None if layer.bias is None else _plain(layer.bias),
        is_followed_by_relu(sim.model, site.node),
    )
    weight = _plain(layer.weight)
    rounding = SoftRounding(weight, site.quantizer)
    with torch.enable_grad():
        optimize_rounding(rounding, samples, iterations)
    choices = rounding.hard_weight(), _plain(site.quantizer(weight))  # to nearest can be better in small layers
    layer.weight.copy_(min(choices, key=lambda choice: samples.error(choice).item()))
    site.quantizer.allow_overwrite(False)  # calibration would search a range for the rounded weights


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    """Return the values of a parameter without AIMET's subclass of tensors."""
    return parameter.detach().as_subclass(torch.Tensor)


def input_patches(layer: nn.Conv2d, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the receptive field in `values` (1, C, H, W) of each position of a convolution's output, flattened.

    The convolution has neither groups nor dilation, as in all FFNets.
    """
    vertical, horizontal = (int(length) for length in layer.padding)
    padded = functional.pad(values, (horizontal, horizontal, vertical, vertical))
    windows = padded.unfold(2, layer.kernel_size[0], layer.stride[0]).unfold(3, layer.kernel_size[1], layer.stride[1])
    width = windows.shape[3]
    return windows[0, :, positions // width, positions % width].transpose(0, 1).flatten(1)


def is_followed_by_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether only a ReLU uses the output of a node, perhaps after an Identity."""
    while len(node.users) == 1:
        (node,) = node.users
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Identity):
            return isinstance(module, nn.ReLU)
    return False


@dataclass(frozen=True)
class LayerSamples:
    """Inputs and target outputs of a layer at some positions of all images."""

    inputs: torch.Tensor  # (positions, input channels * kernel height * kernel width), in the quantized network
    targets: torch.Tensor  # (positions, output channels), in the float network
    bias: torch.Tensor | None
    followed_by_relu: bool

    def error(self, weight: torch.Tensor, drawn: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the squared error with a weight, summed over channels and averaged over the drawn positions."""
        outputs, targets = functional.linear(self.inputs[drawn], weight.flatten(1), self.bias), self.targets[drawn]
        if self.followed_by_relu:
            outputs, targets = outputs.relu(), targets.relu()
        return (outputs - targets).square().sum(1).mean()


class SoftRounding(nn.Module):
    """A weight whose elements are rounded down or up, as the differentiable parameter `alpha` says."""

    def __init__(self, weight: torch.Tensor, quantizer: QuantizerBase) -> None:
        super().__init__()
        self.scale = quantizer.get_scale().detach()
        self.offset = quantizer.get_offset().detach()
        self.qmin, self.qmax = quantizer.qmin, quantizer.qmax
        self.floor = torch.floor(weight / self.scale)
        fraction = weight / self.scale - self.floor
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))

    def up(self) -> torch.Tensor:
        """Return how far each element is rounded up, from 0 to 1; initially the fraction that `floor` removed."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def weight(self, up: torch.Tensor) -> torch.Tensor:
        """Return the dequantized weight for roundings `up`."""
        integers = (self.floor + up - self.offset).clamp(self.qmin, self.qmax)
        return (integers + self.offset) * self.scale

    def hard_weight(self) -> torch.Tensor:
        """Return the weight with every element rounded down or up."""
        return self.weight((self.alpha >= 0).to(self.floor.dtype)).detach()


def rounding_loss(up: torch.Tensor, progress: float) -> torch.Tensor:
    """Return the term that drives roundings to 0 or 1; `progress`: share of the finished iterations."""
    if progress < WARM_START:
        return up.new_zeros(())
    first, last = BETA
    beta = last + 0.5 * (first - last) * (1 + math.cos(math.pi * (progress - WARM_START) / (1 - WARM_START)))
    return REGULARIZATION * (1 - (2 * up - 1).abs().pow(beta)).sum()


def optimize_rounding(rounding: SoftRounding, samples: LayerSamples, iterations: int) -> None:
    """Minimize the error of a layer's output over the roundings of its weight, in place."""
    optimizer = torch.optim.Adam([rounding.alpha], lr=SUMMED_LEARNING_RATE / iterations)
    generator = torch.Generator().manual_seed(0)
    number = len(samples.inputs)
    for iteration in range(iterations):
        drawn = torch.randint(number, (min(BATCH, number),), generator=generator).to(samples.inputs.device)
        up = rounding.up()
        loss = samples.error(rounding.weight(up), drawn) + rounding_loss(up, iteration / iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
