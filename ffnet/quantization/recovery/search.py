"""Search for a configuration that loses less accuracy, one step after the other, the cheapest first.

Sequential MSE and AdaRound cost nothing on a device. More bits for the most sensitive quantizers do, so they come last.
Every configuration is measured on selection images, which are not used for calibration.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from aimet_torch.quantsim import QuantizationSimModel
from torch import fx

from ffnet.config import ADAROUND_ITERATIONS, SEQ_MSE_BITS, QuantizationConfig, Runtime
from ffnet.evaluation.compilation import prepare_backends
from ffnet.evaluation.loading import Images, evenly_spaced, normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.metrics import Estimate, Statistics, known, statistics
from ffnet.evaluation.scores import FP32, Backend
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import calibrate_on_images
from ffnet.quantization.recovery import mixed_precision
from ffnet.quantization.recovery.mixed_precision import RAISED_BITS, Groups
from ffnet.quantization.recovery.outcome import RaisedQuantizer, Recovery, RecoveryStep
from ffnet.quantization.recovery.weights import BATCH, apply_adaround, apply_seq_mse
from ffnet.quantization.sensitivity import analyze_sensitivity
from ffnet.quantization.sites import UNSAVED, WEIGHT, SavedStates, SimState, read_state, without_parameters, write_state
from ffnet.quantization.weighted_layers import Cost, multiply_accumulates, raise_weight_scales, relative_cost
from ffnet.system.errors import UserError
from ffnet.system.memory import is_out_of_memory
from ffnet.system.process import Terminated
from ffnet.system.text import count, format_duration

logger = logging.getLogger(__name__)

PLAIN, SEQ_MSE, ADAROUND = "plain", "sequential MSE", "AdaRound"
SENSITIVITY_IMAGES = 2
COUNT_BITS = 40  # no image has more pixels
# For the estimates of time, measured: on CPUs the arithmetic takes the time, on GPUs the calls of small kernels.
SEQ_MSE_PASSES = 70  # passes through the network that sequential MSE costs per image
SEQ_MSE_SECONDS = 0.02  # its least time per layer and image
ADAROUND_OVERHEAD = 3.0  # AdaRound's time over that of its multiply-accumulates in a pass through the network
ADAROUND_SECONDS = 1.5e-3  # its least time per layer and iteration


def recover(search: "RecoverySearch") -> Recovery:
    """Take the steps that the config asks for, and leave the simulation in the best configuration.

    After Ctrl-C the search ends with the best configuration so far.
    """
    interrupted = False
    try:
        search.run()
    except Terminated:
        raise
    except KeyboardInterrupt:
        if not search.tried:
            raise
        interrupted = True
        logger.warning(
            f"Interrupted: continuing with the best configuration so far ({search.best.name}). Interrupt again to end "
            "the run."
        )
    write_state(search.sim, search.best.state)
    return search.outcome(interrupted)


@dataclass(frozen=True)
class Measurement:
    """What is saved of a network that was measured on the selection images."""

    matrices: list[list[list[int]]]  # confusion matrices (images, classes, classes)
    seconds: float  # time in the network
    taken: float  # time to find and to measure it

    def __post_init__(self) -> None:
        counts = np.array(self.matrices, np.int64)
        if counts.ndim != 3 or counts.shape[1] != counts.shape[2] or (counts >> COUNT_BITS).any():
            raise ValueError("the confusion matrices are not square matrices of counts")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A configuration that was measured."""

    name: str
    state: SimState
    raised: Groups
    statistics: Statistics
    change: Estimate  # against FP32, percentage points
    cost: Cost
    seconds: float  # time to find and to measure it

    @property
    def drop(self) -> float:
        """The mIoU drop in percentage points; nan if no pixel is labelled."""
        return -self.change.value

    def meets(self, target: float) -> bool:
        """Return whether the drop is within a target even if it is one standard error larger.

        A target of 0, which that could hardly ever meet, and too few images for a standard error leave it to the
        estimate.
        """
        error = self.change.standard_error
        return self.drop + (0 if math.isnan(error) or target == 0 else error) <= target


def calibrate_or_restore(
    name: str, sim: QuantizationSimModel, images: Images, runtime: Runtime, saved: SavedStates
) -> int:
    """Calibrate a simulation and save its ranges, or restore those that an earlier run saved; return the batch size."""
    if found := saved.load(name, read_state(sim), int):
        write_state(sim, found[0])
        return found[1]
    batch_size = calibrate_on_images(sim, images, runtime)
    saved.save(name, without_parameters(read_state(sim)), batch_size)
    return batch_size


@dataclass(eq=False)
class RecoverySearch:
    """The search over the states of one simulation.

    `tried` holds every candidate in the order of measurement, and `bases` those from which later steps started.
    """

    sim: QuantizationSimModel  # calibrated; weight scales not yet raised for the biases
    float_network: fx.GraphModule  # the equalized network of which `sim` is a simulation
    images: Images  # calibration set
    selection: Images  # images on which every step is measured
    config: QuantizationConfig  # steps, target and number of images for sequential MSE and AdaRound
    runtime: Runtime
    saved: SavedStates = UNSAVED  # where finished work is saved

    def __post_init__(self) -> None:
        image = self.images[0][0]
        self.operations = multiply_accumulates(self.float_network, (image.shape[1], image.shape[2]))
        chosen = evenly_spaced(len(self.images), self.config.recovery_images).tolist()
        self.batches = [normalize(self.images[index][0][None].to(self.runtime.device)) for index in chosen]
        self.tried: list[Candidate] = []
        self.bases: list[Candidate] = []
        self._began = time.perf_counter()
        self.fp32 = self._score("fp32", FP32, lambda: self.float_network)
        self.fp32_statistics = statistics(np.array(self.fp32.matrices))

    @property
    def best(self) -> Candidate:
        """The last candidate or, with a target, the cheapest that meets it, or else the one with the smallest drop."""
        if self.config.max_drop is None:
            return self.tried[-1]
        meeting = [candidate for candidate in self.tried if self._meets(candidate)]
        if not meeting:
            return min(self.tried, key=lambda candidate: candidate.drop)
        return min(meeting, key=lambda each: (each.cost.bit_operations, each.cost.weight_bytes, each.drop))

    def run(self) -> None:
        """Measure the plain configuration, then take steps until the target is met or no step is left."""
        self._measure(PLAIN, read_state(self.sim))
        if self.config.max_drop is not None and math.isnan(self.best.drop):
            raise UserError("--max-drop: no pixel of the selection images is labelled. Give other --selection-images.")
        steps = self._steps()
        logger.info(self._plan(steps))
        for name, step in steps.items():
            if self._meets(self.best):
                return
            self._take(name, step)
        if self.config.max_drop is not None and not self._meets(self.best):
            self._mix()

    def outcome(self, interrupted: bool) -> Recovery:
        """Return the candidates that the report shows, and the best one's bit widths."""
        best = self.best
        return Recovery(
            target=self.config.max_drop,
            fp32_miou=known(self.fp32_statistics.miou.value),
            steps=[self._step(each) for each in self.tried],
            chosen=best.name,
            raised=[
                RaisedQuantizer(site.layer, str(site.key) if site.kind == WEIGHT else site.role, RAISED_BITS[site.kind])
                for site in itertools.chain(*best.raised)
            ],
            interrupted=interrupted,
        )

    def _step(self, candidate: Candidate) -> RecoveryStep:
        miou, change = candidate.statistics.miou, candidate.change
        return RecoveryStep(
            name=candidate.name,
            miou=known(miou.value),
            miou_interval=miou.share_interval,
            change=known(change.value),
            change_interval=change.interval,
            bit_operations=candidate.cost.bit_operations,
            weight_bytes=candidate.cost.weight_bytes,
            seconds=candidate.seconds,
            kept=candidate is self.best or candidate in self.bases,
            met=self._meets(candidate),
        )

    def _steps(self) -> dict[str, Callable[[], None]]:
        """Return the steps that change neither the cost nor a bit width, as far as the options ask for them."""
        searching, steps = self.config.max_drop is not None, dict[str, Callable[[], None]]()
        progress, iterations = not self.runtime.quiet, self.config.adaround or ADAROUND_ITERATIONS
        if self.config.seq_mse or (searching and self.config.param_bw <= SEQ_MSE_BITS):
            steps[SEQ_MSE] = lambda: apply_seq_mse(self.sim, self.float_network, self.batches, progress, self.saved)
        if self.config.adaround or searching:
            steps[ADAROUND] = lambda: apply_adaround(
                self.sim, self.float_network, self.batches, iterations, progress, self.saved
            )
        return steps

    def _take(self, name: str, step: Callable[[], None]) -> None:
        """Apply a step to the best configuration so far, calibrate the activations again, and measure the result."""
        base = self.best
        self._start_from(base)
        try:
            step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"--recovery-images {self.config.recovery_images}: the memory does not suffice for {name} on this "
                "number of images. Give a smaller one."
            ) from error
        self._calibrate(name)
        self._measure(name if base.name == PLAIN else f"{base.name} and {name}", read_state(self.sim))

    def _mix(self) -> None:
        """Raise the bits of the most sensitive quantizers until the target is met, then lower what it does not need."""
        base, plain = self.best, self.tried[0]
        self._start_from(base)
        groups = mixed_precision.precision_groups(self.sim)
        ranked = [groups[position] for position in self._ranking(groups)]
        write_state(self.sim, plain.state)  # more bits are for the float weights, not for rounded ones
        high = mixed_precision.raised_state(self.sim, groups, lambda: self._calibrate("mixed precision"))

        def meets(raised: Groups, action: str = "lowered again, trial {}") -> bool:
            state = mixed_precision.mixed_state(base.state, high, raised)
            write_state(self.sim, state)
            name = f"mixed precision, {len(raised)} of {count(len(groups), 'quantizer')} {action}"
            return self._meets(self._measure(name.format(len(self.tried)), state, raised))

        raised = mixed_precision.raise_until(ranked, lambda raised: meets(raised, "raised"))
        if raised:
            mixed_precision.drop_unneeded(raised, meets)

    def _ranking(self, groups: Groups) -> list[int]:
        """Return the positions of groups in the order of their most sensitive quantizer, most sensitive first."""
        found = self.saved.load("ranking", {}, list[int])
        if found and sorted(found[1]) == list(range(len(groups))):
            return found[1]
        batches = self.batches[:SENSITIVITY_IMAGES]
        sensitivity = analyze_sensitivity(
            self.sim, self.float_network, lower(self.sim), batches, not self.runtime.quiet
        )
        ranking = [groups.index(group) for group in mixed_precision.rank_groups(groups, sensitivity)]
        self.saved.save("ranking", {}, ranking)
        return ranking

    def _calibrate(self, name: str) -> None:
        """Calibrate the simulation, whose weights a step has changed, or restore the ranges of an earlier run."""
        calibrate_or_restore(f"ranges-{name}", self.sim, self.images, self.runtime, self.saved)

    def _measure(self, name: str, state: SimState, raised: Groups = ()) -> Candidate:
        """Score the simulation, which is in the given state, on the selection images."""
        raise_weight_scales(self.sim)
        found = self._score(f"candidate-{len(self.tried)}", name, lambda: lower(self.sim))
        measured = statistics(np.array(found.matrices))
        change = measured.labelled_miou - self.fp32_statistics.labelled_miou
        cost = relative_cost(self.sim, self.operations)
        self.tried.append(Candidate(name, state, raised, measured, change, cost, found.taken))
        self._began = time.perf_counter()
        return self.tried[-1]

    def _score(self, key: str, title: str, backend: Callable[[], Backend]) -> Measurement:
        """Score a network on the selection images, or return what an earlier run measured."""
        saved = self.saved.load(key, {}, Measurement)
        if saved and len(saved[1].matrices) == len(self.selection):
            return saved[1]
        prepared = prepare_backends({title: backend()}, self.runtime)
        scores = evaluate(prepared, self.selection, self.runtime, title=title)
        taken = time.perf_counter() - self._began
        found = Measurement(scores.confusion_matrices[title].tolist(), scores.seconds[title], taken)
        self.saved.save(key, {}, dataclasses.asdict(found))
        return found

    def _start_from(self, candidate: Candidate) -> None:
        """Record that a step starts from a candidate, and put the simulation into its state."""
        if candidate not in self.bases:
            self.bases.append(candidate)
        write_state(self.sim, candidate.state)

    def _meets(self, candidate: Candidate) -> bool:
        return self.config.max_drop is not None and candidate.meets(self.config.max_drop)

    def _plan(self, steps: Iterable[str]) -> str:
        """Return what will be tried and how long each step takes, estimated from the time of FP32."""
        images, layers = len(self.batches), len(self.operations)
        iterations = self.config.adaround or ADAROUND_ITERATIONS
        per_image = self.fp32.seconds / len(self.fp32.matrices)
        per_product = per_image / sum(self.operations.values())
        weights = sum(self.sim.model.get_submodule(layer).weight.numel() for layer in self.operations)
        per_iteration = ADAROUND_OVERHEAD * 2 * BATCH * weights * per_product
        seconds = {
            SEQ_MSE: images * max(SEQ_MSE_PASSES * per_image, SEQ_MSE_SECONDS * layers),
            ADAROUND: iterations * max(per_iteration, ADAROUND_SECONDS * layers),
        }
        tried = [f"{name} ({format_duration(seconds[name])})" for name in steps]
        if self.config.max_drop is None:
            return f"Accuracy recovery: {', '.join(tried)}."
        most = 2 * len(mixed_precision.precision_groups(self.sim))
        each = format_duration(self.tried[0].seconds)
        tried.append(f"mixed precision (up to {most} measurements, {each} each)")
        return (
            f"Accuracy recovery tries {', '.join(tried)}. It ends as soon as the mIoU drop on the selection images, "
            f"now {self.tried[0].drop:.2f}, is at most {self.config.max_drop:g} percentage points, even if it is one "
            "standard error larger."
        )
