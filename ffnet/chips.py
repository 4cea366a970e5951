"""The Qualcomm chips that --npu can name, and the optional package that runs their NPU (Hexagon Tensor Processor).

Sources of the numbers: ExecuTorch's qc_schema.py; QAIRT's QnnTypes.h and documentation (2.47) for SC8380XP, QCS6490,
QCS8550, SM8635 and QCS8300; the devices_and_chipsets.yaml of Qualcomm AI Hub Models 0.65 for QCM6690, SA7255P, SM7750,
SC8480XP, SM8950, SM8975 and the aliases. The names are those of Qualcomm's product pages.
"""

import difflib
import importlib.util
from dataclasses import dataclass

from ffnet.system.errors import UserError
from ffnet.system.text import format_table

DEFAULT_CHIP = "sm8750"


@dataclass(frozen=True)
class Chip:
    """A chip that Qualcomm's runtime distinguishes from the others."""

    part: str  # part name in lower case
    name: str  # "Snapdragon ..." if the chip is sold under such a name, otherwise what it is built into
    soc_model: int  # the runtime's number of the chip
    architecture: str  # version of the Hexagon Tensor Processor
    aliases: str = ""  # further part, marketing and device names


_CHIPS = (
    Chip("sm8975", "Snapdragon 8 Elite Extreme Gen 6", 103, "v85"),
    Chip("sm8950", "Snapdragon 8 Elite Gen 6", 113, "v85"),
    Chip("sm8850", "Snapdragon 8 Elite Gen 5", 87, "v81", "galaxy-s26"),
    Chip("sm8750", "Snapdragon 8 Elite", 69, "v79", "dragonwing-q-8750 galaxy-s25 qcs8750"),
    Chip("sm8845", "Snapdragon 8 Gen 5", 97, "v81"),
    Chip("sm8650", "Snapdragon 8 Gen 3", 57, "v75", "galaxy-s24"),
    Chip("sm8635", "Snapdragon 8s Gen 3", 68, "v73"),
    Chip("sm8550", "Snapdragon 8 Gen 2", 43, "v73", "galaxy-s23"),
    Chip("sm8475", "Snapdragon 8+ Gen 1", 42, "v69"),
    Chip("sm8450", "Snapdragon 8 Gen 1", 36, "v69", "galaxy-s22 qcs8450"),
    Chip("sm8350", "Snapdragon 888", 30, "v68", "galaxy-s21"),
    Chip("sm7750", "Snapdragon 7 Gen 4", 86, "v73", "dragonwing-q-7790 qcs7790"),
    Chip("sc8480xp", "Snapdragon X2 Elite", 88, "v81"),
    Chip("sc8380xp", "Snapdragon X Elite", 60, "v73", "dragonwing-iq-x7181 qcs5121 qcs7181 sc8340xp snapdragon-x-plus"),
    Chip("sa8797", "automotive", 72, "v81"),
    Chip("sa8255", "automotive", 52, "v73", "sa8255p sa8650p sa8775p"),
    Chip("sa7255", "automotive", 67, "v75", "sa7255p"),
    Chip("sa8295", "automotive", 39, "v68", "sa8295p"),
    Chip("sa8540", "automotive", 62, "v68"),
    Chip("qcs9100", "embedded", 77, "v73", "dragonwing-iq-9075 qcs9075"),
    Chip("qcs8550", "embedded", 66, "v73"),
    Chip("qcs8300", "embedded", 82, "v75", "dragonwing-iq-8275 qcs8275"),
    Chip("qcs6490", "embedded", 35, "v68", "sm7325 snapdragon-778g"),
    Chip("qcm6690", "embedded", 78, "v73", "dragonwing-q-6690"),
    Chip("qcm6490", "embedded", 93, "v68"),
    Chip("sxr2330p", "XR headset", 75, "v79"),
    Chip("sxr2230p", "Snapdragon XR2 Gen 2", 53, "v69"),
    Chip("sxr1230p", "XR headset", 45, "v73"),
    Chip("ssg2115p", "smart glasses", 46, "v73"),
    Chip("ssg2125p", "smart glasses", 58, "v73"),
    Chip("sar2230p", "smart glasses", 95, "v81"),
    Chip("sw6100", "wearable", 96, "v81"),
)
CHIPS = {chip.part: chip for chip in _CHIPS}
ALIASES = {alias: chip.part for chip in _CHIPS for alias in chip.aliases.split()}


def find_chip(text: str) -> Chip:
    """Return the chip with a part name, a marketing name or an alias, in any case, with spaces or hyphens.

    Raises:
        ValueError: There is no such chip; the message names the most similar ones.
    """
    marketing = {_hyphenated(chip.name): chip for chip in _CHIPS if chip.name.startswith("Snapdragon ")}
    names = CHIPS | marketing | {alias: CHIPS[part] for alias, part in ALIASES.items()}
    wanted = _hyphenated(text)
    if wanted in names:
        return names[wanted]
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    suggestion = f" Did you mean {', '.join(close[:-1])}{' or ' if close[1:] else ''}{close[-1]}?" if close else ""
    raise ValueError(f"{text[:40]!r} is not a known chip.{suggestion} --npu list prints the table.")


def format_chips() -> str:
    """Return the table of chips: part name, name, number, architecture and aliases."""
    rows = [(chip.part, chip.name, str(chip.soc_model), chip.architecture, chip.aliases) for chip in _CHIPS]
    return format_table([("part", "name", "soc_model", "architecture", "also"), *rows])


def _hyphenated(name: str) -> str:
    return "-".join(name.lower().split())


def check_npu_package() -> None:
    """Raise a UserError that says where onnxruntime-qnn can be installed, and how, if it is not."""
    if not importlib.util.find_spec("onnxruntime_qnn"):
        raise UserError(
            "--npu: onnxruntime-qnn is not installed. On Windows, or on Linux on x86-64 with glibc 2.35 or newer, "
            "install it with `pip install -r requirements-npu.txt`; otherwise remove --npu."
        )
