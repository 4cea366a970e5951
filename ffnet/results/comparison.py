"""The comparison of several models of one run: which of them to deploy.

A model is worth its cost if no other model reaches at least its mIoU with at most its cost (Pareto front). The mIoU is
that of INT8 simulated. Costs are multiply-accumulates, and the latency that Qualcomm AI Hub published.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_SIMULATED
from ffnet.evaluation.bootstrap import Interval, difference_interval, resampled_mious
from ffnet.labels import CLASSES
from ffnet.model import build_without_weights, count_parameters
from ffnet.quantization.weighted_layers import multiply_accumulates
from ffnet.results.ai_hub import PublishedLatency, published_latency
from ffnet.results.result import BackendResult, NpuResult, Result, miou_drops
from ffnet.system.text import count, format_interval, format_number

BIT_WIDTH_OPTIONS = ("default_param_bw", "default_output_bw")  # keys of Result.options
COMMON_PREFIX = "segmentation_"  # of the names of all variants


@dataclass(frozen=True)
class ComparedModel:
    """What the comparison needs of one model, without the scores of every image."""

    name: str
    link: str | None  # path of its report.html, relative to the comparison; None without --output-dir
    images: int  # number of images scored
    backends: dict[str, BackendResult]  # in evaluation order
    npu: NpuResult | None
    published: dict[str, float]  # backend -> published mIoU if it is comparable, percent
    parameters: int
    w8a8: bool  # whether all quantized weights and activations have 8 bits, as with AI Hub's latency
    gmacs: float  # 10**9 multiply-accumulates of one image of the run's size
    latency: PublishedLatency | None  # None if AI Hub has not published the model
    resampled: dict[str, np.ndarray] = field(repr=False, compare=False)  # backend -> see bootstrap.resampled_mious

    @property
    def short_name(self) -> str:
        """The name without the prefix that all variants have."""
        return self.name.removeprefix(COMMON_PREFIX)

    @property
    def drops(self) -> dict[str, float | None]:
        """The mIoU drop of every backend against FP32 in percentage points; None if they can't be compared."""
        return miou_drops(self.backends)

    @property
    def int8_miou(self) -> float | None:
        """The mIoU of INT8 simulated in percent; None if it is undefined."""
        return self.miou(INT8_SIMULATED)

    @property
    def latency_ms(self) -> float | None:
        """The published latency of the fastest runtime in milliseconds; None if none was published."""
        return self.latency.fastest if self.latency else None

    def miou(self, backend: str) -> float | None:
        """Return the mIoU of a backend in percent; None if it is undefined or if the model lacks the backend."""
        return self.backends[backend].miou if backend in self.backends else None


@dataclass(frozen=True)
class Cost:
    """A cost of models, of which less is better."""

    name: str
    unit: str
    digits: int  # decimals of a printed value
    lowest: str  # what the model with the lowest cost has
    of: Callable[[ComparedModel], float | None]  # None if it is unknown
    applies: Callable[[ComparedModel, tuple[int, int]], bool]  # whether it is that of the run: for images of (H, W)

    def describe(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:.{self.digits}f} {self.unit}"


GMACS = Cost("GMACs", "GMACs", 1, "fewest GMACs", lambda model: model.gmacs, lambda model, size: True)
LATENCY = Cost(
    "published latency",
    "ms",
    1,
    "shortest published latency",
    lambda model: model.latency_ms,
    lambda model, size: model.w8a8 and model.latency is not None and model.latency.input_size == size,
)
COSTS = (GMACS, LATENCY)


@dataclass(frozen=True)
class FrontMember:
    """A model on a Pareto front."""

    model: ComparedModel
    cost: float
    miou: float  # of INT8 simulated, percent
    gain: float | None  # over the mIoU of the next cheaper member, percentage points; None for the cheapest
    gain_interval: Interval | None  # paired 95 % confidence interval; None without at least two labelled images

    @property
    def distinct(self) -> bool | None:
        """Whether the gain's interval excludes 0; None without an interval."""
        return _excludes_zero(self.gain_interval)


@dataclass(frozen=True)
class Front:
    """The models that no other model beats with at most the same cost and at least the same mIoU, cheapest first."""

    cost: Cost
    eligible: int  # number of models that could be on it
    members: tuple[FrontMember, ...]

    @property
    def best(self) -> FrontMember:
        """The member with the highest mIoU."""
        return self.members[-1]

    @property
    def choice(self) -> FrontMember:
        """The cheapest member that, like all that cost more, is not distinct from the best one."""
        chosen = self.best
        for member in reversed(self.members[:-1]):
            if _excludes_zero(self.loss_interval(member)) is not False:
                break
            chosen = member
        return chosen

    def loss_interval(self, member: FrontMember) -> Interval | None:
        """Return the paired 95 % interval of how far a member's mIoU is below the best, in percentage points."""
        return _paired_interval(self.best.model, member.model)

    def __contains__(self, model: ComparedModel) -> bool:
        return any(member.model is model for member in self.members)

    def describe(self, images: int) -> str:
        """Return sentences on which member to deploy; `images`: the number of images of the run."""
        best, choice = self.best, self.choice
        first = (
            f"By {self.cost.name}, of {count(self.eligible, 'model')}: {best.model.short_name} has the highest mIoU of "
            f"{INT8_SIMULATED}, {best.miou:.2f} % at {self.cost.describe(best.cost)}"
        )
        if len(self.members) == 1:
            return f"{first}, and also the {self.cost.lowest}."
        if choice is not best:
            return (
                f"{first}. The cheapest model that {count(images, 'image')} cannot distinguish from it is "
                f"{self._describe_loss(choice)}."
            )
        return f"{first}. The next cheaper model on the Pareto front is {self._describe_loss(self.members[-2])}."

    def _describe_loss(self, member: FrontMember) -> str:
        limits = self.loss_interval(member)
        interval = f" (95 % CI {format_interval(limits)})" if limits else ""
        return (
            f"{member.model.short_name} at {self.cost.describe(member.cost)}, whose mIoU is "
            f"{format_number(self.best.miou - member.miou)} percentage points lower{interval}"
        )


@dataclass(frozen=True)
class Headline:
    """A model that answers a question about the run."""

    title: str
    member: FrontMember
    cost: Cost


@dataclass(frozen=True)
class BackendScore:
    """The metrics of one backend of one model."""

    model: ComparedModel
    backend: str
    images: int  # number of images that the backend ran
    result: BackendResult
    drop: float | None  # mIoU drop against FP32 on the same images, percentage points


@dataclass(frozen=True)
class ModelComparison:
    """Several models that one run evaluated."""

    models: list[ComparedModel]  # in the order of the run
    dataset: str
    images: int  # number of images of the run
    image_size: tuple[int, int]  # height, width in pixels
    device: str
    command: str  # the command line that repeats the run
    notes: list[str]  # sentences of the run
    options: dict[str, Any] = field(default_factory=dict)  # every option by its name with underscores
    versions: dict[str, str] = field(default_factory=dict)  # of Python and of the packages

    @property
    def backends(self) -> list[str]:
        """The names of all backends that some model has over all images, in evaluation order."""
        return list(dict.fromkeys(name for model in self.models for name in model.backends))

    def eligible(self, model: ComparedModel, cost: Cost) -> bool:
        """Return whether a model can be on the front: its mIoU and its cost are known, for the images of the run."""
        known = None not in (model.int8_miou, cost.of(model))
        return known and model.images == self.images and cost.applies(model, self.image_size)

    def front(self, cost: Cost) -> Front:
        """Return the Pareto front of the eligible models; it has no members if none is eligible."""
        models = [model for model in self.models if self.eligible(model, cost)]
        costs, mious = [cost.of(model) or 0.0 for model in models], [model.int8_miou or 0.0 for model in models]
        members: list[FrontMember] = []
        for index in pareto_front(costs, mious):
            cheaper = members[-1] if members else None
            members.append(_front_member(models[index], costs[index], mious[index], cheaper))
        return Front(cost, len(models), tuple(members))

    def fronts(self) -> list[Front]:
        """Return the fronts that have members, that by GMACs first."""
        return [front for front in map(self.front, COSTS) if front.members]

    def headlines(self) -> list[Headline]:
        """Return the models to choose from: the most accurate one, and for each cost the choice and the cheapest."""
        found = [Headline("Highest INT8 mIoU", front.best, front.cost) for front in self.fronts()[:1]]
        for front in self.fronts():
            lowest = front.cost.lowest[0].upper() + front.cost.lowest[1:]
            if front.choice is not front.best:
                found.append(Headline(f"{lowest} without a distinguishable loss", front.choice, front.cost))
            if front.members[0] is not front.choice:
                found.append(Headline(lowest, front.members[0], front.cost))
        return found

    def best(self) -> ComparedModel:
        """Return the model with the highest mIoU of INT8 simulated on all images; the first one if none has any."""
        front = self.front(GMACS)
        return front.best.model if front.members else self.models[0]

    def other_backends(self) -> list[BackendScore]:
        """Return the INT8 backends beside the simulation, of each model in turn; those of the NPU on its images."""
        return [score for model in self.models for score in _other_backends(model)]


@dataclass(frozen=True)
class ClassRow:
    """The IoU of one class in INT8 simulated in every model, and how far it is from that of the best model."""

    label: str
    ious: list[float | None]  # percent, in the order of the models; None if it is undefined
    differences: list[float | None]  # percentage points above the IoU of the model with the highest mIoU
    highest: float | None

    @property
    def largest_difference(self) -> float:
        """The largest of the differences, whatever its sign; 0 if all are undefined."""
        return max((abs(difference) for difference in self.differences if difference is not None), default=0.0)

    def winners(self, models: Sequence[ComparedModel]) -> list[ComparedModel]:
        """Return the models that have the highest IoU."""
        return [m for m, iou in zip(models, self.ious, strict=True) if iou is not None and iou == self.highest]


def class_rows(comparison: ModelComparison) -> list[ClassRow]:
    """Return a row per class, in the order of Cityscapes."""
    rows, best = [], comparison.best()
    for label in CLASSES:
        ious = [_class_iou(model, label) for model in comparison.models]
        reference = _class_iou(best, label)
        differences = [None if iou is None or reference is None else iou - reference for iou in ious]
        rows.append(ClassRow(label, ious, differences, max((iou for iou in ious if iou is not None), default=None)))
    return rows


def _class_iou(model: ComparedModel, label: str) -> float | None:
    entry = model.backends.get(INT8_SIMULATED)
    return entry.iou[label] if entry else None


def compare_model(result: Result, size: tuple[int, int], chip: str | None, link: str | None) -> ComparedModel:
    """Return what the comparison needs of a variant's result; the scores of its images are not kept.

    Args:
        result: of a variant of `VARIANTS`.
        size: height and width of the run's images in pixels.
        chip: part name of the run's chip; None if the options name none.
        link: relative path of the model's report.html; None without --output-dir.
    """
    network = build_without_weights(result.model)
    matrices = result.details.scores.confusion_matrices
    return ComparedModel(
        name=result.model,
        link=link,
        images=result.images,
        backends=result.backends,
        npu=result.npu,
        published=result.published,
        parameters=count_parameters(network),
        w8a8=_is_w8a8(result),
        gmacs=sum(multiply_accumulates(network, size).values()) / 1e9,
        latency=published_latency(result.model, chip),
        resampled={name: resampled_mious(counts) for name, counts in matrices.items()},
    )


def _is_w8a8(result: Result) -> bool:
    """Return whether the options ask for 8 bits and accuracy recovery raised none of them."""
    raised = result.recovery is not None and bool(result.recovery.raised)
    return not raised and {result.options.get(name, 8) for name in BIT_WIDTH_OPTIONS} == {8}


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the indices, by increasing cost, of what nothing beats with at most its cost and at least its value.

    To beat, one of the two must be strictly better; of equals, none beats the other.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], -values[index])):
        last = front[-1] if front else None
        if last is None or values[index] > values[last] or (costs[index], values[index]) == (costs[last], values[last]):
            front.append(index)
    return front


def _other_backends(model: ComparedModel) -> list[BackendScore]:
    sources = [(name, model.images, model.backends) for name in model.backends if name not in (FP32, INT8_SIMULATED)]
    if model.npu:
        sources.append((INT8_NPU, len(model.npu.images), model.npu.backends))
    return [
        BackendScore(model, name, images, backends[name], miou_drops(backends)[name])
        for name, images, backends in sources
    ]


def _front_member(model: ComparedModel, cost: float, miou: float, cheaper: FrontMember | None) -> FrontMember:
    if cheaper is None:
        return FrontMember(model, cost, miou, None, None)
    return FrontMember(model, cost, miou, miou - cheaper.miou, _paired_interval(model, cheaper.model))


def _paired_interval(first: ComparedModel, second: ComparedModel) -> Interval | None:
    """Return the 95 % interval of how far the INT8 mIoU of the first model is above that of the second."""
    return difference_interval(first.resampled[INT8_SIMULATED], second.resampled[INT8_SIMULATED])


def _excludes_zero(limits: Interval | None) -> bool | None:
    return limits and not limits[0] <= 0 <= limits[1]
