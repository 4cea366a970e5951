"""Prepare backends for speed: memory formats, and torch.compile if the run is long enough for it to save time."""

import functools
import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ffnet.backends import Backend
from ffnet.errors import UserError
from ffnet.evaluation.postprocessing import Kernel, two_largest
from ffnet.evaluation.preprocessing import memory_format, normalize
from ffnet.evaluation.runtime import Runtime, synchronized_clock
from ffnet.memory import is_out_of_gpu_memory
from ffnet.variants import VARIANTS
from ffnet.wording import format_duration

# Number of pixels from which compiling saves more time than it takes on two CPU cores: one to two and a half minutes.
MIN_PIXELS = 250 * 1024 * 2048
MIN_SECONDS = 60.0  # that the networks take on a GPU, eagerly, from which compiling them may save time
ROUNDS = 5  # in which a compiled network is compared with the eager one
# Options of torch.compile. With large thresholds, it compiles `two_largest` to one kernel.
THRESHOLDS = ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold")


@dataclass(frozen=True)
class PreparedBackends:
    """Backends as the evaluation loop is to call them."""

    backends: Mapping[str, Backend]
    kernel: Kernel | None = None  # for `predict`
    compiled: tuple[str, ...] = ()  # names of those that are compiled
    reason: str = ""  # why they are compiled or not, as a phrase for the report
    model: str = ""  # that errors name; "" if there is only one


def prepare_backends(
    backends: Mapping[str, Backend],
    runtime: Runtime,
    compile: bool | Collection[str] | None = False,
    images: int = 0,
    size: tuple[int, int] = (0, 0),
) -> PreparedBackends:
    """Return the backends in their fastest memory format and, if worth it, compiled.

    Modules among the backends are converted in place. On a CPU, all backends take one image at a time.

    Args:
        backends: by name.
        runtime: where they run.
        compile: whether to compile, or which backends. If it is None, they are compiled if the run is long enough and a
            compiler works. On a GPU, of the eager and the compiled network the one is used that is faster in a trial,
            unless `compile` names the backends.
        images: number of images that this process evaluates; needed unless `compile` is False.
        size: their height and width.

    Raises:
        UserError: if compiling is required and torch.compile does not work.
    """
    eager = {name: _eager(backend, runtime) for name, backend in backends.items()}
    networks = [name for name, backend in backends.items() if isinstance(backend, torch.nn.Module)]
    trial = _Trial(images, size, runtime)
    reason = _reason_against(compile, {name: eager[name] for name in networks}, trial)
    if reason:
        return PreparedBackends(eager, reason=f"not compiled: {reason}")
    chosen = networks if compile is None or isinstance(compile, bool) else [n for n in networks if n in compile]
    compiled = {name: _compiled(backends[name], runtime) for name in chosen}
    reason = "compiled: --compile was given" if compile else "compiled: the run is long enough for it to save time"
    if runtime.device.type == "cpu":
        return PreparedBackends(eager | compiled, compiled_kernel(), tuple(compiled), reason)
    if compile is None or isinstance(compile, bool):
        compiled, reason = _faster(eager, compiled, trial)
    return PreparedBackends(eager | compiled, None, tuple(compiled), reason)


def _reason_against(
    compile: bool | Collection[str] | None, networks: Mapping[str, Backend], trial: "_Trial"
) -> str | None:
    """Return why not to compile, as a phrase; None if there is no reason."""
    device = trial.runtime.device
    if compile is not None and not compile:
        return "--no-compile was given" if compile is False else "the run that is resumed was not"
    if compile is None and device.type == "cpu" and trial.pixels < MIN_PIXELS:
        return "the run is too short for compilation to save time"
    if compile is None and device.type != "cpu":
        seconds = trial.images * sum(map(trial.seconds_per_image, networks.values()))
        if seconds < MIN_SECONDS:
            return f"the networks take {format_duration(seconds)}, less than compiling them"
    problem = compiler_problem(device)
    if problem and compile:
        raise UserError(f"--compile: {problem}. Install a C++ compiler, or use --no-compile.")
    return problem


def _faster(
    eager: Mapping[str, Backend], compiled: Mapping[str, Backend], trial: "_Trial"
) -> tuple[dict[str, Backend], str]:
    """Return the compiled networks that are faster than the eager ones, and the times of all as a phrase."""
    kept, phrases = {}, []
    for name, backend in compiled.items():
        before, after = trial.seconds_per_image(eager[name]), trial.seconds_per_image(backend)
        if after < before:
            kept[name] = backend
        verb = "compiled" if after < before else "not compiled"
        phrases.append(f"{name} {verb}, {1000 * after:.2f} ms per image compiled and {1000 * before:.2f} ms otherwise")
    return kept, "; ".join(phrases)


@dataclass(frozen=True)
class _Trial:
    """Runs networks on noise of the size of the images, to see how long they take."""

    images: int  # number of images that this process evaluates
    size: tuple[int, int]  # height, width
    runtime: Runtime

    @property
    def pixels(self) -> int:
        """Number of pixels of all images together."""
        return self.images * math.prod(self.size)

    @torch.inference_mode()
    def seconds_per_image(self, backend: Backend) -> float:
        """Return the median time of a batch in a network, divided by its size, after a first run that does not count.

        It is infinite if the memory does not suffice for a batch, which the evaluation loop handles.
        """
        device, batch_size = self.runtime.device, self.runtime.batch_size
        noise = torch.randint(0, 256, (batch_size, 3, *self.size), dtype=torch.uint8, device=device)
        try:
            inputs = normalize(noise, self.runtime.allow_tf32)
            backend(inputs)
            seconds = []
            for _ in range(ROUNDS):
                begin = synchronized_clock(device)
                backend(inputs)
                seconds.append(synchronized_clock(device) - begin)
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                raise
            return math.inf
        return statistics.median(seconds) / batch_size


@functools.cache
def compiled_kernel() -> Kernel:
    """Return `two_largest`, compiled; the same for all models, so that it is compiled once for a size of logits."""
    return torch.compile(two_largest, dynamic=False, options=dict.fromkeys(THRESHOLDS, 10**6))


def _eager(backend: Backend, runtime: Runtime) -> Backend:
    if isinstance(backend, torch.nn.Module):
        backend = backend.to(memory_format=memory_format(runtime.device, runtime.allow_tf32))
    return image_by_image(backend) if runtime.device.type == "cpu" else backend


def _compiled(backend: Backend, runtime: Runtime) -> Backend:
    # All FFNets share the code of `forward`, of which torch compiles 8 versions by default; others run eagerly.
    torch._dynamo.config.recompile_limit = len(VARIANTS)
    compiled = torch.compile(backend, dynamic=False)
    return image_by_image(compiled) if runtime.device.type == "cpu" else FixedBatchSize(compiled, runtime.batch_size)


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
