"""The comparison of several models of one run: which of them to deploy.

A model is worth its cost if no other model reaches at least its mIoU with at most its cost (Pareto front). The mIoU is
that of the simulation, over the classes with labelled pixels, which are the same for all models. Costs are
multiply-accumulates, and the latency that Qualcomm AI Hub published.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ffnet.evaluation.metrics import Estimate, Interval, statistics
from ffnet.evaluation.scores import FP32, SIMULATED, no_scores
from ffnet.model import build_without_weights, count_parameters
from ffnet.quantization.weighted_layers import multiply_accumulates
from ffnet.results.published import SOURCE, DeviceResult, ai_hub_result
from ffnet.results.result import BackendResult, Details, Result
from ffnet.system.text import count, describe_size, format_interval, format_number, list_names
from ffnet.variants import VARIANTS

COMMON_PREFIX = "segmentation_"  # all names of variants begin with it


@dataclass(frozen=True)
class ComparedModel:
    """The result of one model without the scores of its images, and its costs."""

    result: Result
    link: str | None  # path of its report.html, relative to the comparison; None without --output-dir
    parameters: int
    gmacs: float | None  # 10**9 multiply-accumulates of one image; None if the sizes of images differ
    published: DeviceResult | None  # None if AI Hub has not published the model
    estimate: Estimate | None = field(repr=False, compare=False)  # simulation's mIoU over the labelled classes

    @property
    def short_name(self) -> str:
        """The name without the prefix that all variants have."""
        return self.result.model.removeprefix(COMMON_PREFIX)

    @property
    def is_w8a8(self) -> bool:
        """Whether all quantized weights and activations have 8 bits, as with AI Hub's latency."""
        return self.result.precision == "INT8"

    @property
    def has_published_size(self) -> bool:
        """Whether the images have the size of those that AI Hub measured the latency with."""
        return self.published is not None and self.published.input_size == self.result.details.image_size

    @property
    def latency(self) -> float | None:
        """The latency of AI Hub's fastest runtime in milliseconds; None unless it belongs to the model as evaluated."""
        return self.published.fastest if self.published and self.has_published_size and self.is_w8a8 else None

    @property
    def simulated(self) -> BackendResult | None:
        """The metrics of the simulation; None for a run that has none."""
        return self.result.backends.get(self.result.names.of(SIMULATED))

    @property
    def miou(self) -> float | None:
        """The mIoU of the simulation over the classes with labelled pixels, in percent; None if it is undefined."""
        return self.simulated.labelled_miou if self.simulated else None


def compare_model(result: Result, chip: str | None, link: str | None) -> ComparedModel:
    """Return what the comparison needs of a variant's result; `chip`: part name of the run's chip, if there is one."""
    network = build_without_weights(result.model, len(result.classes))
    size, matrices = result.details.image_size, result.details.scores.confusion_matrices
    return ComparedModel(
        result=replace(result, details=Details(no_scores((), 0), (), size, result.details.label_set)),
        link=link,
        parameters=count_parameters(network),
        gmacs=sum(multiply_accumulates(network, size).values()) / 1e9 if size else None,
        published=ai_hub_result(result.model, chip),
        estimate=statistics(matrices[SIMULATED]).labelled_miou if SIMULATED in matrices else None,
    )


@dataclass(frozen=True)
class Cost:
    """A cost of models, of which less is better."""

    name: str
    unit: str
    lowest: str  # what the model with the lowest cost has
    of: Callable[[ComparedModel], float | None]  # None if it is unknown


GMACS = Cost("GMACs", "GMACs", "fewest GMACs", lambda model: model.gmacs)
LATENCY = Cost("published latency", "ms", "shortest published latency", lambda model: model.latency)
COSTS = (GMACS, LATENCY)


@dataclass(frozen=True)
class Candidate:
    """A model whose cost and mIoU are known; on a Pareto front, with its gain."""

    model: ComparedModel
    cost: float
    estimate: Estimate  # mIoU of the simulation over the classes with labelled pixels, percent
    gain: Estimate | None = None  # over the next cheaper member, percentage points; None for the cheapest

    @property
    def gain_interval(self) -> Interval | None:
        """The paired 95 % confidence interval of the gain."""
        return self.gain.interval if self.gain else None


@dataclass(frozen=True)
class Front:
    """The models that no other model beats with at most the same cost and at least the same mIoU, cheapest first."""

    cost: Cost
    candidates: tuple[Candidate, ...]  # the models that could be on it, in the order of the run
    members: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The member with the highest mIoU."""
        return self.members[-1]

    @property
    def choice(self) -> Candidate:
        """The cheapest member that, like all that cost more, is not distinct from the best one."""
        chosen = self.best
        for member in reversed(self.members[:-1]):
            if excludes_zero(self.loss(member).interval) is not False:
                break
            chosen = member
        return chosen

    def loss(self, member: Candidate) -> Estimate:
        """Return how far a member's mIoU is below the best, in percentage points."""
        return self.best.estimate - member.estimate

    def has(self, model: ComparedModel) -> bool | None:
        """Return whether a model is on the front; None if it could not be."""
        if model not in [candidate.model for candidate in self.candidates]:
            return None
        return model in [member.model for member in self.members]

    def describe(self, images: int) -> str:
        """Return sentences on which member to deploy, after a run on this number of images."""
        best, other = self.best, self.choice
        first = (
            f"By {self.cost.name}, of {count(len(self.candidates), 'model')}: {best.model.short_name} has the highest "
            f"mIoU in the simulation, {best.model.miou:.2f} % at {best.cost:.1f} {self.cost.unit}"
        )
        if len(self.members) == 1:
            return f"{first}, and also the {self.cost.lowest}."
        role = f"The cheapest model that {count(images, 'image')} cannot distinguish from it"
        if other is best:
            other, role = self.members[-2], "The next cheaper model on the Pareto front"
        loss = self.loss(other)
        return (
            f"{first}. {role} is {other.model.short_name} at {other.cost:.1f} {self.cost.unit}, whose mIoU is "
            f"{format_number(loss.value)} percentage points lower"
            f"{f' (95 % CI {format_interval(loss.interval)})' if loss.interval else ''}."
        )


def excludes_zero(limits: Interval | None) -> bool | None:
    """Return whether an interval lies on one side of 0; None without an interval."""
    return limits and not limits[0] <= 0 <= limits[1]


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return, by increasing cost, the candidates that none beats with at most their cost and at least their mIoU.

    To beat, one of the two must be strictly better; of equals, none beats the other.
    """
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.cost, -candidate.estimate.value)):
        miou, last = candidate.estimate.value, front[-1] if front else None
        if last is None or miou > last.estimate.value or (candidate.cost, miou) == (last.cost, last.estimate.value):
            front.append(candidate)
    return front


def _has_other_published(model: ComparedModel) -> bool:
    """Return whether a mIoU was published that is not comparable with the run's."""
    variant = VARIANTS.get(model.result.model)
    values = (variant.published.fp32, variant.published.int8) if variant else ()
    return len([value for value in values if value is not None]) > len(model.result.published)


LIMITS: dict[str, Callable[[ComparedModel], bool]] = {  # note before the names of models -> to which it applies
    f"The mIoU of {FP32} or of the simulation is unknown": lambda model: (
        model.simulated is None or (model.simulated.change is None)
    ),
    "A published mIoU is not comparable with this run, as the report of each model explains": _has_other_published,
    "AI Hub measured the latency with images of another size, so it does not count for the Pareto front": (
        lambda model: model.published is not None and not model.has_published_size
    ),
    "AI Hub measured the latency with 8-bit weights and activations, so it does not count for the Pareto front": (
        lambda model: model.published is not None and not model.is_w8a8
    ),
}


@dataclass(frozen=True)
class ModelComparison:
    """Several models that one run evaluated on the same images."""

    models: list[ComparedModel]  # at least one; order of the run
    run_notes: list[str]  # sentences on the whole run
    options: dict[str, Any]  # every option by its name with underscores

    @property
    def precision(self) -> str:
        """The precision of all models, as in the names of backends; "quantized" if it differs."""
        found = {model.result.precision for model in self.models}
        return found.pop() if len(found) == 1 else "quantized"

    @property
    def last(self) -> Result:
        """The result of the last model, whose data set, device, command and versions are those of the run."""
        return self.models[-1].result

    @property
    def image_sizes(self) -> str:
        """The sizes of the networks' inputs."""
        return " and ".join(dict.fromkeys(describe_size(model.result.details.image_size) for model in self.models))

    def front(self, cost: Cost) -> Front:
        """Return the Pareto front of the models whose cost and mIoU are known; without any, it has no members."""
        candidates = tuple(
            Candidate(model, value, model.estimate)
            for model in self.models
            if (value := cost.of(model)) is not None and model.estimate and model.miou is not None
        )
        members = pareto_front(candidates)
        for index, (cheaper, member) in enumerate(itertools.pairwise(members), 1):
            members[index] = replace(member, gain=member.estimate - cheaper.estimate)
        return Front(cost, candidates, tuple(members))

    def fronts(self) -> list[Front]:
        """Return the fronts that have members, that by GMACs first."""
        return [front for front in map(self.front, COSTS) if front.members]

    def best(self) -> ComparedModel:
        """Return the model with the highest mIoU in the simulation; the first one if none has any."""
        front = self.front(GMACS)
        return front.best.model if front.members else self.models[0]

    def notes(self) -> list[str]:
        """Return the notes of the run, and those on what limits the comparison."""
        notes = []
        for text, limits in LIMITS.items():
            if names := [model.short_name for model in self.models if limits(model)]:
                notes.append(f"{text}: {list_names(names)}.")
        if len({tuple(model.result.npu.images) for model in self.models if model.result.npu}) > 1:
            notes.append("The models ran different images on the NPU: their mIoUs there are not comparable.")
        if devices := [model.published.device for model in self.models if model.published]:
            notes.append(
                f"Latency: W8A8 by TFLite/DLC/ONNX on {devices[0]}, from {SOURCE}. The fastest of these runtimes "
                "counts for the Pareto front."
            )
        return [*self.run_notes, *notes]
