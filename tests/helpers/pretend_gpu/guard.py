"""Compile guard.cpp, and load it."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def missing_requirement():
    """Return why the pretend GPU can't work here; None if it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not torch.version.cuda:
        return "torch was built without CUDA"
    return None if shutil.which("g++") else "the pretend GPU needs g++"


def build_guard(folder):
    """Compile guard.cpp into `folder` and return the library."""
    library, installed = Path(folder) / "guard.so", Path(torch.__file__).parent
    flags = [
        "-shared",
        "-fPIC",
        "-std=c++20",
        f"-I{installed / 'include'}",
        f"-L{installed / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
    subprocess.run(["g++", str(SOURCE), "-o", str(library), *flags], check=True)
    return library


@functools.cache
def load_guard(library):
    """Return the functions of guard.cpp: install(count), choose(index), current() and count()."""
    return ctypes.CDLL(str(library))
