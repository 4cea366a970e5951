"""The context in which torch has pretended GPUs."""

import contextlib
import time
import unittest.mock
import warnings

import torch

from tests.helpers.pretend_gpu.guard import load_guard
from tests.helpers.pretend_gpu.kernels import UNLIMITED, Kernels

NAME = "pretended"


@contextlib.contextmanager
def pretend_gpu(guard, count=1, memory=UNLIMITED):
    """Have `count` GPUs with this memory, by the library that `build_guard` returned."""
    load_guard(guard).install(count)
    library = torch.library.Library("aten", "IMPL")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        stack.callback(library._destroy)
        Kernels(guard, memory).register(library)
        for owner, functions in replaced_functions(load_guard(guard), count).items():
            for name, function in functions.items():
                stack.enter_context(unittest.mock.patch.object(owner, name, function))
        stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False  # its operators have no CPU kernels
        with torch.autograd.set_multithreading_enabled(False):
            yield


class Event:
    """An event that is reached at once: the pretended GPU finishes all work before it returns."""

    def __init__(self, enable_timing=False):
        self._time = None

    def record(self):
        self._time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end._time - self._time)


class Stream:
    """A stream on which nothing waits."""

    def __init__(self, device=None):
        pass

    def wait_event(self, event):
        pass


def replaced_functions(guard, count):
    """Return torch's functions that need a driver, as {owner: {name: function without a driver}}."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: guard.current(),  # torch hashes it, which ctypes does not allow
        "set_device": lambda device: guard.choose(torch.device(device).index or 0),
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: NAME,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "empty_cache": lambda: None,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "_lazy_init": lambda: None,
    }
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": lambda: guard.current(),
        "set_device_index": lambda index: None,
    }
    tensor = {
        "__deepcopy__": deepcopied,
        "__reduce_ex__": reduced,
        "pin_memory": lambda tensor, device=None: tensor.clone(),
        "to": lambda tensor, *args, non_blocking=False, **options: _to(tensor, *args, **options),  # without pinning
        "record_stream": lambda tensor, stream: None,
    }
    return {torch.cuda: cuda, torch.accelerator: accelerator, torch.Tensor: tensor}


_deepcopy, _reduce_ex, _to = torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__, torch.Tensor.to


def deepcopied(tensor, memo):
    """Do what Tensor.__deepcopy__ does, which for a tensor on the device would ask the driver for memory."""
    if not tensor.is_cuda:
        return _deepcopy(tensor, memo)
    if id(tensor) not in memo:
        copy = tensor.detach().clone().as_subclass(type(tensor)).requires_grad_(tensor.requires_grad)
        copy.__dict__.update(tensor.__dict__)
        memo[id(tensor)] = copy
    return memo[id(tensor)]


def reduced(tensor, protocol):
    """Do what Tensor.__reduce_ex__ does to pickle a tensor, which for one on the device would ask the driver."""
    return (placed, (tensor.cpu(), str(tensor.device))) if tensor.is_cuda else _reduce_ex(tensor, protocol)


def placed(tensor, device):
    """Return a tensor that was pickled, on its device."""
    return tensor.to(device)
