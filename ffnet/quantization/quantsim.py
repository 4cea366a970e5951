"""Equalize a network, simulate its quantization with AIMET and calibrate the simulation.

The default configuration is the one of the AIMET model zoo's FFNets: cross-layer equalization, 8-bit symmetric weights
per channel, 8-bit asymmetric activations per tensor, a quantized model input, float biases, TF-Enhanced ranges, and no
quantizers around GaussianConv2D.
"""

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.common.utils import AimetLogger, TqdmStreamHandler
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantization import set_backend
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.utils import remove_param_quantizers
from torch import nn

from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation.loading import Images
from ffnet.evaluation.loop import calibration_batches, with_backoff
from ffnet.model import GaussianConv2D
from ffnet.quantization.tf_enhanced import use_fast_analyzers
from ffnet.system.errors import UserError
from ffnet.system.files import check_plain_file
from ffnet.system.memory import is_out_of_memory
from ffnet.system.text import count

TRACE_SIZE = (1, 3, 64, 64)  # shape of the input with which AIMET traces the graph


@QuantizationMixin.implements(GaussianConv2D)
class QuantizedGaussianConv2D(QuantizationMixin, GaussianConv2D):
    """How AIMET runs GaussianConv2D. Its weight is a buffer, which no quantizer sees."""

    input_quantizers: Any
    output_quantizers: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Smooth `x`, quantizing input and output if their quantizers are enabled."""
        (quantize_input,), (quantize_output,) = self.input_quantizers, self.output_quantizers
        y = super().forward(quantize_input(x) if quantize_input else x)
        return quantize_output(y) if quantize_output else y


def check_finite_logits(model: nn.Module, path: Path | str) -> None:
    """Raise a UserError unless a network with the weights of `path` computes finite logits; AIMET fails on others."""
    with torch.no_grad():
        if not model(_trace_input(model)).isfinite().all():
            raise UserError(f"{path}: with these weights some logits are infinite or NaN. Use another checkpoint.")


def equalize(model: nn.Module, cle: bool = True) -> torch.fx.GraphModule:
    """Return a copy of an FFNet that computes the same with folded batch norms and, if `cle`, equalized layers.

    In the copy, additions, interpolations and re-used ReLUs are modules, as AIMET requires.
    """
    model = copy.deepcopy(model)  # AIMET's copy shares the weights that it then changes
    excluded = [module for module in model.modules() if isinstance(module, GaussianConv2D)]
    with quiet_aimet():
        prepared = prepare_model(model, modules_to_exclude=excluded or None)
        if cle:
            equalize_model(prepared, dummy_input=_trace_input(model))
        else:
            fold_all_batch_norms(prepared, TRACE_SIZE, dummy_input=_trace_input(model))
    return prepared


def build_quantsim(prepared: nn.Module, config: QuantizationConfig) -> QuantizationSimModel:
    """Return a simulation, not yet calibrated, of a network that `equalize` returned.

    AIMET is set to round halves to even on every device, for the whole process. Where there is a GPU, its default is
    kernels of its own that round them up, so that some weights would be one step off those of a CPU or an ONNX file.
    """
    config_file = config.config_file
    if config_file == "default":  # AIMET would read a file of this name in the current folder
        config_file = get_path_for_per_channel_config()
    check_plain_file(config_file)
    set_backend("torch_builtins")
    with quiet_aimet():
        sim = QuantizationSimModel(
            prepared,
            dummy_input=_trace_input(prepared),
            quant_scheme=config.quant_scheme,
            default_output_bw=config.output_bw,
            default_param_bw=config.param_bw,
            config_file=config_file,
        )
    for module in sim.model.modules():
        if isinstance(module, QuantizedGaussianConv2D):
            # The published configuration quantizes nothing between the model's input and the output of conv0.
            module.output_quantizers[0] = None
    return sim


def check_config_file(name: str) -> None:
    """Raise a UserError unless AIMET accepts a configuration file or alias, and it enables a quantizer."""
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    try:
        sim = build_quantsim(convolution, QuantizationConfig(config_file=name))
    except Exception as error:  # the network is valid, so whatever AIMET raises is about the file
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--config-file {name}: AIMET does not accept this configuration ({reason}). Give a configuration made for "
            "AIMET 2, or remove the option to use AIMET's default per channel."
        ) from error
    if not any(sim.named_quantizers()):
        raise UserError(
            f"--config-file {name}: this configuration enables no quantizer. Remove the option to use AIMET's default."
        )


def calibrate_on_images(sim: QuantizationSimModel, images: Images, runtime: Runtime) -> int:
    """Calibrate a simulation on a dataset and return the batch size used.

    If the GPU runs out of memory, calibration starts again with half the batch size.
    """

    def work(batch_size: int) -> None:
        with contextlib.closing(calibration_batches(images, replace(runtime, batch_size=batch_size))) as batches:
            calibrate(sim, batches)

    return with_backoff(work, runtime.batch_size)[1]


def calibrate(sim: QuantizationSimModel, batches: Iterable[torch.Tensor]) -> None:
    """Compute the encodings of every quantizer from normalized batches (N, 3, H, W) float32.

    Raise a UserError if a quantizer is left without encodings.
    """

    def run_batches(model: nn.Module) -> None:
        with _weights_quantized_once(model):
            for batch in batches:
                model(batch)

    use_fast_analyzers(sim)
    with quiet_aimet(), torch.no_grad():
        sim.compute_encodings(run_batches)
    blank = [name for name, quantizer in sim.named_quantizers() if not quantizer.is_initialized()]
    if blank:
        raise UserError(
            f"calibration: {count(len(blank), 'quantizer')} got no encodings, the first of them {blank[0]}. Check that "
            "there are calibration images and that --config-file only enables quantizers of values that occur."
        )


@contextlib.contextmanager
def _weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantize the weights of a simulation now, and not again in every batch; restore them on exit."""
    originals = []
    for module in model.modules():
        for name, quantizer in getattr(module, "param_quantizers", {}).items():
            if quantizer is not None:
                parameter = module.get_parameter(name)
                originals.append((parameter, parameter.data))
                parameter.data = quantizer(parameter).detach().as_subclass(torch.Tensor)
    try:
        with remove_param_quantizers(model):
            yield
    finally:
        for parameter, values in originals:
            parameter.data = values


def _trace_input(model: nn.Module) -> torch.Tensor:
    # Not zeros: the histograms of a constant have no range.
    device = next(model.parameters()).device
    return torch.linspace(-1, 1, torch.Size(TRACE_SIZE).numel(), device=device).reshape(TRACE_SIZE)


@contextlib.contextmanager
def quiet_aimet() -> Iterator[None]:
    """Run AIMET without its progress messages; its warnings go to stderr."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):  # its use of torch.jit.trace
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        for logger in (logging.getLogger(area.value) for area in AimetLogger.LogAreas):
            logger.setLevel(logging.WARNING)
            for handler in logger.handlers:
                if isinstance(handler, TqdmStreamHandler):
                    handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
        # It warns about every FFNet, whose sizes are taken at run time; this matters only to tools that reorder hooks.
        logging.getLogger(AimetLogger.LogAreas.ConnectedGraph.value).setLevel(logging.ERROR)
        yield
