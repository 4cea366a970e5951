"""What accuracy recovery did, for the report. The fields are part of the schema of `result.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ffnet.evaluation.bootstrap import Interval
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
    seconds: float  # time to find and to measure it
    kept: bool  # whether it is chosen or later steps started from it


@dataclass(frozen=True)
class RaisedQuantizer:
    """A quantizer that got more bits than the quantization config says."""

    layer: str
    tensor: str  # tensor of the layer: "weight", "output" or "input"
    bits: int


@dataclass(frozen=True)
class Recovery:
    """The search for a configuration that loses less accuracy."""

    target: float | None  # --max-drop in percentage points; None if the options name the steps
    fp32_miou: float | None  # percent, on the selection images
    steps: list[RecoveryStep]
    chosen: str  # name of the step whose configuration is used
    raised: list[RaisedQuantizer]  # quantizers with more bits in the chosen configuration
    selection_images: list[str] = field(default_factory=list)  # names of the images that the steps were measured on
    scored_too: bool = False  # whether these belong to the split that is scored
    interrupted: bool = False  # whether Ctrl-C ended the search

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
