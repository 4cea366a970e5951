"""The answer of a run: whether the quantized network is accurate enough, where it loses, and what to do next."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffnet.config import ONE_SPLIT
from ffnet.evaluation.metrics import Interval
from ffnet.evaluation.scores import NPU, SIMULATED
from ffnet.results.comparison import excludes_zero
from ffnet.results.published import ai_hub_result
from ffnet.results.result import BackendResult, Result
from ffnet.system.text import count, format_interval, format_number

NEGLIGIBLE = 0.5  # percentage points of mIoU; whether less is lost need not be known
MOST_CLASSES, MOST_STEPS = 6, 3
LOSS, NO_LOSS, UNKNOWN = "loss", "no loss", "unknown"


@dataclass(frozen=True)
class ClassLoss:
    """A class whose IoU is lower than in FP32."""

    name: str
    change: float  # change of the IoU in percentage points
    interval: Interval | None  # paired 95 % confidence interval of `change`

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes zero."""
        return bool(excludes_zero(self.interval))


@dataclass(frozen=True)
class NextStep:
    """What to do after a run."""

    text: str  # a sentence
    command: str | None  # command line that does it; None if the run had none


@dataclass(frozen=True)
class Verdict:
    """The answer of a run in plain words."""

    sentences: tuple[str, ...]  # the first one is the answer
    numbers: str  # what it is based on
    losses: tuple[ClassLoss, ...]  # the classes that lose most, at most MOST_CLASSES, the largest loss first
    next_steps: tuple[NextStep, ...]  # at most MOST_STEPS


def verdict(result: Result) -> Verdict:
    """Return the verdict on a run: on the simulation or, without one, on the last backend; then on the NPU."""
    name, entry = judged_backend(result)
    quantized = result.precision or "The file"
    found, answer = _judge(entry, quantized, result.images)
    base = next(iter(result.backends))
    numbers = f"mIoU {format_number(entry.miou)} %"
    if name == base:
        found, answer = UNKNOWN, f"{quantized} has a mIoU of {format_number(entry.miou, 1)} %."
        numbers += "; no other backend to compare it with"
    else:
        numbers = f"mIoU {format_number(result.base.miou)} % in {base}, {format_number(entry.miou)} % in {name}"
        interval = f", 95 % CI {format_interval(entry.change_interval)}" if entry.change_interval else ""
        numbers += f"; change {format_number(entry.change, sign='+')} percentage points{interval}"
    sentences = (answer, *_npu_sentences(result), *_latency_sentences(result))
    steps = [step for step in STEPS if step.fits(result, found)][:MOST_STEPS]
    return Verdict(
        sentences,
        f"{numbers}; {count(result.images, 'image')}.",
        largest_losses(entry),
        tuple(NextStep(step.text, step.command(result.command)) for step in steps),
    )


def judged_backend(result: Result) -> tuple[str, BackendResult]:
    """Return the backend that the answer is about: the simulation or, without one, the last."""
    name = result.names.of(SIMULATED)
    return (name, result.backends[name]) if name in result.backends else list(result.backends.items())[-1]


def largest_losses(entry: BackendResult) -> tuple[ClassLoss, ...]:
    """Return the classes that lose most."""
    changes = sorted(entry.iou_change.items(), key=lambda item: item[1])[:MOST_CLASSES]
    return tuple(ClassLoss(name, change, entry.iou_change_interval[name]) for name, change in changes if change < 0)


def _judge(entry: BackendResult, subject: str, images: int) -> tuple[str, str]:
    """Return LOSS, NO_LOSS or UNKNOWN, and the sentence that says it, from the interval of the change."""
    if entry.change is None:
        return UNKNOWN, f"What {subject} costs is unknown, because there is no mIoU in FP32 to compare with."
    few = f"{count(images, 'image')} {'is' if images == 1 else 'are'} too few to tell what {subject} costs"
    if entry.change_interval is None:
        return UNKNOWN, f"{few}: here the mIoU changed by {format_number(entry.change, sign='+')} percentage points."
    low, high = entry.change_interval
    if high < 0:
        return LOSS, f"{subject} costs {format_range(-high, -low)} percentage points of mIoU."
    if low > 0:
        return NO_LOSS, f"{subject} loses nothing: it gains {format_range(low, high)} percentage points of mIoU."
    if low < -NEGLIGIBLE:
        loss, gain = format_number(-low, 1), format_number(high, 1)
        return UNKNOWN, f"{few}: between a loss of {loss} and a gain of {gain} percentage points of mIoU."
    return NO_LOSS, f"{subject} has no measurable loss: at most {max(0.01, -low):.2f} percentage points of mIoU."


def format_range(low: float, high: float) -> str:
    """Return "0.3 to 0.6" for two positive numbers, with enough decimals to tell them from each other and from 0."""
    for digits in (1, 2, 3):
        texts = format_number(low, digits), format_number(high, digits)
        if texts[0] != texts[1] and float(texts[0]):
            break
    return f"{texts[0]} to {texts[1]}"


def _npu_sentences(result: Result) -> list[str]:
    """Return a sentence on the NPU; on that with the largest loss if several chips differ."""
    backend = result.names.of(NPU)
    npus = [npu for npu in result.npus.values() if npu.backends[backend].change is not None]
    if not npus:
        return []
    npu = min(npus, key=lambda npu: npu.backends[backend].change or 0.0)
    where = f"{result.precision} on the {'' if npu.hardware else 'emulated '}NPU of the {npu.chip}".lstrip()
    others = f" It is the worst of {len(npus)} groups of chips." if len(npus) > 1 else ""
    return [_judge(npu.backends[backend], where, len(npu.images))[1] + others]


def _latency_sentences(result: Result) -> list[str]:
    """Return a sentence on the latency that AI Hub published, if it is that of the network as it was evaluated."""
    published = ai_hub_result(result.model, result.npu.chip if result.npu else None)
    if published is None or published.fastest is None or result.precision != "INT8":
        return []
    if published.input_size != result.details.image_size:
        return []
    latency = f"{format_number(published.fastest, 1)} ms on a {published.device}"
    return [f"Qualcomm AI Hub measured a latency of {latency} for this network in W8A8."]


@dataclass(frozen=True)
class Step:
    """A next step: after which runs it is proposed, and how the command line changes."""

    fits: Callable[[Result, str], bool]  # takes a result, and LOSS, NO_LOSS or UNKNOWN
    text: str
    add: str = ""  # options
    remove: tuple[str, ...] = ()  # options

    def command(self, command: str) -> str | None:
        """Return the command line that takes the step; None without a command line to change."""
        if not command:
            return None
        given = (self.add.split() or [""])[0]
        words = without_options(shlex.split(command), {"--resume", "--force", "--baseline", given, *self.remove})
        if "--output-dir" in words[:-1]:
            position = words.index("--output-dir") + 1
            words[position] += f"-{(given or 'all images').strip('-').replace(' ', '-')}"
        return " ".join(filter(None, (shlex.join(words), self.add)))


def without_options(words: Sequence[str], flags: set[str]) -> list[str]:
    """Return the words of a command line without these options and their values."""
    kept, removes = [], False
    for word in words:
        if word.startswith("--"):
            removes = word.partition("=")[0] in flags
        if not removes:
            kept.append(word)
    return kept


def _is_calibrated(result: Result) -> bool:
    return result.calibration is not None and result.calibration.images > 0


def _is_cityscapes(result: Result) -> bool:
    return not result.options["demo"] and result.options["dataset"] != ONE_SPLIT


STEPS = (  # the first ones that fit are proposed
    Step(
        lambda result, found: found == UNKNOWN and result.options["limit"] is not None,
        "Score all images, for a narrower interval.",
        remove=("--limit",),
    ),
    Step(
        lambda result, found: found == LOSS and result.recovery is None and _is_calibrated(result),
        "Win accuracy back by other ranges, rounding and more bits.",
        "--max-drop 0.3",
    ),
    Step(
        lambda result, found: found == LOSS and not result.options["sensitivity"] and result.checkpoint is not None,
        "Find the quantizers that cost most.",
        "--sensitivity",
    ),
    Step(
        lambda result, _: _is_calibrated(result) and _is_cityscapes(result) and _calibrates_on_scored(result),
        "Calibrate on images that are not scored.",
        "--calibration-split train",
    ),
    Step(
        lambda result, _: bool(result.options["demo"]) and result.checkpoint is not None,
        "Evaluate Cityscapes with the published weights.",
        "--dataset-path cityscapes",
        remove=("--demo", "--limit", "--model-name"),
    ),
    Step(
        lambda result, _: not result.npu_chips and result.checkpoint is not None and bool(result.details.image_size),
        "See what Qualcomm's NPU makes of it (`pip install -r requirements-npu.txt`).",
        "--npu",
    ),
    Step(
        lambda result, found: found != LOSS and not result.options["export"] and result.checkpoint is not None,
        "Write the files for QAIRT, AI Hub and ONNX Runtime.",
        "--export exported",
    ),
)


def _calibrates_on_scored(result: Result) -> bool:
    return bool(result.options["calibration_split"] == result.options["split"])
