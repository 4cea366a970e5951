"""Whether the optional package for `--npu` is installed, and how to get it. Imports neither torch nor onnx."""

import importlib.util
import platform
import sys

from ffnet.system.errors import UserError

LEAST_GLIBC = (2, 35)  # of the wheel for Linux


def check_npu_package() -> None:
    """Raise a UserError that says how to install onnxruntime-qnn, or that it does not exist for this platform."""
    if importlib.util.find_spec("onnxruntime_qnn"):
        return
    if not has_wheel(sys.platform, platform.machine(), platform.libc_ver()):
        raise UserError(
            f"--npu: onnxruntime-qnn does not exist for {platform.system()} on {platform.machine()}. It needs Windows, "
            f"or Linux on x86-64 with glibc {'.'.join(map(str, LEAST_GLIBC))} or newer. Use such a PC, or remove --npu."
        )
    raise UserError(
        "--npu: onnxruntime-qnn is not installed. Install it with `pip install -r requirements-npu.txt`, or remove "
        "--npu."
    )


def has_wheel(system: str, machine: str, libc: tuple[str, str]) -> bool:
    """Return whether PyPI has an onnxruntime-qnn wheel for a platform.

    Args:
        system: as sys.platform.
        machine: as platform.machine().
        libc: as platform.libc_ver().
    """
    if system == "win32":
        return machine.upper() in ("AMD64", "ARM64")
    name, version = libc
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return system == "linux" and machine == "x86_64" and name == "glibc" and numbers >= LEAST_GLIBC
