"""The networks made fast: memory formats, and torch.compile where a run is long enough to earn the compile time."""

from dataclasses import dataclass

import torch

from ffnet import postprocess
from ffnet.errors import UserError

# Pixels from which compiling pays, on a device: what it takes (one to two and a half minutes on two CPU cores) over
# what it saves.
PAYS_FROM = {"cpu": 250 * 1024 * 2048, "cuda": 5000 * 1024 * 2048}


@dataclass(frozen=True)
class Fast:
    """The passes as the sweep is to run them, and why so."""

    passes: dict  # name -> module or compiled module
    top_two: object  # compiled kernel for postprocess.predict, or None
    compiled: bool
    reason: str  # a line for the report


def make_fast(passes, pixels, batch_size, device, compile=None):
    """The passes (name -> callable) in their faster memory format and, if it pays or `compile` says so, compiled.

    `pixels` of the whole run decide where `compile` is None. UserError where compiling was asked for and nothing can
    compile; left to decide, the run stays eager then and says so. On a CPU they take an image at a time.
    """
    compiles, reason = _choose(pixels, device, compile)
    ready = {name: _made_fast(model, batch_size, device, compiles) for name, model in passes.items()}
    return Fast(ready, compiled_kernel(device) if compiles else None, compiles, reason)


def _choose(pixels, device, compile):
    """Whether to compile, and why, in a line."""
    if compile is False:
        return False, "eager: --no-compile"
    if compile is None and pixels < PAYS_FROM[device.type]:
        return False, "eager: too few images to earn the compile time back"
    problem = compiler_problem(device)
    if problem and compile:
        raise UserError(f"--compile: {problem}; install a compiler, or give --no-compile")
    if problem:
        return False, f"eager: {problem}"
    return True, f"compiled: {'--compile' if compile else 'enough images to earn the compile time back'}"


def _made_fast(model, batch_size, device, compiles):
    model = in_faster_format(model, device)
    compiles = compiles and isinstance(model, torch.nn.Module)
    network = torch.compile(model, dynamic=False) if compiles else model
    if device.type == "cpu":
        return image_by_image(network)
    return Filled(network, batch_size) if compiles else network


def image_by_image(model):
    """The callable on one image of a batch after the other.

    On a CPU that takes a quarter less time, for activations stay in its caches, and the logits of an image are the
    same to the last bit whatever batch it comes in: oneDNN splits sums otherwise for other batch sizes.
    """
    return lambda inputs: model(inputs) if len(inputs) == 1 else torch.cat([model(image) for image in inputs.split(1)])


def in_faster_format(model, device):
    """The model with weights channels_last on a CPU: its convolutions take a third less so (40S_dBBB, two cores)."""
    return model.to(memory_format=memory_format(device)) if isinstance(model, torch.nn.Module) else model


def memory_format(device):
    """The memory format of inputs and weights."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


class Filled:
    """A network compiled for one batch size: smaller batches are filled up to it."""

    def __init__(self, network, batch_size):
        self.network, self.batch_size = network, batch_size

    def __call__(self, inputs):
        """Logits (N, 19, h, w) of inputs (N, 3, H, W)."""
        filling = max(0, self.batch_size - len(inputs))
        if filling:
            return self.network(torch.cat([inputs, inputs[:1].expand(filling, -1, -1, -1)]))[: len(inputs)]
        return self.network(inputs)


def shrink(network, batch_size):
    """Has a Filled network compile for smaller batches from now on; others take them as they are."""
    if isinstance(network, Filled):
        network.batch_size = batch_size


def compiled_kernel(device):
    """postprocess.top_two in one kernel: on a CPU, where full-size logits cost; a GPU upsamples in no time."""
    if device.type != "cpu":
        return None
    whole = dict.fromkeys(
        ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 10**6
    )
    return torch.compile(postprocess.top_two, dynamic=False, options=whole)


def compiler_problem(device):
    """Why torch.compile can't work on this device, in a line; None if it does, seen by compiling a sum."""
    try:
        torch.compile(_sum)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing, a compiler, its headers, triton: the run goes on without
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.compile does not work here ({first[:150]})"
    return None


def _sum(x):
    return x + x
