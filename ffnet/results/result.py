"""The result of a run. Its fields are the documented schema of `result.json`."""

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ffnet.evaluation import metrics
from ffnet.evaluation.metrics import FEW_IMAGES, Estimate, Interval, Statistics, known, percent, statistics
from ffnet.evaluation.scores import FP32, NPU, BackendNames, Scores
from ffnet.labels import LabelSet
from ffnet.quantization.layers import Layers
from ffnet.quantization.recovery.outcome import Recovery
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.results.images import ImageComparison
from ffnet.system.schema import parse
from ffnet.system.text import count, format_number, list_names

DEMO_NOTE = "The project renders these street scenes itself: the metrics say nothing about Cityscapes."
BUSY = 0.75  # share of the processor time below which the speed is marked as too low
SCHEMA = 4  # version of the schema of result.json; see docs/results.md
PACKAGES = ("torch", "torchvision", "aimet-torch", "onnxruntime", "numpy", "scikit-image")


@dataclass(frozen=True)
class BackendResult:
    """The metrics of one backend over all images; None for a metric that is undefined."""

    miou: float | None  # percent, mean over the classes that occur in labels or predictions
    miou_interval: Interval | None  # 95 % confidence interval of `miou` in percent
    labelled_miou: float | None  # percent, mean over the classes that have labelled pixels
    # Change of `labelled_miou` against FP32 in percentage points, minus is worse; None for FP32 and without FP32.
    change: float | None
    change_interval: Interval | None  # paired 95 % confidence interval of `change`
    iou: dict[str, float | None]  # class -> percent; None if the class occurs in neither labels nor predictions
    iou_interval: dict[str, Interval | None]  # class -> 95 % confidence interval of its IoU
    iou_change: dict[str, float]  # class with labelled pixels -> change of its IoU; empty where `change` is None
    iou_change_interval: dict[str, Interval | None]
    pixel_accuracy: float | None  # percent of the scored pixels
    images_per_second: float  # time in the network alone, without decoding and scoring
    confusion_matrix: list[list[int]]  # pixel counts, row = label, column = prediction


@dataclass(frozen=True)
class ClassCount:
    """The color of a class, and what its IoU is based on."""

    color: tuple[int, int, int]  # RGB
    images: int  # number of images with labelled pixels of the class
    labelled_pixels: int
    few: bool  # whether the images are fewer than FEW_IMAGES


@dataclass(frozen=True)
class CheckpointInfo:
    """Which weights were evaluated."""

    path: str
    sha256: str
    form: str  # "state_dict", "prepared", "equalized", "module", "safetensors" or "release"


@dataclass(frozen=True)
class Calibration:
    """Where the encodings of the simulation come from."""

    images: int  # number of calibration images; 0 if all encodings were loaded from a file
    batch_size: int | None  # images per batch; None if all encodings were loaded from a file
    description: str  # one or more sentences


@dataclass(frozen=True)
class NpuResult:
    """The evaluation on the NPU. All backends were scored again on the images that the NPU ran."""

    chip: str  # part name
    same_chips: list[str]  # part names of chips that computed the same logits of the first image; not run on the others
    name: str  # marketing name
    soc_model: int  # Qualcomm's number of the chip
    architecture: str  # Hexagon architecture, such as "v79"
    hardware: bool  # whether an NPU in this PC ran the network; otherwise it was emulated
    version: str  # onnxruntime-qnn
    processes: int  # number of processes that ran images at the same time
    cpu_nodes: list[str]  # names of the nodes that ran on the CPU
    requested_images: int  # number of images to run; more than `images` if the evaluation ended early
    images: list[str]  # names of the images that were scored
    classes: dict[str, ClassCount]  # counted on these images
    backends: dict[str, BackendResult]  # evaluation order: the others, then the NPU
    agreement: dict[str, float]  # "FP32|INT8 NPU" -> percent of pixels with equal predictions
    published: dict[str, float]  # backend -> mIoU that Qualcomm AI Hub published if it is comparable, percent

    def describe(self) -> str:
        """Return a sentence on what ran the network, on how many images and with which nodes on the CPU."""
        package = f"onnxruntime-qnn {self.version}"
        how = f"Qualcomm's compiler and emulator ({package}) for the NPU of {self.chip} ({self.name})"
        if self.hardware:
            how = f"this PC's NPU, driven by {package},"
        early = ", and then ended early" if len(self.images) < self.requested_images else ""
        nodes = f"Nodes that ran on the CPU: {list_names(self.cpu_nodes, most=50) or 'none'}."
        same = f" Chips with the same logits on 1 image, the first: {list_names(self.same_chips, most=50)}."
        return (
            f"{how} ran {len(self.images)} of {count(self.requested_images, 'image')}{early}. {nodes}"
            f"{same if self.same_chips else ''}"
        )


@dataclass(frozen=True)
class ChipResult:
    """What one chip of --npu makes of the file, and what Qualcomm AI Hub measured on a device with it."""

    chip: str  # part name
    latency: str | None = None  # AI Hub's W8A8 latency by TFLite/DLC/ONNX in milliseconds
    measured_change: float | None = None  # AI Hub's mIoU change by ONNX in percentage points
    hardware: bool = False  # whether an NPU in this PC runs the file
    cpu_nodes: list[str] = field(default_factory=list)  # names of the nodes that run on the CPU
    logits: str | None = None  # sha256 of the logits of the first image; None if no other chip is compared
    error: str | None = None  # why the file can't be compiled for the chip or run
    refused: list[str] = field(default_factory=list)  # names of the nodes that the chip refuses

    def describe_nodes(self) -> str:
        """Return which nodes do not run on the NPU, and why."""
        if self.error:
            return f"refuses {list_names(self.refused)}" if self.refused else "can't run the file"
        return f"on the CPU: {list_names(self.cpu_nodes)}" if self.cpu_nodes else ""


@dataclass(frozen=True)
class BaselineChange:
    """How the mIoU of one backend differs from an earlier run's on the images that both scored."""

    backend: str  # name in this run
    baseline_backend: str  # name in the earlier run, where bit widths may differ
    images: int
    baseline_miou: float | None  # percent, in the earlier run
    miou: float | None  # percent
    change: float | None  # over the classes that have labelled pixels, in percentage points; minus is worse
    change_interval: Interval | None  # paired 95 % confidence interval of `change`


@dataclass(frozen=True)
class Baseline:
    """The comparison with the run that --baseline names."""

    folder: str
    model: str  # as in Result
    changes: list[BaselineChange]


@dataclass(frozen=True)
class Diagnostics:
    """Which images and quantizers cost accuracy; shown by the report and not in `result.json`."""

    worst_images: tuple[ImageComparison, ...] = ()
    sensitivity: Sensitivity | None = None
    placement: tuple[tuple[str, str], ...] = ()  # tensor, and whether the encodings or the published config quantize it


@dataclass(frozen=True)
class Details:
    """What the report and the exit status need beside the fields of `result.json`."""

    scores: Scores
    image_names: tuple[str, ...]  # <city>_<sequence>_<frame>, in the order of `scores`
    image_size: tuple[int, int] | None  # height, width of the network's input in pixels; None if images differ
    label_set: LabelSet
    diagnostics: Diagnostics = Diagnostics()
    failure: BaseException | None = None  # what ended the run after the images were scored, if anything did
    written: bool = False  # whether the files of the result are there already, from the run that is resumed


@dataclass(frozen=True)
class Result:
    """The result of one run, written to `result.json` without `details`."""

    schema: int  # version of this schema, SCHEMA
    model: str  # name of the variant, or path of the ONNX file
    dataset: str
    images: int  # number of images scored
    device: str
    notes: list[str]  # sentences to read with the metrics
    published: dict[str, float]  # backend -> published mIoU on Cityscapes val if it is comparable, percent
    checkpoint: CheckpointInfo | None  # None for --onnx
    calibration: Calibration | None  # None for --onnx
    recovery: Recovery | None  # None without --seq-mse, --adaround and --max-drop
    precision: str  # bits of the quantized network, as in the names of its backends; "" for --onnx
    label_set: str  # its name
    classes: dict[str, ClassCount]  # in the order of the train ids
    backends: dict[str, BackendResult]  # evaluation order: FP32 first, or the ONNX file alone
    agreement: dict[str, float]  # "FP32|INT8 simulated" -> percent of pixels with equal predictions
    npu: NpuResult | None  # None without --npu, and if the NPU finished no image
    other_npus: list[NpuResult]  # the same for further groups of chips; those of a group compute the same
    npu_chips: list[ChipResult]  # every chip of --npu
    layers: Layers | None  # None without --output-dir and with --layers 0
    baseline: Baseline | None  # None without --baseline
    compilation: str  # whether the networks were compiled, and why; "" with --onnx
    processor_share: float | None  # processor time of the networks over wall time times threads; None on a GPU
    stage_seconds: dict[str, float]  # stage -> wall time
    options: dict[str, Any]  # every option by its name with underscores, defaults included
    command: str  # the command line that repeats the run
    versions: dict[str, str]  # Python, and the packages that influence the metrics
    details: Details = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `result.json` holds."""
        content = dataclasses.asdict(dataclasses.replace(self, details=None))  # type: ignore[arg-type]
        del content["details"]
        return content

    @classmethod
    def from_json(cls, content: Any, details: Details) -> "Result":
        """Return the result of which `result.json` holds `content`; raise a ValueError if it is damaged."""
        return parse(cls, content, details=details)

    @property
    def names(self) -> BackendNames:
        """The names of the backends of the quantized network."""
        return BackendNames(self.precision)

    def describe_speed(self) -> str:
        """Return sentences on what the images per second are."""
        sentences = [
            f"Images/s: the network alone, wall time, {self.device}.",
            "The simulation's speed says nothing about a device.",
        ]
        if self.processor_share is not None and self.processor_share < BUSY:
            sentences.append(
                f"They are too low: the machine was busy, so that the networks got {100 * self.processor_share:.0f} % "
                "of the processor time of their threads."
            )
        return " ".join(sentences)

    @property
    def npus(self) -> dict[str, NpuResult]:
        """The results on the NPU by the name of the backend, which ends in a chip if there are several."""
        name = self.names.of(NPU)
        found = [npu for npu in (self.npu, *self.other_npus) if npu]
        return {f"{name}, {npu.chip}" if self.other_npus else name: npu for npu in found}

    @property
    def base(self) -> BackendResult:
        """The metrics of the first backend, which IoU changes refer to."""
        return next(iter(self.backends.values()))


def miou_change(mious: Mapping[str, float | None], backend: str) -> float | None:
    """Return how far `backend` is above FP32, in percentage points; None for FP32 and if a value is missing."""
    baseline, miou = mious.get(FP32), mious.get(backend)
    return None if backend == FP32 or baseline is None or miou is None else miou - baseline


def backend_results(scores: Scores, names: BackendNames, classes: Sequence[str]) -> dict[str, BackendResult]:
    """Return the metrics of every backend by its name; changes are those against FP32."""
    estimates = {name: statistics(matrices) for name, matrices in scores.confusion_matrices.items()}
    results = {}
    for name, found in estimates.items():
        base, matrix = estimates.get(FP32) if name != FP32 else None, scores.total(name)
        change = found.labelled_miou - base.labelled_miou if base else None
        ious = dict(zip(classes, found.ious, strict=True))
        iou_changes = _iou_changes(found, base, classes) if base else {}
        results[names.of(name)] = BackendResult(
            miou=percent(metrics.mean_iou(matrix)),
            miou_interval=found.miou.share_interval,
            labelled_miou=known(found.labelled_miou.value),
            change=known(change.value) if change else None,
            change_interval=change.interval if change else None,
            iou={label: percent(value) for label, value in zip(classes, metrics.iou(matrix), strict=True)},
            iou_interval={label: estimate.share_interval for label, estimate in ious.items()},
            iou_change={label: change.value for label, change in iou_changes.items()},
            iou_change_interval={label: change.interval for label, change in iou_changes.items()},
            pixel_accuracy=percent(metrics.pixel_accuracy(matrix)),
            images_per_second=scores.images / scores.seconds[name],
            confusion_matrix=matrix.tolist(),
        )
    return results


def _iou_changes(found: Statistics, base: Statistics, classes: Sequence[str]) -> dict[str, Estimate]:
    """Return the change of the IoU of every class with labelled pixels."""
    changes = zip(classes, found.ious, base.ious, strict=True)
    return {label: after - before for label, after, before in changes if after.images}


def class_counts(scores: Scores, label_set: LabelSet) -> dict[str, ClassCount]:
    """Return how many images and pixels have the label of each class."""
    labelled = next(iter(scores.confusion_matrices.values())).sum(2)  # the same for every backend
    images, pixels = (labelled > 0).sum(0).tolist(), labelled.sum(0).tolist()
    return {
        label.name: ClassCount(label.color, number, count, number < FEW_IMAGES)
        for label, number, count in zip(label_set.classes, images, pixels, strict=True)
    }


def is_counted(found: Result | NpuResult, scores: Scores, names: BackendNames) -> bool:
    """Return whether the metrics in a result are those of scores, apart from the times."""
    expected = backend_results(scores, names, list(found.classes))
    untimed = [{n: replace(e, images_per_second=0) for n, e in each.items()} for each in (found.backends, expected)]
    images = found.images if isinstance(found.images, int) else len(found.images)
    return untimed[0] == untimed[1] and found.agreement == agreement(scores, names) and images == scores.images


def definition_notes(backends: Mapping[str, BackendResult]) -> list[str]:
    """Return a note if a class that no label has was predicted, which the mIoU counts and changes do not."""
    if all(entry.miou is None or math.isclose(entry.miou, entry.labelled_miou or 0.0) for entry in backends.values()):
        return []
    values = ", ".join(f"{name} {format_number(entry.labelled_miou)}" for name, entry in backends.items())
    return [
        "Pixels were predicted as classes that no label has. As in the official script, such a class counts in the "
        "mIoU with an IoU of 0; changes leave it out. The mIoU over the classes with labelled pixels is, in percent: "
        f"{values}."
    ]


def recovery_notes(recovery: Recovery | None, simulated: BackendResult | None) -> list[str]:
    """Return a note if accuracy recovery met its target on the selection images and misses it on the scored ones."""
    if recovery is None or recovery.target is None or simulated is None or simulated.change is None:
        return []
    if not recovery.met or -simulated.change <= recovery.target:
        return []
    return [
        f"The mIoU drop on the scored images, {-simulated.change:.2f} percentage points, exceeds --max-drop "
        f"{recovery.target:g}, which was met on the selection images. Give more --selection-images or a smaller target."
    ]


def agreement(scores: Scores, names: BackendNames) -> dict[str, float]:
    """Return the prediction agreement of each pair of backends in percent, keyed "FP32|INT8 simulated"."""
    return {"|".join(map(names.of, pair)): scores.agreement(*pair) for pair in scores.agreeing_pixels}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that influence the metrics."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def processor_share(scores: Scores, device: str) -> float | None:
    """Return the processor time of the networks as a share of wall time times threads; None on a GPU.

    It is well below 1 if other processes used the processor meanwhile.
    """
    wall = sum(scores.seconds.values()) * torch.get_num_threads()
    return scores.processor_seconds / wall if device == "cpu" and wall else None


def processor_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device != "cpu":
        return f"CUDA, {torch.cuda.get_device_name(device)}"
    return f"CPU, {platform.processor() or platform.machine()}"


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    threads = f", {count(torch.get_num_threads(), 'thread')}" if device == "cpu" else ""
    return processor_name(device) + threads
