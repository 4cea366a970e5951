"""Prepare backends for speed: memory formats, and torch.compile if the run is long enough for it to save time."""

import functools
import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from ffnet.backends import Backend
from ffnet.evaluation.postprocessing import Kernel, two_largest
from ffnet.evaluation.preprocessing import memory_format, normalize
from ffnet.evaluation.runtime import Runtime, synchronized_clock
from ffnet.system.errors import UserError
from ffnet.system.memory import first_sentence, is_out_of_gpu_memory
from ffnet.system.text import format_duration
from ffnet.variants import VARIANTS

# Number of pixels from which compiling saves more time than it takes on two CPU cores: one to two and a half minutes.
MIN_PIXELS = 250 * 1024 * 2048
MIN_SECONDS = 60.0  # that the networks take on a GPU, eagerly, from which compiling them may save time
WORTHWHILE = 0.97  # share of the eager network's time that a compiled one may take: trials differ, and so do last bits
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
    compile: bool | None = False,
    images: int = 0,
    size: tuple[int, int] = (0, 0),
) -> PreparedBackends:
    """Return the backends in their fastest memory format and, if worth it, compiled.

    Modules among the backends are converted in place. On a CPU, all backends take one image at a time. On a GPU, a
    trial decides for each network whether the eager or the compiled one is used.

    Args:
        backends: by name.
        runtime: where they run.
        compile: whether to compile them; None: if the run is long enough and a compiler works.
        images: number of images that this process evaluates; needed unless `compile` is False.
        size: their height and width.

    Raises:
        UserError: if compiling is required and torch.compile does not work.
    """
    networks = [name for name, backend in backends.items() if isinstance(backend, torch.nn.Module)]
    eager = _prepare(backends, runtime, ())
    trial = _Trial(images, size, runtime)
    reason = _reason_against(compile, [eager.backends[name] for name in networks], trial)
    if reason:
        return replace(eager, reason=f"not compiled: {reason}")
    compiled = _prepare(backends, runtime, networks)
    if runtime.device.type == "cpu":
        why = "--compile was given" if compile else "the run is long enough for it to save time"
        return replace(compiled, reason=f"compiled: {why}")
    return _faster(eager, compiled, trial)


def compile_backends(backends: Mapping[str, Backend], runtime: Runtime, names: Collection[str]) -> PreparedBackends:
    """Return the backends in their fastest memory format, and those compiled that another process or run compiled.

    Args:
        backends: see prepare_backends.
        runtime: see prepare_backends.
        names: of the backends that are compiled, without a trial.

    Raises:
        UserError: if there are names and torch.compile does not work.
    """
    problem = compiler_problem(runtime.device) if names else None
    if problem:
        raise UserError(
            f"The main process or the run that is resumed has compiled the networks, but {problem}. Install a C++ "
            "compiler, or start again with --no-compile, and with --force instead of --resume."
        )
    return _prepare(backends, runtime, names)


def _prepare(backends: Mapping[str, Backend], runtime: Runtime, names: Collection[str]) -> PreparedBackends:
    prepared = {name: _eager(backend, runtime) for name, backend in backends.items()}
    prepared |= {name: _compiled(backends[name], runtime) for name in backends if name in names}
    kernel = compiled_kernel() if names and runtime.device.type == "cpu" else None
    return PreparedBackends(prepared, kernel, tuple(name for name in backends if name in names))


def _reason_against(compile: bool | None, networks: Collection[Backend], trial: "_Trial") -> str | None:
    """Return why not to compile, as a phrase; None if there is no reason."""
    device = trial.runtime.device
    if compile is False:
        return "--no-compile was given"
    if compile is None and device.type == "cpu" and trial.pixels < MIN_PIXELS:
        return "the run is too short for compilation to save time"
    if compile is None and device.type != "cpu":
        seconds = trial.images * sum(map(trial.seconds_per_image, networks))
        if seconds < MIN_SECONDS:
            return f"the networks take {format_duration(seconds)} for all images, less than compilation takes"
    problem = compiler_problem(device)
    if problem and compile:
        raise UserError(f"--compile: {problem}. Install a C++ compiler, or use --no-compile.")
    return problem


def _faster(eager: PreparedBackends, compiled: PreparedBackends, trial: "_Trial") -> PreparedBackends:
    """Return the compiled networks that are faster than the eager ones, and the eager ones otherwise."""
    faster, phrases = [], []
    for name in compiled.compiled:
        is_faster, reason = _compare(eager.backends[name], compiled.backends[name], trial)
        faster += [name] if is_faster else []
        phrases.append(f"{name} {'compiled' if is_faster else 'not compiled'}, {reason}")
    backends = {**eager.backends, **{name: compiled.backends[name] for name in faster}}
    return PreparedBackends(backends, None, tuple(faster), "; ".join(phrases))


def _compare(eager: Backend, compiled: Backend, trial: "_Trial") -> tuple[bool, str]:
    """Return whether a network is faster compiled, and why it is to be compiled or not, as a phrase."""
    before = trial.seconds_per_image(eager)
    try:
        after = trial.seconds_per_image(compiled) if math.isfinite(before) else math.inf
    except Exception as error:  # torch's compiler fails in many ways on a network that otherwise works
        return False, f"because torch.compile fails on it ({first_sentence(error)[:150]})"
    if math.isinf(after):
        return False, "because the memory does not suffice for a trial"
    return after < WORTHWHILE * before, f"{1000 * after:.2f} ms per image compiled and {1000 * before:.2f} ms otherwise"


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
        try:
            noise = torch.randint(0, 256, (batch_size, 3, *self.size), dtype=torch.uint8, device=device)
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
        return f"torch.compile does not work here ({first_sentence(error)[:150]})"
    return None
