"""Prepare backends for speed: memory formats, and torch.compile where it saves time."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ffnet.config import Runtime
from ffnet.evaluation.loading import memory_format
from ffnet.evaluation.postprocessing import Kernel, two_largest
from ffnet.evaluation.scores import Backend
from ffnet.system.errors import UserError
from ffnet.system.memory import first_sentence
from ffnet.variants import VARIANTS

# Number of pixels from which compiling saves more time than it takes on two CPU cores: one to two and a half minutes.
MIN_PIXELS = 250 * 1024 * 2048
# Options of torch.compile. With large thresholds, it compiles `two_largest` to one kernel.
THRESHOLDS = ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold")


@dataclass(frozen=True)
class PreparedBackends:
    """Backends as the evaluation loop calls them."""

    backends: Mapping[str, Backend]
    kernel: Kernel | None = None  # compiled kernel for `predict`


def choose_compilation(runtime: Runtime, images: int, size: tuple[int, int] | None) -> tuple[bool, str]:
    """Return whether to compile the networks, and why, as a phrase for the report.

    On a GPU, compiled networks were no faster (FP32 on an H200: 6.57 ms compiled, 6.40 ms eager), so that only
    `--compile` compiles there. The choice depends on the images alone, so that all ranks and resumed runs make the
    same one.

    Args:
        runtime: `compile` holds the user's choice.
        images: Number of images of all processes together.
        size: Their height and width; None if they differ.

    Raises:
        UserError: If `--compile` is given and torch.compile does not work.
    """
    if runtime.compile is False:
        return False, "not compiled: --no-compile was given"
    if runtime.compile is None and runtime.on_gpu:
        return False, "not compiled: on a GPU this saves no time"
    if runtime.compile is None and size is None:
        return False, "not compiled: the images have several sizes, and a network is compiled for one"
    if runtime.compile is None and size and images * math.prod(size) < MIN_PIXELS:
        return False, "not compiled: the run is too short for compilation to save time"
    problem = compiler_problem(runtime.device)
    if problem and runtime.compile:
        raise UserError(
            f"--compile: {problem}. Install a C++ compiler, set TMPDIR to a folder in which files may be executed, or "
            "use --no-compile."
        )
    if problem:
        return False, f"not compiled: {problem}"
    return True, f"compiled: {'--compile was given' if runtime.compile else 'the run is long enough to save time'}"


def prepare_backends(backends: Mapping[str, Backend], runtime: Runtime, compiled: bool = False) -> PreparedBackends:
    """Return the backends in their fastest memory format; networks among them are converted in place.

    On a CPU, all backends take one image at a time.

    Args:
        backends: Backend by name; torch modules are on the device of `runtime`.
        runtime: Device and precision.
        compiled: Compile the torch modules.
    """
    prepared = {name: _prepare(backend, runtime, compiled) for name, backend in backends.items()}
    return PreparedBackends(prepared, compiled_kernel() if compiled and not runtime.on_gpu else None)


def _prepare(backend: Backend, runtime: Runtime, compiled: bool) -> Backend:
    if isinstance(backend, torch.nn.Module):
        device = torch.device(runtime.device)
        backend = backend.to(memory_format=memory_format(device, runtime.allow_tf32))
        if compiled:
            # All FFNets share the code of `forward`, of which torch compiles 8 versions by default.
            torch._dynamo.config.recompile_limit = len(VARIANTS)
            backend = torch.compile(backend, dynamic=False)
    return backend if runtime.on_gpu else image_by_image(backend)


@functools.cache
def compiled_kernel() -> Kernel:
    """Return the compiled `two_largest`; cached, so that torch compiles it only once per size of logits."""
    return torch.compile(two_largest, dynamic=False, options=dict.fromkeys(THRESHOLDS, 10**6))


def image_by_image(backend: Backend) -> Backend:
    """Return a backend that runs the images of a batch one after the other.

    On a CPU this takes a quarter less time, because activations stay in its caches, and the logits of an image do not
    depend on its batch: oneDNN splits sums differently for other batch sizes.
    """
    return lambda images: torch.cat([torch.atleast_1d(backend(image)) for image in images.split(1)])


def compiler_problem(device: str) -> str | None:
    """Return why torch.compile does not work on a device, in one line; None if it works."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(8, device=device))
    except Exception as error:  # a compiler, its headers or triton may be missing
        return f"torch.compile does not work here ({first_sentence(error)[:150]})"
    return None
