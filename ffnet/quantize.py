"""Prepare, equalize, simulate, calibrate, by AIMET.

The recipe of the AIMET model zoo's FFNets: cross-layer equalization, weights 8 bits symmetric a channel, activations 8
bits asymmetric, the model's input quantized, no biases, TF-Enhanced, and GaussianConv2D left alone.
"""

import contextlib
import copy
import functools
import logging
import sys
import warnings
from dataclasses import dataclass

import torch

from ffnet.errors import UserError
from ffnet.model import GaussianConv2D

TRACE_SIZE = (1, 3, 128, 256)  # of the input with which AIMET traces the graph; quantizers do not depend on it


@dataclass(frozen=True)
class Recipe:
    """How to quantize; the defaults are the published recipe."""

    param_bw: int = 8
    output_bw: int = 8
    quant_scheme: str = "tf_enhanced"
    config_file: str = "default"  # AIMET's per-channel default; or a path
    cle: bool = True


def quantize(model, recipe, calibration_inputs):
    """A calibrated QuantizationSimModel of `model`, which is left as it was.

    `calibration_inputs`: iterable of normalized float32 batches (N, 3, H, W). TF-Enhanced takes its histograms' range
    from the first batch, so order and size of the batches are part of the result.
    """
    sim = simulate(equalize(model, recipe.cle), recipe)
    calibrate(sim, calibration_inputs)
    return sim


def check_finite(model, path):
    """UserError where the network with the weights of `path` computes infinities or NaN, on which AIMET fails."""
    with torch.no_grad():
        if not model(_trace_input(model)).isfinite().all():
            raise UserError(f"{path}: with these weights the logits are infinite or no numbers; take other ones")


def equalize(model, cle=True):
    """A copy of the FFNet with batch norms folded and, unless `cle` is False, its layers equalized: the same function.

    The copy is a torch.fx.GraphModule in which additions, interpolations and re-used ReLUs are modules, as AIMET wants.
    """
    with quiet_aimet():
        from aimet_torch.batch_norm_fold import fold_all_batch_norms
        from aimet_torch.cross_layer_equalization import equalize_model
        from aimet_torch.model_preparer import prepare_model

        model = copy.deepcopy(model)  # AIMET's copy shares the weights that it then changes
        leaves = [module for module in model.modules() if isinstance(module, GaussianConv2D)]
        prepared = prepare_model(model, modules_to_exclude=leaves or None)
        if cle:
            equalize_model(prepared, dummy_input=_trace_input(model))
        else:
            fold_all_batch_norms(prepared, TRACE_SIZE, dummy_input=_trace_input(model))
    return prepared


def simulate(prepared, recipe):
    """A QuantizationSimModel, not yet calibrated."""
    with quiet_aimet():
        from aimet_torch.quantsim import QuantizationSimModel

        _register_gaussian()
        sim = QuantizationSimModel(
            prepared,
            dummy_input=_trace_input(prepared),
            quant_scheme=recipe.quant_scheme,
            default_output_bw=recipe.output_bw,
            default_param_bw=recipe.param_bw,
            config_file=recipe.config_file,
        )
        for module in sim.model.modules():
            if isinstance(module, GaussianConv2D):
                # With it None, the next quantizer behind the model's input is conv0's output: the published recipe.
                module.output_quantizers[0] = None
    return sim


def check_config_file(config_file):
    """UserError unless AIMET takes this configuration file, or alias of one of its own."""
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    try:
        sim = simulate(convolution, Recipe(config_file=config_file))
    except Exception as error:  # the model is sound, so whatever AIMET raises speaks of the file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--config-file {config_file}: AIMET refuses it: {reason}. Take a configuration made for AIMET 2, or leave "
            "the option out for AIMET's per-channel default"
        ) from error
    if not quantizers(sim):
        raise UserError(f"--config-file {config_file}: quantizes nothing; leave the option out for AIMET's default")


def calibrate(sim, inputs):
    """Sets the encodings of every quantizer from the batches of `inputs`; UserError if one stays without."""
    with quiet_aimet(), torch.no_grad():
        from ffnet.tf_enhanced import quicken

        quicken(sim)
        sim.compute_encodings(functools.partial(_run_all, inputs))
    blank = [name for name, quantizer in quantizers(sim) if not quantizer.is_initialized()]
    if blank:
        raise UserError(f"calibration left {len(blank)} quantizers without encodings, {blank[0]} first")


def _run_all(inputs, model):
    for batch in inputs:
        model(batch)


def quantizers(sim):
    """(name, quantizer) of all that are switched on, in the order of sim.model's modules."""
    from aimet_torch.quantization.base import QuantizerBase

    return [(name, module) for name, module in sim.model.named_modules() if isinstance(module, QuantizerBase)]


def _trace_input(model):
    # Not zeros: the histograms of a constant have no range.
    device = next(model.parameters()).device
    return torch.linspace(-1, 1, torch.Size(TRACE_SIZE).numel(), device=device).reshape(TRACE_SIZE)


@functools.cache
def _register_gaussian():
    """Tells AIMET how GaussianConv2D runs: its weight is a buffer, which no quantizer sees."""
    from aimet_torch.nn import QuantizationMixin

    @QuantizationMixin.implements(GaussianConv2D)
    class QuantizedGaussianConv2D(QuantizationMixin, GaussianConv2D):
        def forward(self, x):
            (quantize_input,), (quantize_output,) = self.input_quantizers, self.output_quantizers
            y = super().forward(quantize_input(x) if quantize_input else x)
            return quantize_output(y) if quantize_output else y


@contextlib.contextmanager
def quiet_aimet():
    """AIMET without its chatter; what it warns of goes to stderr."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # its use of torch.jit.trace
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        _silence_loggers()
        yield


def _silence_loggers():
    from aimet_torch.common.utils import AimetLogger, TqdmStreamHandler

    for area in AimetLogger.LogAreas:
        logger = logging.getLogger(area.value)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            if isinstance(handler, TqdmStreamHandler):
                handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
    logging.getLogger(AimetLogger.LogAreas.ConnectedGraph.value).addFilter(_worth_saying)


def _worth_saying(record):
    # Said of every FFNet, whose sizes are taken at run time, and used only for tools that reorder hooks.
    return record.getMessage() != "Unable to isolate model outputs."
