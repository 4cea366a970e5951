"""Prepare backends for speed: memory formats, and torch.compile if the run is long enough for it to save time."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ffnet.backends import Backend
from ffnet.errors import UserError
from ffnet.evaluation.postprocessing import Kernel, two_largest
from ffnet.evaluation.preprocessing import memory_format
from ffnet.evaluation.runtime import Runtime
from ffnet.variants import VARIANTS

# Number of pixels from which compiling saves more time than it takes (one to two and a half minutes on two CPU cores).
MIN_PIXELS = {"cpu": 250 * 1024 * 2048, "cuda": 5000 * 1024 * 2048}
# Options of torch.compile. With large thresholds, it compiles `two_largest` to one kernel.
THRESHOLDS = ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold")


@dataclass(frozen=True)
class PreparedBackends:
    """Backends as the evaluation loop is to call them."""

    backends: Mapping[str, Backend]
    kernel: Kernel | None = None  # for `predict`
    compiled: bool = False
    reason: str = ""  # why they are compiled or not, as a phrase for the report
    model: str = ""  # that errors name; "" if there is only one


def prepare_backends(
    backends: Mapping[str, Backend], pixels: int, runtime: Runtime, compile: bool | None
) -> PreparedBackends:
    """Return the backends in their fastest memory format and, if worth it, compiled.

    Modules among the backends are converted in place. On a CPU, all backends take one image at a time. If `compile` is
    None, they are compiled if this process evaluates enough `pixels`, all images together, and a compiler works.

    Raises:
        UserError: if `compile` is True and torch.compile does not work.
    """
    compiled, reason = _decide(pixels, runtime.device, compile)
    prepared = {name: _prepare(backend, runtime, compiled) for name, backend in backends.items()}
    kernel = None
    if compiled and runtime.device.type == "cpu":  # a GPU upsamples fast enough without
        kernel = compiled_kernel()
    return PreparedBackends(prepared, kernel, compiled, reason)


@functools.cache
def compiled_kernel() -> Kernel:
    """Return `two_largest`, compiled; the same for all models, so that it is compiled once for a size of logits."""
    return torch.compile(two_largest, dynamic=False, options=dict.fromkeys(THRESHOLDS, 10**6))


def _decide(pixels: int, device: torch.device, compile: bool | None) -> tuple[bool, str]:
    """Return whether to compile, and the reason as a phrase."""
    if compile is False:
        return False, "not compiled: --no-compile was given"
    if compile is None and pixels < MIN_PIXELS[device.type]:
        return False, "not compiled: the run is too short for compilation to save time"
    problem = compiler_problem(device)
    if problem and compile:
        raise UserError(f"--compile: {problem}. Install a C++ compiler, or use --no-compile.")
    if problem:
        return False, f"not compiled: {problem}"
    cause = "--compile was given" if compile else "the run is long enough for compilation to save time"
    return True, f"compiled: {cause}"


def _prepare(backend: Backend, runtime: Runtime, compiled: bool) -> Backend:
    if isinstance(backend, torch.nn.Module):
        backend = backend.to(memory_format=memory_format(runtime.device, runtime.allow_tf32))
        if compiled:
            # All FFNets share the code of `forward`, of which torch compiles 8 versions by default; others run eagerly.
            torch._dynamo.config.recompile_limit = len(VARIANTS)
            backend = torch.compile(backend, dynamic=False)
            if runtime.device.type != "cpu":
                return FixedBatchSize(backend, runtime.batch_size)
    return image_by_image(backend) if runtime.device.type == "cpu" else backend


def image_by_image(backend: Backend) -> Backend:
    """Return a backend that runs the images of a batch one after the other.

    On a CPU this takes a quarter less time, because activations stay in its caches, and the logits of an image do not
    depend on the batch it is in: oneDNN splits sums differently for other batch sizes.
    """
    return lambda images: torch.cat([backend(image) for image in images.split(1)])


@dataclass
class FixedBatchSize:
    """A backend compiled for one batch size; smaller batches are padded to it."""

    backend: Backend
    batch_size: int

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """Return logits (N, 19, h, w) of images (N, 3, H, W)."""
        if len(images) >= self.batch_size:
            return self.backend(images)
        filling = images[:1].expand(self.batch_size - len(images), -1, -1, -1)
        return self.backend(torch.cat([images, filling]))[: len(images)]


def compiler_problem(device: torch.device) -> str | None:
    """Return why torch.compile can't work on a device, in one line; None if it works."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(8, device=device))
    except Exception as error:  # a compiler, its headers or triton may be missing; the run goes on without
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.compile does not work here ({first_line[:150]})"
    return None
