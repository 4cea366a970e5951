"""Recover accuracy: search a better configuration for the simulation, and describe the search for the report."""

import logging

from aimet_torch.quantsim import QuantizationSimModel
from torch import fx
from torch.utils.data import Subset

from datasets.cityscapes import CityscapesSplit, image_name
from ffnet.evaluation import metrics
from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.evaluation.bootstrap import miou_intervals
from ffnet.evaluation.loading import Sample
from ffnet.quantization.costs import multiply_accumulates
from ffnet.quantization.quantsim import recovery_batches
from ffnet.quantization.recovery.search import Candidate, Images, RecoverySearch
from ffnet.quantization.sites import WEIGHT, QuantizerSite
from ffnet.quantization.state import write_state
from ffnet.results.recovery import RaisedQuantizer, Recovery, RecoveryStep
from ffnet.results.result import percent
from ffnet.run.inputs import Inputs
from ffnet.run.session import Run
from ffnet.system.process import Terminated

logger = logging.getLogger(__name__)


def recover(sim: QuantizationSimModel, float_network: fx.GraphModule, inputs: Inputs, run: Run) -> Recovery | None:
    """Take the steps that the options ask for, change `sim` to the best configuration, and return what each bought.

    Under torchrun the main process does this alone and then shares the configuration; the others return None. After
    Ctrl-C the search ends, and the run goes on with the best configuration so far.

    Args:
        sim: calibrated as the plain configuration is; weight scales not yet raised for the biases.
        float_network: the equalized network of which `sim` is a simulation.
        inputs: with calibration images and selection images.
        run: gets a note.
    """
    recovery = None
    if run.ranks.is_main:
        with run.stage("recover accuracy"):
            recovery = _search(sim, float_network, inputs, run)
        run.notes.append(recovery.describe())
    run.ranks.share_state(sim)
    return recovery


def _search(sim: QuantizationSimModel, float_network: fx.GraphModule, inputs: Inputs, run: Run) -> Recovery:
    if inputs.calibration_images is None or inputs.selection_images is None:
        raise ValueError("recovery needs calibration images and selection images")
    operations = multiply_accumulates(float_network, (inputs.images.height, inputs.images.width))
    options = run.config.quantization
    batches = recovery_batches(inputs.calibration_images, options.recovery_images, run.ranks.device)
    images = Images(inputs.calibration_images, batches, inputs.selection_images)
    search = RecoverySearch(sim, float_network, images, operations, options, run.runtime)
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
            f"Interrupted: the run goes on with the best configuration so far ({search.best.name}). Interrupt it again "
            "to end it."
        )
    write_state(sim, search.best.state)
    return _describe(search, inputs, interrupted)


def _describe(search: RecoverySearch, inputs: Inputs, interrupted: bool) -> Recovery:
    best = search.best
    selection = _paths(inputs.selection_images) if inputs.selection_images else []
    kept = {id(candidate) for candidate in (*search.kept, best)}
    shown = [candidate for candidate in search.tried if candidate.shown or candidate is best]
    return Recovery(
        target=search.config.max_drop,
        fp32_miou=_miou(best, FP32),
        steps=[_step(candidate, id(candidate) in kept) for candidate in shown],
        chosen=best.name,
        raised=[
            RaisedQuantizer(site.layer, _tensor(site), group.bits) for group in best.raised for site in group.sites
        ],
        selection_images=[image_name(path) for path in selection],
        scored_too=not set(selection).isdisjoint(inputs.images.images),
        interrupted=interrupted,
    )


def _paths(images: Subset[Sample]) -> list[str]:
    split = images.dataset
    return [split.images[index] for index in images.indices] if isinstance(split, CityscapesSplit) else []


def _tensor(site: QuantizerSite) -> str:
    """Return which tensor of its layer a site quantizes: "output", "input" or the name of a parameter."""
    return str(site.key) if site.kind == WEIGHT else site.role


def _step(candidate: Candidate, kept: bool) -> RecoveryStep:
    intervals = miou_intervals(candidate.matrices, FP32)[INT8_SIMULATED]
    return RecoveryStep(
        name=candidate.name,
        miou=_miou(candidate, INT8_SIMULATED),
        miou_interval=intervals.miou,
        drop=None if candidate.drop != candidate.drop else candidate.drop,
        drop_interval=intervals.drop,
        bit_operations=candidate.cost.bit_operations,
        weight_bytes=candidate.cost.weight_bytes,
        seconds=candidate.seconds,
        kept=kept,
    )


def _miou(candidate: Candidate, backend: str) -> float | None:
    return percent(metrics.mean_iou(candidate.matrices[backend].sum(0)))
