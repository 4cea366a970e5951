"""The networks made fast: memory formats, and torch.compile where a run is long enough to earn the compile time."""

from dataclasses import dataclass

import torch

from ffnet import postprocess
from ffnet.errors import UserError

# Pixels from which compiling pays, on a device: what it takes (about a minute on two CPU cores) over what it saves.
PAYS_FROM = {"cpu": 250 * 1024 * 2048, "cuda": 5000 * 1024 * 2048}


@dataclass(frozen=True)
class Fast:
    """The passes as the sweep is to run them, and why so."""

    passes: dict  # name -> module or compiled module
    top_two: object  # compiled kernel for postprocess.predict, or None
    compiled: bool
    reason: str  # a line for the report


def make_fast(passes, pixels, batch_size, device, compile=None):
    """The passes (name -> module) in their faster memory format and, if it pays or `compile` says so, compiled.

    `pixels` of the whole run decide where `compile` is None. UserError where compiling was asked for and nothing can
    compile; left to decide, the run stays eager then and says so.
    """
    passes = {name: in_faster_format(model, device) for name, model in passes.items()}
    wanted = pixels >= PAYS_FROM[device.type] if compile is None else compile
    if not wanted:
        reason = "--no-compile" if compile is False else "too few images to earn the compile time back"
        return Fast(passes, None, False, f"eager: {reason}")
    problem = compiler_problem(device)
    if problem and compile:
        raise UserError(f"--compile: {problem}; install a compiler, or give --no-compile")
    if problem:
        return Fast(passes, None, False, f"eager: {problem}")
    reason = "--compile" if compile else "enough images to earn the compile time back"
    return Fast(
        {name: compiled(model, batch_size) for name, model in passes.items()},
        compiled_kernel(device),
        True,
        f"compiled: {reason}",
    )


def in_faster_format(model, device):
    """The model with weights channels_last on a CPU: its convolutions take a third less so (40S_dBBB, two cores)."""
    return model.to(memory_format=memory_format(device)) if isinstance(model, torch.nn.Module) else model


def memory_format(device):
    """The memory format of inputs and weights."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def compiled(model, batch_size):
    """The torch module compiled for one shape, smaller batches being filled up; any other callable as it is."""
    if not isinstance(model, torch.nn.Module):
        return model
    network = torch.compile(model, dynamic=False)

    def run(inputs):
        nonlocal batch_size
        count = len(inputs)
        filling = max(0, batch_size - count)
        try:
            return network(torch.cat([inputs, inputs[:1].expand(filling, -1, -1, -1)]) if filling else inputs)[:count]
        except torch.cuda.OutOfMemoryError:
            batch_size = max(1, count if filling else count // 2)
            if filling:
                return network(inputs)
            raise

    return run


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
