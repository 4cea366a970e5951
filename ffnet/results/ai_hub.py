"""What Qualcomm AI Hub measured with FFNets on real devices. Needs no torch.

Source: Qualcomm AI Hub, release of February 2026.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "Qualcomm AI Hub, release of February 2026"
MIOU_IMAGES = 50  # on which AI Hub measured the mIoU
GALAXY_S25 = "sm8750"  # its chip
DEVICES = {  # by the part name of their chip, as in ffnet.chips
    GALAXY_S25: "Snapdragon 8 Elite (Galaxy S25)",
    "sm8850": "Snapdragon 8 Elite Gen 5",
    "sm8650": "Snapdragon 8 Gen 3 (Galaxy S24)",
    "sc8380xp": "Snapdragon X Elite",
    "qcs6490": "QCS6490 (RB3 Gen 2)",
}


@dataclass(frozen=True)
class ByRuntime:
    """One value by each of the three runtimes; None if none was published."""

    tflite: float | None
    dlc: float | None
    onnx: float | None


@dataclass(frozen=True)
class ModelResults:
    """What AI Hub published of one variant."""

    input_size: tuple[int, int]  # height, width of the images that AI Hub feeds
    float_miou: float  # percent, on the Galaxy S25 like the W8A8 values
    w8a8_miou: ByRuntime
    latency: Mapping[str, ByRuntime]  # of W8A8, in milliseconds, by the part name of the chip


@dataclass(frozen=True)
class DeviceResult:
    """What AI Hub published of one variant on one device: mIoU in percent, latency of W8A8 in milliseconds."""

    device: str
    input_size: tuple[int, int]
    float_miou: float
    w8a8_miou: ByRuntime
    latency: ByRuntime


@dataclass(frozen=True)
class PublishedLatency:
    """The latency of one variant in W8A8 on one device."""

    device: str
    input_size: tuple[int, int]  # height, width of the images that AI Hub fed
    milliseconds: ByRuntime

    @property
    def fastest(self) -> float | None:
        """The latency of the fastest runtime in milliseconds; None if none was published."""
        runtimes = (self.milliseconds.tflite, self.milliseconds.dlc, self.milliseconds.onnx)
        return min((value for value in runtimes if value is not None), default=None)


FULL_SIZE, HALF_SIZE = (1024, 2048), (512, 1024)
RESULTS = {
    "segmentation_ffnet40S_dBBB_mobile": ModelResults(
        FULL_SIZE,
        76.8,
        ByRuntime(76.6, 76.4, 76.5),
        {
            "sm8750": ByRuntime(4.0, 7.2, 6.8),
            "sm8850": ByRuntime(2.9, 5.2, 3.8),
            "sm8650": ByRuntime(5.4, 10.6, 6.8),
            "sc8380xp": ByRuntime(None, 16.0, 10.3),
            "qcs6490": ByRuntime(52, 67, 361),
        },
    ),
    "segmentation_ffnet54S_dBBB_mobile": ModelResults(
        FULL_SIZE,
        78.1,
        ByRuntime(77.9, 77.9, 77.8),
        {
            "sm8750": ByRuntime(4.4, 7.5, 7.2),
            "sm8850": ByRuntime(3.2, 5.5, 4.1),
            "sm8650": ByRuntime(5.9, 11.2, 7.3),
            "sc8380xp": ByRuntime(None, 16.8, None),
            "qcs6490": ByRuntime(56, 72, 409),
        },
    ),
    "segmentation_ffnet78S_dBBB_mobile": ModelResults(
        FULL_SIZE,
        79.9,
        ByRuntime(79.8, 79.5, 79.5),
        {
            "sm8750": ByRuntime(5.0, 8.0, 6.0),
            "sm8850": ByRuntime(3.6, 5.9, 4.5),
            "sm8650": ByRuntime(6.5, 11.7, 7.9),
            "sc8380xp": ByRuntime(None, 17.6, 12.2),
            "qcs6490": ByRuntime(57, 73, 488),
        },
    ),
    "segmentation_ffnet78S_BCC_mobile_pre_down": ModelResults(  # AI Hub's FFNet-78S-LowRes
        HALF_SIZE,
        63.6,
        ByRuntime(63.6, 63.6, 63.7),
        {
            "sm8750": ByRuntime(1.5, 2.3, 1.8),
            "sm8850": ByRuntime(1.3, 1.8, 1.5),
            "sm8650": ByRuntime(2.0, 3.4, 2.2),
            "sc8380xp": ByRuntime(None, 5.0, 2.9),
            "qcs6490": ByRuntime(9.5, 15, 109),
        },
    ),
    "segmentation_ffnet122NS_CCC_mobile_pre_down": ModelResults(  # AI Hub's FFNet-122NS-LowRes
        HALF_SIZE,
        61.9,
        ByRuntime(61.4, 61.3, 61.4),
        {
            "sm8750": ByRuntime(1.5, 2.2, 1.7),
            "sm8850": ByRuntime(1.3, 1.8, 1.5),
            "sm8650": ByRuntime(1.9, 3.2, 2.0),
            "sc8380xp": ByRuntime(None, 4.8, 2.8),
            "qcs6490": ByRuntime(9.2, 14, 92),
        },
    ),
}


def galaxy_s25(name: str) -> DeviceResult | None:
    """Return what AI Hub measured with a variant on a Galaxy S25; None if it has not published the variant."""
    results = RESULTS.get(name)
    if results is None:
        return None
    latency = results.latency[GALAXY_S25]
    return DeviceResult(DEVICES[GALAXY_S25], results.input_size, results.float_miou, results.w8a8_miou, latency)


def published_latency(name: str, chip: str | None) -> PublishedLatency | None:
    """Return the latency of a variant; None if AI Hub has not published the variant.

    Args:
        name: of the variant.
        chip: part name of the chip that the latency is wanted for. If AI Hub has none of it, or if it is None, the
            latency is that on the Galaxy S25.
    """
    results = RESULTS.get(name)
    if results is None:
        return None
    measured = chip if chip in DEVICES else GALAXY_S25
    return PublishedLatency(DEVICES[measured], results.input_size, results.latency[measured])
