"""What was published for a variant, and whether it is comparable with a run. Needs no torch.

FFNet's authors published the mIoU in FP32, the AIMET model zoo that in INT8 (both in `ffnet.variants`), and Qualcomm AI
Hub the mIoU and the latency on devices (`ai_hub.json`). A published mIoU is comparable with a run on the same number of
images of the same size; one in INT8 also needs the same quantization.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ffnet.config import Config, QuantizationConfig
from ffnet.evaluation.scores import FP32, INT8_NPU, INT8_SIMULATED
from ffnet.system.text import count, format_number
from ffnet.variants import INPUT_SIZE, VARIANTS

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


PUBLISHED_IMAGES = ImageSetup("val", 500, INPUT_SIZE)  # for the values in `ffnet.variants`, as the next two lines
PUBLISHED_CALIBRATION = (500, "val")  # number of images, and their split
PUBLISHED_QUANTIZATION = QuantizationConfig()


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
        "size": "an image size of {}x{}".format(*run.size),
    }
    return [phrase for name, phrase in phrases.items() if getattr(run, name) != getattr(published, name)]


def quantization_differences(
    run: QuantizationConfig, equalized: bool = False, calibration: tuple[int, str] | None = None
) -> list[str]:
    """Return what a run's quantization has and PUBLISHED_QUANTIZATION does not, as phrases that follow "which has".

    The checkpoint may already have been `equalized`. `calibration` is the number of images and their split; None if it
    is unknown or if all encodings were loaded from a file.
    """
    published = PUBLISHED_QUANTIZATION
    number, split = calibration or PUBLISHED_CALIBRATION
    differs = {
        f"{run.param_bw}-bit weights": run.param_bw != published.param_bw,
        f"{run.output_bw}-bit activations": run.output_bw != published.output_bw,
        "the encodings of a file": run.encodings is not None,
        f"the quantization scheme {run.quant_scheme}": run.quant_scheme != published.quant_scheme,
        f"the quantization configuration {run.config_file}": run.config_file != published.config_file,
        "no cross-layer equalization": not (run.cle or equalized),
        "accuracy recovery": run.recovers,
        f"{count(number, 'calibration image')} of the {split} split": (number, split) != PUBLISHED_CALIBRATION,
    }
    return [phrase for phrase, differing in differs.items() if differing]


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


def compare_with_variant(config: Config, images: ImageSetup, calibration_images: int, equalized: bool) -> Comparison:
    """Compare a run on Cityscapes with what was published for its variant.

    `calibration_images` is 0 if all encodings came from a file. The checkpoint may already have been `equalized`.
    """
    published = VARIANTS[config.model.name].published
    calibration = (calibration_images, config.data.calibration_split) if calibration_images else None
    return compare_with_published(
        {FP32: published.fp32, INT8_SIMULATED: published.int8},
        image_differences(images, PUBLISHED_IMAGES),
        quantization_differences(config.quantization, equalized, calibration),
        "Published mIoU of this model",
        f"on all {PUBLISHED_IMAGES.number} images of Cityscapes val",
    )


def compare_with_ai_hub(config: Config, images: ImageSetup) -> Comparison:
    """Compare a run on the NPU with the mIoU that AI Hub published for a Galaxy S25.

    AI Hub does not say which images it used and how it calibrated, so only the number and the size of the images and
    the bit widths are compared.
    """
    result = ai_hub_result(config.model.name)
    if result is None or config.npu.chip != GALAXY_S25 or config.model.onnx or config.data.demo:
        return Comparison()
    unknown = {name: getattr(PUBLISHED_QUANTIZATION, name) for name in ("quant_scheme", "config_file", "cle")}
    return compare_with_published(
        {FP32: result.float_miou, INT8_NPU: result.w8a8_miou["onnx"]},
        image_differences(images, ImageSetup("val", MIOU_IMAGES, result.input_size)),
        quantization_differences(replace(config.quantization, **unknown)),
        f"{SOURCE}: mIoU of this model on {result.device} by ONNX",
        "on {} images of {}x{} pixels".format(MIOU_IMAGES, *result.input_size),
    )


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
