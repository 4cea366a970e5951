"""Quantize a network: the one function that the program and the Python API share."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from aimet_torch.quantsim import QuantizationSimModel
from torch import fx, nn

from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation.loading import Images
from ffnet.evaluation.scores import BackendNames
from ffnet.quantization.encodings import LoadedEncodings, load_encodings
from ffnet.quantization.encodings_file import read_encodings
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.quantization.recovery.search import RecoverySearch, calibrate_or_restore, recover
from ffnet.quantization.sites import UNSAVED, SavedStates, SimState, precision, read_state, write_state
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.system.errors import UserError, check_type


@dataclass(frozen=True)
class FoundEncodings:
    """The encodings of a simulation, and how they were found."""

    state: SimState = field(repr=False)  # ranges, bit widths and weights, which AdaRound may have rounded
    calibration_images: int = 0  # number of images; 0 if all encodings were loaded from a file
    batch_size: int | None = None  # batch size of the calibration, after backoff; None without it
    recovery: Recovery | None = None  # None without accuracy recovery


@dataclass(frozen=True)
class QuantizedNetwork:
    """A quantized network in its three forms, and where its encodings come from."""

    float_network: fx.GraphModule = field(repr=False)  # equalized, not quantized
    sim: QuantizationSimModel = field(repr=False)
    lowered: fx.GraphModule = field(repr=False)  # the simulation as plain torch modules
    found: FoundEncodings
    loaded: LoadedEncodings | None  # how the encodings of a file differed from the simulation; None without a file
    raised_scales: dict[str, int]  # layer -> number of channels whose weight scale was raised to make biases fit

    @property
    def names(self) -> BackendNames:
        """The names of the backends that run this network."""
        return BackendNames(precision(self.sim))


class Execution:
    """Hooks around the steps of `quantize`. These do nothing; `ffnet.run.session.Run` measures and saves the steps."""

    saved_states: SavedStates = UNSAVED  # where the finished work of a recovery is saved

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that is entered for the duration of a stage."""
        return contextlib.nullcontext()

    def saved(self, find: Callable[[], FoundEncodings], like: SimState) -> FoundEncodings:
        """Return the encodings that an earlier run saved, or else those that `find` returns.

        `like` is a state of the same simulation, whose tensors have the same shapes.
        """
        return find()


def quantize(
    model: nn.Module,
    images: Images | None,
    config: QuantizationConfig = QuantizationConfig(),
    runtime: Runtime = Runtime(),
    selection: Images | None = None,
    execution: Execution = Execution(),
) -> QuantizedNetwork:
    """Return a quantized FFNet.

    Args:
        model: An FFNet in eval mode; it stays as it is.
        images: Calibration set; None if `config` names all encodings. TF-Enhanced takes its range from the first batch.
        config: Quantization config.
        runtime: Device and data loading.
        selection: Images on which accuracy recovery measures its steps; None: those of the calibration set.
        execution: How the steps are run.

    Raises:
        UserError: If an argument or a file of `config` is wrong, if images are missing, or if `config` asks for the
            recovery of what encodings determine.
    """
    _check_arguments(model, config, runtime)
    with execution.stage("build QuantSim"):
        float_network, sim, loaded = _build(model, config, runtime.device)
    calibrates = loaded is None or bool(loaded.missing)
    if calibrates and images is None:
        raise UserError("images: calibration needs images. Give a data set.")

    def find() -> FoundEncodings:
        if images is None or not calibrates:
            return FoundEncodings(read_state(sim))
        saved = execution.saved_states if config.recovers else UNSAVED
        with execution.stage("calibrate"):
            batch_size = calibrate_or_restore("ranges", sim, images, runtime, saved)
        if not config.recovers:
            return FoundEncodings(read_state(sim), len(images), batch_size)
        with execution.stage("recover accuracy"):
            recovery = recover(RecoverySearch(sim, float_network, images, selection or images, config, runtime, saved))
        return FoundEncodings(read_state(sim), len(images), batch_size, recovery)

    found = execution.saved(find, read_state(sim))
    write_state(sim, found.state)
    raised = raise_weight_scales(sim)
    return QuantizedNetwork(float_network, sim, lower(sim), found, loaded, raised)


def _check_arguments(model: nn.Module, config: QuantizationConfig, runtime: Runtime) -> None:
    check_type("model", model, nn.Module, "Give a network, such as the `model` of a loaded checkpoint")
    check_type("config", config, QuantizationConfig, "Give a QuantizationConfig")
    check_type("runtime", runtime, Runtime, "Give a Runtime")
    if model.training:
        raise UserError("model: the network is in training mode. Call its eval() first.")
    if config.encodings and config.recovers:
        raise UserError("config: encodings determine what accuracy recovery would search. Give one of them.")


def _build(
    model: nn.Module, config: QuantizationConfig, device: str
) -> tuple[fx.GraphModule, QuantizationSimModel, LoadedEncodings | None]:
    """Return the equalized network, its simulation and, if encodings were loaded, how they differed."""
    float_network = equalize(model, config.cle).to(device)
    sim = build_quantsim(float_network, config)
    if not config.encodings:
        return float_network, sim, None
    return float_network, sim, load_encodings(sim, read_encodings(config.encodings), config.partial_encodings)
