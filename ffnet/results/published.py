"""Published mIoU beside that of a run, if both were measured alike; otherwise what differs. Needs no torch.

Two results are compared only if their images are alike. A quantized one also needs the same quantization.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ffnet.config import Config
from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.system.text import count
from ffnet.variants import INPUT_SIZE, Variant


@dataclass(frozen=True)
class ImageSetup:
    """The images that an mIoU was measured on."""

    split: str
    number: int
    size: tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class QuantizationSetup:
    """How a network was quantized; None for what is unknown or does not apply, which is not compared."""

    param_bw: int
    output_bw: int
    from_file: bool  # the encodings were loaded
    quant_scheme: str | None = None
    config_file: str | None = None
    cle: bool | None = None
    calibration: tuple[int, str] | None = None  # number of images, and their split
    recovered: bool = False  # ranges, rounding or bit widths were searched to win accuracy back


# How FFNet's authors measured FP32 on Cityscapes, and the AIMET model zoo INT8.
PUBLISHED_IMAGES = ImageSetup("val", 500, INPUT_SIZE)
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
    """Published results of one model, and how they were measured."""

    mious: Mapping[str, float | None]  # backend -> percent; None if none was published
    images: ImageSetup
    quantization: QuantizationSetup
    origin: str  # what stands before the values: "Published mIoU of this model"
    described: str  # the images in words, after the values: "on 50 images"


@dataclass(frozen=True)
class Comparison:
    """What a report shows of published results."""

    mious: Mapping[str, float] = field(default_factory=dict)  # backend -> percent, of comparable backends
    notes: Sequence[str] = ()  # at most one, on the values that are not comparable


def quantization_setup(config: Config, calibration_images: int = 0, equalized: bool = False) -> QuantizationSetup:
    """Return the quantization of a run.

    Args:
        config: of the run.
        calibration_images: their number; 0 if it is unknown or if all encodings were loaded from a file.
        equalized: whether the checkpoint already was equalized.
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
    values, others = dataclasses.asdict(run), dataclasses.asdict(published)
    return [
        describe(values[name])
        for name, describe in DIFFERENCES.items()
        if name in values and None not in (values[name], others[name]) and values[name] != others[name]
    ]


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
    note = (
        f"{published.origin}: {others}, {published.described}. Not comparable with this run, which has "
        f"{join_phrases(max(differing.values(), key=len))}."
    )
    return Comparison(comparable, [note])


def compare_with_variant(variant: Variant, images: ImageSetup, quantization: QuantizationSetup) -> Comparison:
    """Compare a run on Cityscapes with what was published for its variant."""
    mious = {FP32: variant.published.fp32, INT8_SIMULATED: variant.published.int8}
    described = f"on all {PUBLISHED_IMAGES.number} images of Cityscapes val"
    origin = "Published mIoU of this model"
    published = PublishedResults(mious, PUBLISHED_IMAGES, PUBLISHED_QUANTIZATION, origin, described)
    return compare_with_published(published, images, quantization)


def join_phrases(phrases: Sequence[str]) -> str:
    """Return phrases as one enumeration: "a, b and c"."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last
