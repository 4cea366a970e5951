"""What was published for a variant, and whether it is comparable with a run. Needs no torch.

FFNet's authors published the mIoU in FP32, the AIMET model zoo that in INT8 (both in `ffnet.variants`), and Qualcomm AI
Hub the mIoU and the latency on devices (`ai_hub.json`). A published mIoU is comparable with a run on the same number of
images of the same size; one in INT8 also needs the same quantization.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffnet.config import Config
from ffnet.evaluation.scores import FP32, INT8_NPU, INT8_SIMULATED
from ffnet.system.text import count, format_number
from ffnet.variants import INPUT_SIZE, Variant

_AI_HUB = json.loads(Path(__file__).with_name("ai_hub.json").read_text("utf-8"))
SOURCE: str = _AI_HUB["source"]
MIOU_IMAGES: int = _AI_HUB["miou_images"]  # number of images on which AI Hub measured the mIoU
GALAXY_S25: str = _AI_HUB["miou_chip"]  # part name of the chip on which it did
DEVICES: dict[str, str] = _AI_HUB["devices"]  # part name of the chip -> device
RUNTIMES = {"tflite": "TFLite", "dlc": "DLC", "onnx": "ONNX"}  # key in ai_hub.json -> name


@dataclass(frozen=True)
class DeviceResult:
    """What AI Hub published for a variant: its mIoU on a Galaxy S25, and its latency on one device."""

    device: str  # where the latency was measured
    input_size: tuple[int, int]  # height and width of AI Hub's images
    float_miou: float  # percent
    w8a8_miou: Mapping[str, float | None]  # key of RUNTIMES -> percent
    latency: Mapping[str, float | None]  # key of RUNTIMES -> milliseconds, W8A8; None if none was published

    @property
    def fastest(self) -> float | None:
        """The latency of the fastest runtime; None if none was published."""
        return min((value for value in self.latency.values() if value is not None), default=None)

    def describe_latency(self) -> str:
        """Return the latency of each runtime with one decimal and slashes between them."""
        return "/".join(format_number(value, 1) for value in self.latency.values())


def ai_hub_result(name: str, chip: str | None = None) -> DeviceResult | None:
    """Return what AI Hub published for a variant; None if it has not published the variant.

    The latency is that on the chip with this part name or, if AI Hub did not measure it there, on a Galaxy S25.
    """
    model = _AI_HUB["models"].get(name)
    if model is None:
        return None
    measured = chip if chip in DEVICES else GALAXY_S25
    latency, size = model["w8a8_latency_ms"][measured], tuple(model["input_size"])
    return DeviceResult(DEVICES[measured], size, model["float_miou"], model["w8a8_miou"], latency)


@dataclass(frozen=True)
class ImageSetup:
    """The images that an mIoU was measured on."""

    split: str
    number: int
    size: tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class QuantizationSetup:
    """How a network was quantized. None stands for what is unknown or does not apply, and is not compared."""

    param_bw: int
    output_bw: int
    from_file: bool  # the encodings were loaded
    quant_scheme: str | None = None
    config_file: str | None = None
    cle: bool | None = None
    calibration: tuple[int, str] | None = None  # number of images, and their split
    recovered: bool = False  # with accuracy recovery


PUBLISHED_IMAGES = ImageSetup("val", 500, INPUT_SIZE)  # images of the values in `ffnet.variants`
PUBLISHED_QUANTIZATION = QuantizationSetup(8, 8, False, "tf_enhanced", "default", True, (500, "val"))

DIFFERENCES: dict[str, Callable[[Any], str]] = {  # field -> what a run with this value has; after "which has"
    "number": lambda number: count(number, "image"),
    "split": "the {} split".format,
    "size": lambda size: "an image size of {}x{}".format(*size),
    "param_bw": "{}-bit weights".format,
    "output_bw": "{}-bit activations".format,
    "from_file": lambda _: "the encodings of a file",
    "quant_scheme": "the quantization scheme {}".format,
    "config_file": "the quantization configuration {}".format,
    "cle": lambda _: "no cross-layer equalization",
    "recovered": lambda _: "accuracy recovery",
    "calibration": lambda images: f"{count(images[0], 'calibration image')} of the {images[1]} split",
}


@dataclass(frozen=True)
class PublishedResults:
    """Published mIoUs of one model, and how they were measured."""

    mious: Mapping[str, float | None]  # backend -> percent; None if none was published
    images: ImageSetup
    quantization: QuantizationSetup
    origin: str  # text before the values, such as "Published mIoU of this model"
    described: str  # text after the values: the images, such as "on 50 images"


@dataclass(frozen=True)
class Comparison:
    """What a report shows of published mIoUs."""

    mious: Mapping[str, float] = field(default_factory=dict)  # backend -> percent, of comparable backends
    notes: Sequence[str] = ()  # at most one, on the values that are not comparable


def quantization_setup(config: Config, calibration_images: int = 0, equalized: bool = False) -> QuantizationSetup:
    """Return the quantization of a run, whose checkpoint may already have been `equalized`.

    `calibration_images` is 0 if their number is unknown or if all encodings were loaded from a file.
    """
    options = config.quantization
    return QuantizationSetup(
        param_bw=options.param_bw,
        output_bw=options.output_bw,
        from_file=options.encodings is not None,
        quant_scheme=options.quant_scheme,
        config_file=options.config_file,
        cle=options.cle or equalized,
        calibration=(calibration_images, config.data.calibration_split) if calibration_images else None,
        recovered=options.recovers,
    )


def differences(run: ImageSetup | QuantizationSetup, published: ImageSetup | QuantizationSetup) -> list[str]:
    """Return what a run has and the published results do not, as phrases that follow "which has"."""
    pairs = {name: (value, getattr(published, name)) for name, value in vars(run).items()}
    differing = {name for name, (value, other) in pairs.items() if None not in (value, other) and value != other}
    return [describe(pairs[name][0]) for name, describe in DIFFERENCES.items() if name in differing]


def compare_with_published(
    published: PublishedResults, images: ImageSetup, quantization: QuantizationSetup
) -> Comparison:
    """Return the published values that are comparable with a run's, and a note on those that are not."""
    values = {name: miou for name, miou in published.mious.items() if miou is not None}
    by_images = differences(images, published.images)
    by_both = by_images + differences(quantization, published.quantization)
    differing = {name: by_images if name == FP32 else by_both for name in values}
    comparable = {name: miou for name, miou in values.items() if not differing[name]}
    others = " and ".join(f"{miou:.1f} % in {name}" for name, miou in values.items() if differing[name])
    if not others:
        return Comparison(comparable)
    *phrases, last = max(differing.values(), key=len)
    named = f"{', '.join(phrases)} and {last}" if phrases else last
    note = f"{published.origin}: {others}, {published.described}. Not comparable with this run, which has {named}."
    return Comparison(comparable, [note])


def compare_with_variant(variant: Variant, images: ImageSetup, quantization: QuantizationSetup) -> Comparison:
    """Compare a run on Cityscapes with what was published for its variant."""
    mious = {FP32: variant.published.fp32, INT8_SIMULATED: variant.published.int8}
    described = f"on all {PUBLISHED_IMAGES.number} images of Cityscapes val"
    published = PublishedResults(
        mious, PUBLISHED_IMAGES, PUBLISHED_QUANTIZATION, "Published mIoU of this model", described
    )
    return compare_with_published(published, images, quantization)


def compare_with_ai_hub(config: Config, images: ImageSetup) -> Comparison:
    """Compare a run on the NPU with the mIoU that AI Hub published for a Galaxy S25.

    AI Hub does not say which images it used and how it calibrated, so only the number and the size of the images and
    the bit widths are compared.
    """
    result = ai_hub_result(config.model.name)
    if result is None or config.npu.chip != GALAXY_S25 or config.model.onnx or config.data.demo:
        return Comparison()
    published = PublishedResults(
        {FP32: result.float_miou, INT8_NPU: result.w8a8_miou["onnx"]},
        ImageSetup("val", MIOU_IMAGES, result.input_size),
        QuantizationSetup(8, 8, from_file=False),
        f"{SOURCE}: mIoU of this model on {result.device} by ONNX",
        "on {} images of {}x{} pixels".format(MIOU_IMAGES, *result.input_size),
    )
    return compare_with_published(published, images, quantization_setup(config))


def ai_hub_notes(config: Config) -> list[str]:
    """Return a note on the latency that AI Hub published for the model and the chip of a run, if it did."""
    result = ai_hub_result(config.model.name, config.npu.chip)
    if result is None or config.npu.chip not in DEVICES or config.model.onnx:
        return []
    times = "/".join("-" if value is None else f"{value:g}" for value in result.latency.values())
    size = "{}x{}".format(*result.input_size)
    return [
        f"{SOURCE}: latency of this model, W8A8 at {size}, on {result.device} by TFLite/DLC/ONNX: {times} ms. An "
        "emulation tells nothing about latency."
    ]
