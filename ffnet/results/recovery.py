"""What accuracy recovery did, for the report. The fields are part of the schema of `result.json`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffnet.evaluation import metrics
from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.evaluation.bootstrap import Interval, miou_intervals
from ffnet.quantization.recovery.search import MeasuredStep, RaisedQuantizer, RecoveryOutcome
from ffnet.system.text import count

CHOSEN, KEPT, NOT_KEPT = "chosen", "kept", "not kept"  # outcomes of a step


@dataclass(frozen=True)
class RecoveryStep:
    """One configuration, measured on the selection images."""

    name: str
    miou: float | None  # percent
    miou_interval: Interval | None  # 95 % confidence interval of `miou`
    drop: float | None  # mIoU drop against FP32 on the same images, percentage points
    drop_interval: Interval | None
    bit_operations: float  # as a share of those at W8A8
    weight_bytes: float  # as a share of those at W8A8
    seconds: float  # time to find and to measure the configuration
    kept: bool  # whether it is chosen or later steps started from it


@dataclass(frozen=True)
class Recovery:
    """The search for a configuration that loses less accuracy."""

    target: float | None  # --max-drop in percentage points; None if the options name the steps
    fp32_miou: float | None  # percent, on the selection images
    steps: list[RecoveryStep]
    chosen: str  # name of the step whose configuration is used
    raised: list[RaisedQuantizer]  # quantizers with more bits in the chosen configuration
    selection_images: list[str]  # names of the images that the steps were measured on
    scored_too: bool  # whether some of them are scored
    interrupted: bool  # whether Ctrl-C ended the search

    @property
    def chosen_step(self) -> RecoveryStep:
        """The step whose configuration is used."""
        return next(step for step in self.steps if step.name == self.chosen)

    @property
    def met(self) -> bool | None:
        """Whether the target is met on the selection images; None without a target."""
        drop = self.chosen_step.drop
        return None if self.target is None else drop is not None and drop <= self.target

    def outcome(self, step: RecoveryStep) -> str:
        """Return CHOSEN, KEPT or NOT_KEPT."""
        if step.name == self.chosen:
            return CHOSEN
        return KEPT if step.kept else NOT_KEPT

    def describe(self) -> str:
        """Return sentences on what was chosen, and on which images."""
        step = self.chosen_step
        drop = "unknown mIoU drop" if step.drop is None else f"mIoU drop of {step.drop:z.2f} percentage points"
        images = count(len(self.selection_images), "selection image")
        sentences = [f"Accuracy recovery: {self.chosen}, with an {drop} on {images}."]
        if self.interrupted:
            sentences.append("The search was interrupted; this is the best configuration that it had found.")
        elif self.met is False:
            sentences.append(
                f"No configuration met --max-drop {self.target:g}: this is the one with the smallest drop."
            )
        if self.scored_too:
            sentences.append(
                "The selection images belong to the split that is scored, so the mIoU may be too favourable; with "
                "--calibration-split train they do not."
            )
        return " ".join(sentences)


def recovery_from_json(content: Mapping[str, Any] | None) -> Recovery | None:
    """Return the Recovery of which `content` is the JSON object."""
    if content is None:
        return None
    steps = [RecoveryStep(**with_tuples(step, "miou_interval", "drop_interval")) for step in content["steps"]]
    raised = [RaisedQuantizer(**quantizer) for quantizer in content["raised"]]
    return Recovery(**{**content, "steps": steps, "raised": raised})


def with_tuples(content: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a JSON object with some of its lists as tuples."""
    return {**content, **{name: content[name] and tuple(content[name]) for name in names}}


def describe_recovery(outcome: RecoveryOutcome, selection: Sequence[str], scored: Collection[str]) -> Recovery:
    """Return what a search did, with confidence intervals.

    Args:
        outcome: What the search tried and chose.
        selection: Names of the selection images.
        scored: Names of the images that are scored.
    """
    return Recovery(
        target=outcome.target,
        fp32_miou=_miou(outcome.steps[0], FP32),
        steps=[_recovery_step(step) for step in outcome.steps],
        chosen=outcome.chosen,
        raised=outcome.raised,
        selection_images=list(selection),
        scored_too=not set(selection).isdisjoint(scored),
        interrupted=outcome.interrupted,
    )


def _recovery_step(step: MeasuredStep) -> RecoveryStep:
    intervals = miou_intervals(step.confusion_matrices, FP32)[INT8_SIMULATED]
    fp32, miou = _miou(step, FP32), _miou(step, INT8_SIMULATED)
    return RecoveryStep(
        name=step.name,
        miou=miou,
        miou_interval=intervals.miou,
        drop=None if fp32 is None or miou is None else fp32 - miou,
        drop_interval=intervals.drop,
        bit_operations=step.bit_operations,
        weight_bytes=step.weight_bytes,
        seconds=step.seconds,
        kept=step.kept,
    )


def _miou(step: MeasuredStep, backend: str) -> float | None:
    share = metrics.mean_iou(step.confusion_matrices[backend].sum(0))
    return None if share != share else 100 * share
