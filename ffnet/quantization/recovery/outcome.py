"""What the search for a more accurate configuration tried and chose."""

from dataclasses import dataclass, field

from ffnet.evaluation.metrics import Interval
from ffnet.system.text import count

CHOSEN, KEPT, NOT_KEPT = "chosen", "kept", "not kept"  # outcomes of a step


@dataclass(frozen=True)
class RecoveryStep:
    """One configuration, measured on the selection images."""

    name: str
    miou: float | None  # percent
    miou_interval: Interval | None  # 95 % confidence interval of `miou`
    change: float | None  # against FP32 on the same images, percentage points, minus is worse
    change_interval: Interval | None
    bit_operations: float  # as a share of those at W8A8
    weight_bytes: float  # as a share of those at W8A8
    seconds: float  # time to find and to measure the configuration
    kept: bool  # whether it is chosen or later steps started from it
    met: bool  # whether it meets the target; false without one


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
    scored_too: bool = False  # whether some of them are scored
    interrupted: bool = False  # whether Ctrl-C ended the search

    def __post_init__(self) -> None:
        if self.chosen not in [step.name for step in self.steps]:
            raise ValueError(f"no step is named {self.chosen!r}")

    @property
    def chosen_step(self) -> RecoveryStep:
        """The step whose configuration is used."""
        return next(step for step in self.steps if step.name == self.chosen)

    @property
    def met(self) -> bool | None:
        """Whether the target is met on the selection images; None without a target."""
        return None if self.target is None else self.chosen_step.met

    def outcome(self, step: RecoveryStep) -> str:
        """Return CHOSEN, KEPT or NOT_KEPT."""
        if step.name == self.chosen:
            return CHOSEN
        return KEPT if step.kept else NOT_KEPT

    def describe(self) -> str:
        """Return sentences on what was chosen, and on which images."""
        change = self.chosen_step.change
        drop = "unknown mIoU drop" if change is None else f"mIoU drop of {-change:z.2f} percentage points"
        images = count(len(self.selection_images), "selection image")
        tried = count(len(self.steps), "configuration")
        sentences = [f"Accuracy recovery tried {tried} and chose {self.chosen}, with an {drop} on {images}."]
        if self.interrupted:
            sentences.append("The search was interrupted; this is the best configuration that it had found.")
        elif self.met is False:
            sentences.append(
                f"No configuration met --max-drop {self.target:g}: this is the one with the smallest drop."
            )
        elif self.target is not None and self.chosen_step.change_interval is None:
            sentences.append("The images are too few for a standard error, so the estimate alone met --max-drop.")
        elif self.target == 0:
            sentences.append("With --max-drop 0 the estimate decides, without allowing for its standard error.")
        if self.scored_too:
            sentences.append(
                "The selection images belong to the split that is scored, so the mIoU may be too favorable; with "
                "--calibration-split train they do not."
            )
        return " ".join(sentences)
