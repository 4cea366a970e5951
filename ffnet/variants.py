"""The FFNet variants: what their names mean, their backbones and heads, and the published results. Needs no torch.

A name is `segmentation_ffnet{depth}{family}_{d?}{stem}{up-head}{seg-head}{_mobile?}{_pre_down?}`; `?` marks parts
that are optional.

Source: Mehta et al., Simple and Efficient Architectures for Semantic Segmentation, CVPR workshops 2022 (arXiv
2206.08236), and the AIMET model zoo's FFNet model card.
"""

import difflib
from dataclasses import dataclass

from ffnet.system.errors import UserError

DEFAULT_MODEL = "segmentation_ffnet78S_dBBB_mobile"
INPUT_SIZE = (1024, 2048)  # height, width of a Cityscapes image, which the published weights were trained on


@dataclass(frozen=True)
class UpHead:
    """Channel widths of adapter and up-branch, finest first."""

    adapter: tuple[int, ...]
    up: tuple[int, ...]


@dataclass(frozen=True)
class SegHead:
    """The two convolutions after the concatenation."""

    middle: int  # channels between them
    last_kernel: int  # kernel size of the second


@dataclass(frozen=True)
class Published:
    """Published mIoU on Cityscapes val in percent; None if none was published."""

    fp32: float | None = None
    int8: float | None = None


@dataclass(frozen=True)
class Variant:
    """Everything that is needed to build a network and to find its weights."""

    name: str
    stem: str  # letter in the name: A plain, B slim, C narrow
    bottleneck: bool
    blocks: tuple[int, ...]  # residual blocks per stage
    strides: tuple[int, ...]  # per stage
    channels: tuple[int, int, int, int]  # channels of the four feature maps, finest first
    up_head: UpHead
    seg_head: SegHead
    upsampling: str  # "nearest" or "bilinear" (align_corners=True) inside the head
    pre_down: bool  # the input is smoothed and halved inside the model
    release_file: str  # <zip>/<file> of the FFNet release that holds its state_dict; "" for the demo's
    parameters: float  # millions
    published: Published = Published()

    @property
    def is_demo(self) -> bool:
        """Whether the variant is the demo's own, with no published weights."""
        return not self.release_file


CHANNELS = {  # family -> channels of the four feature maps, finest first
    "": (64, 128, 256, 512),
    "S": (64, 128, 192, 320),
    "N": (64, 96, 160, 320),
    "NS": (64, 64, 128, 256),
    "T": (32, 48, 96, 128),  # tiny: the demo's own, in no paper
}
BLOCKS = {  # residual blocks per stage, by backbone: depth and family
    "18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "56": (4, 8, 12, 3), "86": (8, 12, 16, 6),
    "101": (3, 4, 23, 3), "134": (8, 18, 28, 12), "150": (16, 18, 28, 12),
    "40S": (4, 5, 6, 4), "54S": (5, 8, 8, 5), "78S": (6, 12, 12, 8), "86S": (8, 12, 16, 6), "150S": (16, 18, 28, 12),
    "46N": (6, 8, 8), "74N": (8, 12, 16), "122N": (16, 24, 20),
    "46NS": (6, 8, 8), "74NS": (8, 12, 16), "122NS": (16, 24, 20),
    "14T": (1, 2, 2, 1),
}  # fmt: skip
BOTTLENECK_BACKBONES = {"50", "101"}

UP_HEADS = {
    "A": UpHead((64, 128, 256, 512), (128, 128, 128, 128)),
    "B": UpHead((64, 128, 128, 256), (96, 96, 64, 32)),
    "C": UpHead((128, 128, 128, 128), (128, 16, 16, 16)),
}

SEG_HEADS = {"A": SegHead(512, 1), "B": SegHead(256, 3), "C": SegHead(128, 1)}

# FP32 mIoU from the FFNet project's tables, by the end of the name, then by backbone. None: the demo's own variants.
FP32_MIOU: dict[str, dict[str, float | None]] = {
    "dBBB_mobile": {"86S": 81.5, "78S": 81.3, "54S": 80.8, "40S": 79.2, "14T": None},
    "BBB_mobile_pre_down": {"150S": 81.6, "86S": 80.9, "78S": 80.5, "54S": 80.2, "40S": 79.7},
    "BCC_mobile_pre_down": {"150S": 81.0, "86S": 81.0, "78S": 80.6, "54S": 79.9, "40S": 78.4, "14T": None},
    "BBB_mobile": {"150S": 81.6, "86S": 80.9, "78S": 80.5, "54S": 80.2, "40S": 79.7},
    "BCC_mobile": {"150S": 81.0, "86S": 81.0, "78S": 80.6, "54S": 79.9, "40S": 78.4},
    "CBB_mobile_pre_down": {"122NS": 79.3, "74NS": 78.3, "46NS": 77.5},
    "CCC_mobile_pre_down": {"122NS": 79.2, "74NS": 77.8, "46NS": 76.7},
    "CBB_mobile": {"122NS": 79.3, "74NS": 78.3, "46NS": 77.5},
    "CCC_mobile": {"122NS": 79.2, "74NS": 77.8, "46NS": 76.7},
    "AAA": {"150": 84.4, "134": 84.1, "101": 82.1, "86": 83.2, "56": 82.5, "50": 79.6, "34": 81.4},
    "ABB": {"150": 83.7, "86": 83.5, "56": 82.1, "34": 80.3},
    "BBB": {"150S": 84.1, "86S": 82.6},
    "CBB": {"122N": 83.7, "74N": 83.0, "46N": 81.9},
    "dAAA": {"150": 82.3, "134": 82.0, "101": 80.4, "86": 81.4, "56": 80.7, "50": 79.4, "34": 79.1, "18": 76.5},
    "dAAC": {"150": 81.9, "86": 81.1, "34": 79.1, "18": 76.4},
    "dBBB": {"150S": 81.0, "86S": 81.1},
}

# Millions of parameters, by the stem and the heads in the name, then by backbone.
PARAMETERS = {
    "dBBB": {"86S": 26.61, "78S": 27.49, "54S": 18.04, "40S": 13.91, "14T": 0.98, "150S": 48.01},
    "BBB": {"150S": 48.01, "86S": 26.60, "78S": 27.49, "54S": 18.04, "40S": 13.91},
    "BCC": {"150S": 47.35, "86S": 25.94, "78S": 26.83, "54S": 17.38, "40S": 13.25, "14T": 0.80},
    "CBB": {"122NS": 32.82, "74NS": 23.96, "46NS": 13.18, "122N": 51.39, "74N": 37.15, "46N": 20.21},
    "CCC": {"122NS": 32.17, "74NS": 23.31, "46NS": 12.53},
    "AAA": {"150": 98.84, "134": 98.25, "101": 47.55, "86": 53.99, "56": 33.62, "50": 28.55, "34": 25.29},
    "ABB": {"150": 96.11, "86": 51.25, "56": 30.89, "34": 22.55},
    "dAAA": {"150": 98.85, "134": 98.26, "101": 47.55, "86": 53.99, "56": 33.63, "50": 28.55, "34": 25.29, "18": 15.18},
    "dAAC": {"150": 97.07, "86": 52.21, "34": 23.51, "18": 13.40},
}  # fmt: skip

# The five models whose INT8 results the AIMET model zoo published, with its FP32 results.
ZOO_MIOU = {
    "segmentation_ffnet78S_dBBB_mobile": Published(81.3, 80.7),
    "segmentation_ffnet54S_dBBB_mobile": Published(80.8, 80.1),
    "segmentation_ffnet40S_dBBB_mobile": Published(79.2, 78.9),
    "segmentation_ffnet78S_BCC_mobile_pre_down": Published(80.6, 80.4),
    "segmentation_ffnet122NS_CCC_mobile_pre_down": Published(79.3, 79.0),
}


def _variant(backbone: str, suffix: str, fp32: float | None) -> Variant:
    """Return the variant whose name ends in `{backbone}_{suffix}`."""
    name = f"segmentation_ffnet{backbone}_{suffix}"
    heads = suffix.split("_")[0]
    stem, up, seg = tuple(heads[-3:])
    family = backbone.lstrip("0123456789")
    divisor = 2 if family == "T" else 1  # the tiny family halves the widths of the heads
    up_head, seg_head = UP_HEADS[up], SEG_HEADS[seg]
    mobile = "_mobile" in suffix
    gpu = "_gpu" if family == "S" and not mobile else ""
    release_file = f"ffnet{backbone}/ffnet{backbone}_{heads}{gpu}_cityscapes_state_dict_quarts.pth"
    return Variant(
        name=name,
        stem=stem,
        bottleneck=backbone in BOTTLENECK_BACKBONES,
        blocks=BLOCKS[backbone],
        strides=(2, 2, 2) if stem == "C" else (2 if heads.startswith("d") else 1, 2, 2, 2),
        channels=CHANNELS[family],
        up_head=UpHead(*(tuple(width // divisor for width in widths) for widths in (up_head.adapter, up_head.up))),
        seg_head=SegHead(seg_head.middle // divisor, seg_head.last_kernel),
        upsampling="nearest" if mobile else "bilinear",
        pre_down=suffix.endswith("_pre_down"),
        release_file="" if family == "T" else release_file,
        parameters=PARAMETERS[heads][backbone],
        published=ZOO_MIOU.get(name, Published(fp32)),
    )


_VARIANTS = (_variant(backbone, suffix, fp32) for suffix, row in FP32_MIOU.items() for backbone, fp32 in row.items())
VARIANTS = {variant.name: variant for variant in _VARIANTS}
# Qualcomm AI Hub's five networks with the height and width of their input. The last two have the weights of the
# `pre_down` variants: both are published in one file.
AI_HUB_INPUT_SIZES = {
    "segmentation_ffnet40S_dBBB_mobile": INPUT_SIZE,
    "segmentation_ffnet54S_dBBB_mobile": INPUT_SIZE,
    "segmentation_ffnet78S_dBBB_mobile": INPUT_SIZE,
    "segmentation_ffnet78S_BCC_mobile": (512, 1024),
    "segmentation_ffnet122NS_CCC_mobile": (512, 1024),
}
MODEL_GROUPS = {  # names that stand for several models
    "published": tuple(ZOO_MIOU),
    "ai-hub": tuple(AI_HUB_INPUT_SIZES),
    "all": tuple(name for name, variant in VARIANTS.items() if not variant.is_demo),
}
DEMO_VARIANTS = tuple(name for name, variant in VARIANTS.items() if variant.is_demo)


def find_variant(name: str) -> Variant:
    """Return the variant of a name; raise a UserError that suggests similar names if there is none."""
    if name in VARIANTS:
        return VARIANTS[name]
    bare = {known.removeprefix("segmentation_").lower(): known for known in VARIANTS}
    wanted = str(name).lower().removeprefix("segmentation_")
    begun = [key for key in bare if wanted and key.startswith(wanted)]
    close = begun or difflib.get_close_matches(wanted, bare, cutoff=0.4)
    meant = " or ".join(bare[key] for key in close[:3]) or DEFAULT_MODEL
    raise UserError(f"{name!r} is not an FFNet segmentation model. Did you mean {meant}?")
