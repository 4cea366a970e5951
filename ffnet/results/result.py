"""The result of a run. Its fields are the documented schema of `result.json`."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ffnet.evaluation import metrics
from ffnet.evaluation.metrics import Interval, miou_intervals, percent
from ffnet.evaluation.scores import FP32, Scores
from ffnet.labels import CLASSES
from ffnet.onnx.divergence import LayerDivergence
from ffnet.quantization.recovery.search import Recovery
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.results.images import ImageComparison
from ffnet.system.schema import parse
from ffnet.system.text import count, list_names

DEMO_NOTE = "The project renders these street scenes itself: the metrics say nothing about Cityscapes."
PACKAGES = ("torch", "torchvision", "aimet-torch", "onnxruntime", "numpy", "scikit-image")


@dataclass(frozen=True)
class BackendResult:
    """The metrics of one backend over all images; None for a metric that is undefined."""

    miou: float | None  # percent, mean over the classes that occur
    miou_interval: Interval | None  # 95 % confidence interval of `miou` in percent
    drop_interval: Interval | None  # mIoU drop against FP32, percentage points; None for FP32 and without FP32
    iou: dict[str, float | None]  # class -> percent; None if the class occurs in neither labels nor predictions
    pixel_accuracy: float | None  # percent of the scored pixels
    images_per_second: float  # time in the network alone, without decoding and scoring
    confusion_matrix: list[list[int]]  # 19 rows of 19 pixel counts, row = label, column = prediction

    def iou_change(self, base: "BackendResult", label: str) -> float | None:
        """Return how far a class's IoU is above that in `base`, in percentage points; None if one is undefined."""
        before, after = base.iou[label], self.iou[label]
        return None if before is None or after is None else after - before


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
    description: str  # one or more sentences


@dataclass(frozen=True)
class NpuResult:
    """The evaluation on the NPU. All backends were scored again on the images that the NPU ran."""

    chip: str  # part name
    name: str  # marketing name
    soc_model: int  # Qualcomm's number of the chip
    architecture: str  # Hexagon architecture, such as "v79"
    hardware: bool  # whether an NPU in this PC ran the network; otherwise it was emulated
    version: str  # onnxruntime-qnn
    processes: int  # number of processes that ran images at the same time
    cpu_nodes: list[str]  # names of the nodes that ran on the CPU
    requested_images: int  # number of images to run; more than `images` if the evaluation ended early
    images: list[str]  # names of the images that were scored
    backends: dict[str, BackendResult]  # evaluation order: the others, then the NPU
    agreement: dict[str, float]  # "FP32|INT8 NPU" -> percent of pixels with equal predictions
    published: dict[str, float]  # backend -> mIoU that Qualcomm AI Hub published if it is comparable, percent

    def describe(self) -> str:
        """Return a sentence on what ran the network, on how many images and with which nodes on the CPU."""
        how = "this PC's NPU, driven" if self.hardware else f"the NPU of {self.chip} ({self.name}), emulated"
        early = ", and then ended early" if len(self.images) < self.requested_images else ""
        nodes = f"Nodes that ran on the CPU: {list_names(self.cpu_nodes, most=50) or 'none'}."
        return (
            f"{how} by onnxruntime-qnn {self.version}, ran {len(self.images)} of "
            f"{count(self.requested_images, 'image')}{early}. {nodes}"
        )


@dataclass(frozen=True)
class Diagnostics:
    """Which images and quantizers cost accuracy; shown by the report and not in `result.json`."""

    worst_images: tuple[ImageComparison, ...] = ()
    sensitivity: Sensitivity | None = None
    npu_layers: tuple[LayerDivergence, ...] = ()


@dataclass(frozen=True)
class Details:
    """What the report and the exit status need beside the fields of `result.json`."""

    scores: Scores
    image_names: tuple[str, ...]  # <city>_<sequence>_<frame>, in the order of `scores`
    image_size: tuple[int, int]  # height, width in pixels
    diagnostics: Diagnostics = Diagnostics()
    failure: BaseException | None = None  # what ended the run after the images were scored, if anything did
    written: bool = False  # whether the files of the result are there already, from the run that is resumed


@dataclass(frozen=True)
class Result:
    """The result of one run, written to `result.json` without `details`."""

    model: str  # name of the variant, or path of the ONNX file
    dataset: str
    images: int  # number of images scored
    device: str
    notes: list[str]  # sentences to read with the metrics
    published: dict[str, float]  # backend -> published mIoU on Cityscapes val if it is comparable, percent
    checkpoint: CheckpointInfo | None  # None for --onnx
    calibration: Calibration | None  # None for --onnx
    recovery: Recovery | None  # None without --seq-mse, --adaround and --max-drop
    backends: dict[str, BackendResult]  # evaluation order: FP32 first, or the ONNX file alone
    agreement: dict[str, float]  # "FP32|INT8 simulated" -> percent of pixels with equal predictions
    npu: NpuResult | None  # None without --npu, and if the NPU finished no image
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
    def base(self) -> BackendResult:
        """The metrics of the first backend, which IoU changes refer to."""
        return next(iter(self.backends.values()))


def miou_drop(mious: Mapping[str, float | None], backend: str) -> float | None:
    """Return how far `backend` is below FP32, in percentage points; None for FP32 and if a value is missing."""
    baseline, miou = mious.get(FP32), mious.get(backend)
    return None if backend == FP32 or baseline is None or miou is None else baseline - miou


def miou_drops(backends: Mapping[str, BackendResult]) -> dict[str, float | None]:
    """Return the mIoU drop of every backend against FP32, as `miou_drop` does."""
    mious = {name: entry.miou for name, entry in backends.items()}
    return {name: miou_drop(mious, name) for name in backends}


def backend_results(scores: Scores) -> dict[str, BackendResult]:
    """Return the metrics of every backend."""
    results = {}
    for name, intervals in miou_intervals(scores.confusion_matrices, FP32).items():
        matrix = scores.total(name)
        results[name] = BackendResult(
            miou=percent(metrics.mean_iou(matrix)),
            miou_interval=intervals.miou,
            drop_interval=intervals.drop,
            iou={label: percent(value) for label, value in zip(CLASSES, metrics.iou(matrix), strict=True)},
            pixel_accuracy=percent(metrics.pixel_accuracy(matrix)),
            images_per_second=scores.images / scores.seconds[name],
            confusion_matrix=matrix.tolist(),
        )
    return results


def is_counted(found: Result | NpuResult, scores: Scores) -> bool:
    """Return whether the metrics in a result are those of scores, apart from the times."""
    expected = backend_results(scores)
    untimed = [{n: replace(e, images_per_second=0) for n, e in each.items()} for each in (found.backends, expected)]
    images = found.images if isinstance(found.images, int) else len(found.images)
    return untimed[0] == untimed[1] and found.agreement == agreement(scores) and images == scores.images


def agreement(scores: Scores) -> dict[str, float]:
    """Return the prediction agreement of each pair of backends in percent, keyed "FP32|INT8 simulated"."""
    return {"|".join(pair): scores.agreement(*pair) for pair in scores.agreeing_pixels}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that influence the metrics."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def processor_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device != "cpu":
        return f"CUDA, {torch.cuda.get_device_name(device)}"
    return f"CPU, {platform.processor() or platform.machine()}"


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    threads = f", {count(torch.get_num_threads(), 'thread')}" if device == "cpu" else ""
    return processor_name(device) + threads
