"""What was published for a variant, and whether it is comparable with a run. Needs no torch.

FFNet's authors published the mIoU in FP32, the AIMET model zoo that in INT8 (both in `ffnet.variants`), and Qualcomm AI
Hub the mIoU and the latency on devices (`ai_hub.json`). A published mIoU is comparable with a run on the same number of
images of the same size; one in INT8 also needs the same quantization.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ffnet.chips import ALIASES
from ffnet.config import Config, QuantizationConfig
from ffnet.evaluation.scores import FP32, NPU, SIMULATED, BackendNames
from ffnet.system.text import count, describe_size, format_number
from ffnet.variants import INPUT_SIZE, VARIANTS

_AI_HUB = json.loads(Path(__file__).with_name("ai_hub.json").read_text("utf-8"))  # written by ffnet.results.ai_hub
SOURCE: str = _AI_HUB["source"]
MIOU_DEVICE: str = next(iter(_AI_HUB["devices"]))  # device on which AI Hub measured the mIoU
MIOU_IMAGES: int = next(iter(_AI_HUB["models"].values()))["miou_images"]  # number of images that it was measured on
RUNTIMES = {"tflite": "TFLite", "qnn_dlc": "DLC", "onnx": "ONNX"}  # key in ai_hub.json -> name


@dataclass(frozen=True)
class DeviceResult:
    """What AI Hub published for a variant: its mIoU on MIOU_DEVICE, and its latency on one device."""

    device: str  # where the latency was measured
    input_size: tuple[int, int]  # height and width of AI Hub's images
    miou_images: int  # number of images that the mIoU was measured on
    float_miou: float  # percent
    w8a8_miou: Mapping[str, float]  # key of RUNTIMES -> percent
    latency: Mapping[str, float]  # key of RUNTIMES -> milliseconds, W8A8; without those that were not published

    @property
    def fastest(self) -> float | None:
        """The latency of the fastest runtime; None if none was published."""
        return min(self.latency.values(), default=None)

    @property
    def measured_change(self) -> float | None:
        """The mIoU change by ONNX, W8A8 against float, in percentage points; None if not measured on the device."""
        return round(self.w8a8_miou["onnx"] - self.float_miou, 1) if self.device == MIOU_DEVICE else None

    def describe_latency(self) -> str:
        """Return the latency of each runtime with one decimal and slashes between them."""
        return "/".join(format_number(self.latency.get(key), 1) for key in RUNTIMES)


def devices_with(chip: str | None) -> list[str]:
    """Return the names of AI Hub's devices with the chip of this part name, those that were measured first."""
    return [device for device, part in _AI_HUB["devices"].items() if ALIASES.get(part, part) == chip]


def ai_hub_result(name: str, chip: str | None = None) -> DeviceResult | None:
    """Return what AI Hub published for a variant; None if it has not published the variant.

    The latency is that on a device with the chip of this part name or, if there is none, on MIOU_DEVICE.
    """
    model = _AI_HUB["models"].get(name)
    if model is None:
        return None
    latency = model["latency_ms"]["w8a8"]
    device = next((device for device in devices_with(chip) if device in latency), MIOU_DEVICE)
    size, mious = tuple(model["input_size"]), (model["float_miou"], model["w8a8_miou"])
    return DeviceResult(device, size, model["miou_images"], *mious, latency[device])


def ai_hub_result_on(chip: str, config: Config) -> DeviceResult | None:
    """Return what AI Hub published for the model of a run; None if it measured it on no device with this chip."""
    result = None if config.model.onnx else ai_hub_result(config.model.name, chip)
    return result if result and result.device in devices_with(chip) else None


@dataclass(frozen=True)
class ImageSetup:
    """The images that an mIoU was measured on."""

    split: str
    number: int
    size: tuple[int, int] | None  # height, width in pixels; None if they differ


PUBLISHED_IMAGES = ImageSetup("val", 500, INPUT_SIZE)  # for the values in `ffnet.variants`, as the next two lines


@dataclass(frozen=True)
class CalibrationSetup:
    """What the ranges of activations were found on."""

    number: int  # number of images
    split: str
    batch_size: int | None  # TF-Enhanced takes the range of its histograms from the first batch; None if unknown

    def differences(self, published: "CalibrationSetup") -> list[str]:
        """Return what this calibration has and a published one does not, as phrases that follow "which has"."""
        images = f"{count(self.number, 'calibration image')} of the {self.split} split"
        batches = f"calibration batches of {count(self.batch_size or 0, 'image')}"
        differs = {
            images: (self.number, self.split) != (published.number, published.split),
            batches: None not in (self.batch_size, published.batch_size) and self.batch_size != published.batch_size,
        }
        return [phrase for phrase, differing in differs.items() if differing]


PUBLISHED_CALIBRATION = CalibrationSetup(500, "val", 8)
AI_HUB_CALIBRATION = CalibrationSetup(100, "train", None)
PUBLISHED_QUANTIZATION = QuantizationConfig()
INT8 = BackendNames()  # the published quantized networks are W8A8


@dataclass(frozen=True)
class Comparison:
    """What a report shows of published mIoUs."""

    mious: Mapping[str, float] = field(default_factory=dict)  # backend -> percent, of comparable backends
    notes: Sequence[str] = ()  # at most one, on the values that are not comparable


def image_differences(run: ImageSetup, published: ImageSetup) -> list[str]:
    """Return what a run's images have and the published ones do not, as phrases that follow "which has"."""
    phrases = {
        "number": count(run.number, "image"),
        "split": f"the {run.split} split",
        "size": f"an image size of {describe_size(run.size)}",
    }
    return [phrase for name, phrase in phrases.items() if getattr(run, name) != getattr(published, name)]


def quantization_differences(
    run: QuantizationConfig,
    equalized: bool = False,
    calibration: CalibrationSetup | None = None,
    published_calibration: CalibrationSetup = PUBLISHED_CALIBRATION,
) -> list[str]:
    """Return what a run's quantization has and PUBLISHED_QUANTIZATION does not, as phrases that follow "which has".

    The checkpoint may already have been `equalized`. The calibration is None if all encodings were loaded from a file.
    """
    published = PUBLISHED_QUANTIZATION
    differs = {
        f"{run.param_bw}-bit weights": run.param_bw != published.param_bw,
        f"{run.output_bw}-bit activations": run.output_bw != published.output_bw,
        "the encodings of a file": run.encodings is not None,
        f"the quantization scheme {run.quant_scheme}": run.quant_scheme != published.quant_scheme,
        f"the quantization configuration {run.config_file}": run.config_file != published.config_file,
        "no cross-layer equalization": not (run.cle or equalized),
        "accuracy recovery": run.recovers,
    }
    phrases = [phrase for phrase, differing in differs.items() if differing]
    return phrases + (calibration.differences(published_calibration) if calibration else [])


def compare_with_published(
    mious: Mapping[str, float | None], by_images: list[str], by_quantization: list[str], origin: str, described: str
) -> Comparison:
    """Return the published values that are comparable with a run's, and a note on those that are not.

    Args:
        mious: Backend -> published mIoU in percent; None if none was published.
        by_images: `image_differences`, which concern all backends.
        by_quantization: `quantization_differences`, which concern all but FP32.
        origin: Text before the values, such as "Published mIoU of this model".
        described: Text after the values: the images, such as "on 50 images".
    """
    values = {name: miou for name, miou in mious.items() if miou is not None}
    differing = {name: by_images if name == FP32 else by_images + by_quantization for name in values}
    comparable = {name: miou for name, miou in values.items() if not differing[name]}
    others = " and ".join(f"{miou:.1f} % in {name}" for name, miou in values.items() if differing[name])
    if not others:
        return Comparison(comparable)
    *phrases, last = max(differing.values(), key=len)
    named = f"{', '.join(phrases)} and {last}" if phrases else last
    note = f"{origin}: {others}, {described}. Not comparable with this run, which has {named}."
    return Comparison(comparable, [note])


def compare_with_variant(
    config: Config, images: ImageSetup, calibration: CalibrationSetup | None, equalized: bool
) -> Comparison:
    """Compare a run on Cityscapes with what was published for its variant.

    The calibration is None if all encodings came from a file. The checkpoint may already have been `equalized`.
    """
    published = VARIANTS[config.model.name].published
    return compare_with_published(
        {FP32: published.fp32, INT8.of(SIMULATED): published.int8},
        image_differences(images, PUBLISHED_IMAGES),
        quantization_differences(config.quantization, equalized, calibration),
        "Published mIoU of this model",
        f"on all {PUBLISHED_IMAGES.number} images of Cityscapes val",
    )


def compare_with_ai_hub(
    config: Config, chips: Sequence[str], images: ImageSetup, available: int, calibration: CalibrationSetup | None
) -> Comparison:
    """Compare a result of the NPU of some chips with the mIoU that AI Hub published for MIOU_DEVICE.

    The images of the run were chosen from the `available` ones of its split. AI Hub does not say which quantization
    scheme it uses, so only the bit widths and the calibration images are compared.
    """
    result = ai_hub_result(config.model.name)
    on_device = any(MIOU_DEVICE in devices_with(chip) for chip in chips)
    if result is None or not on_device or config.model.onnx or not config.data.is_cityscapes:
        return Comparison()
    by_images = image_differences(images, ImageSetup("val", result.miou_images, result.input_size))
    if not by_images and available != PUBLISHED_IMAGES.number:
        by_images = [f"images chosen from {available}"]
    unknown = {name: getattr(PUBLISHED_QUANTIZATION, name) for name in ("quant_scheme", "config_file", "cle")}
    quantization = replace(config.quantization, **unknown)
    return compare_with_published(
        {FP32: result.float_miou, INT8.of(NPU): result.w8a8_miou["onnx"]},
        by_images,
        quantization_differences(quantization, False, calibration, AI_HUB_CALIBRATION),
        f"{SOURCE}: mIoU of this model on a {MIOU_DEVICE} by ONNX",
        "on {} images of {}x{} pixels, calibrated on {} images of {}".format(
            result.miou_images, *result.input_size, AI_HUB_CALIBRATION.number, AI_HUB_CALIBRATION.split
        ),
    )


def ai_hub_notes(config: Config) -> list[str]:
    """Return a note on what AI Hub measured with the model and the chip of a run; a table shows that of several."""
    result = ai_hub_result_on(config.npu.chips[0], config) if len(config.npu.chips) == 1 else None
    if result is None:
        return []
    note = (
        f"{SOURCE}: latency of this model, W8A8 at {'{}x{}'.format(*result.input_size)}, on a {result.device} by "
        f"{'/'.join(RUNTIMES.values())}: {result.describe_latency()} ms. An emulation tells nothing about latency."
    )
    if (change := result.measured_change) is not None:
        note += f" The mIoU changed there by {change:+.1f} percentage points, W8A8 by ONNX against float."
    return [note]
