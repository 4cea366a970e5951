"""CUDA's operators, run on the CPU. A tensor on the device shares its memory with a CPU tensor, its host."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.helpers.pretend_gpu.guard import load_guard

ALSO = ("copy_", "_convolution")  # operators without a CUDA kernel that need the driver or cuDNN on a GPU
# Operators that take tensors of two devices on a GPU too; the others take at most numbers from the CPU.
MIXED = ("copy_", "index.Tensor", "index.Tensor_out", "index_put_", "_index_put_impl_")


@dataclass(frozen=True)
class Memory:
    """The memory of the GPU: no convolution or interpolation may return more than `limit` bytes; None: no limit.

    These are the results that grow with the batch. `error`: raised if there is no memory.
    """

    limit: int | None = None
    error: RuntimeError = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def allocate(self, operator, result):
        """Raise the error if there is no memory for the result of an operator."""
        grows = any(word in operator.name() for word in ("convolution", "upsample"))
        if self.limit is not None and grows and result.nbytes > self.limit:
            raise self.error


UNLIMITED = Memory()


@dataclass(frozen=True)
class Kernels:
    """The operators of pretended GPUs."""

    guard: Path  # the library of `build_guard`
    memory: Memory = UNLIMITED

    def register(self, library):
        """Replace CUDA's kernels by those of this class, until the torch.library.Library is destroyed."""
        for operator in replaced_operators():
            name = operator.name().removeprefix("aten::")
            kernel = functools.partial(self.run, operator)
            library.impl(name, lambda *args, kernel=kernel, **kwargs: kernel(args, kwargs), "CUDA")

    def run(self, operator, args, kwargs):
        """Run an operator on the CPU; its results are on the device."""
        flat, spec = tree_flatten((args, kwargs))
        check_devices(operator, [value for value in flat if isinstance(value, torch.Tensor)])
        found = next(value for value in flat if is_on_device(value))
        device = found if isinstance(found, torch.device) else found.device
        hosts = {}
        args, kwargs = tree_unflatten([host_of(value, hosts) for value in flat], spec)
        kwargs |= dict.fromkeys({"pin_memory", "generator"} & kwargs.keys())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
            result = (operator.overloadpacket if takes_numbers(operator, args) else operator)(*args, **kwargs)
        for value, host in hosts.values():
            self.write_back(value, host)
        if isinstance(result, torch.Tensor):
            self.memory.allocate(operator, result)
        return tree_map(lambda value: self.moved_result(value, device, hosts), result)

    def write_back(self, value, host):
        """Give a tensor on the device that the operator resized its new shape and memory."""
        old, new = value.untyped_storage(), host.untyped_storage()
        if (old.data_ptr(), old.nbytes()) != (new.data_ptr(), new.nbytes()):
            value.set_(on_storage(host, self.device_storage(new, value.device)))
        elif (host.shape, host.stride()) != (value.shape, value.stride()):
            value.set_(on_storage(host, old))

    def moved_result(self, result, device, hosts):
        """Return a result on the device: the operand that was changed in place, a view of one, or a new tensor."""
        if not isinstance(result, torch.Tensor):
            return result
        if id(result) in hosts:
            return hosts[id(result)][0]
        for value, host in hosts.values():
            if host.untyped_storage()._cdata == result.untyped_storage()._cdata:
                return on_storage(result, value.untyped_storage())
        return on_storage(result, self.device_storage(result.untyped_storage(), device))

    def device_storage(self, host, device):
        """Return a storage on `device` in the memory of a CPU storage, which it keeps alive."""
        guard = load_guard(self.guard)
        index = guard.current() if device.index is None else device.index
        if index >= guard.count():
            raise RuntimeError("CUDA error: invalid device ordinal")
        address = host.data_ptr(), torch.device("cuda", index), host.nbytes()
        storage = torch._C._construct_storage_from_data_pointer(*address)
        storage.host = host
        return storage


def replaced_operators():
    """Yield every operator with a CUDA kernel that touches memory, and ALSO."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for name in (*names, *(f"aten::{name}" for name in ALSO)):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace == "aten" and base != "set_":
            operator = getattr(getattr(torch.ops.aten, base), overload or "default")
            if not any(value.alias_info and not value.alias_info.is_write for value in operator._schema.returns):
                yield operator


def check_devices(operator, tensors):
    """Raise the RuntimeError of a GPU if the operands are on several devices."""
    devices = {value.device for value in tensors if value.is_cuda or value.dim()}
    if len(devices) > 1 and operator.name().removeprefix("aten::") not in MIXED:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {operator}")


def takes_numbers(operator, args):
    """Return whether a number is in the place of a tensor: torch unwraps those that came from Python."""
    pairs = zip(args, operator._schema.arguments, strict=False)
    return any(isinstance(value, (bool, int, float)) and str(argument.type) == "Tensor" for value, argument in pairs)


def is_on_device(value):
    """Return whether an argument of an operator is a tensor on the GPU, or the GPU itself."""
    return getattr(value, "is_cuda", False) or (isinstance(value, torch.device) and value.type == "cuda")


def host_of(value, hosts):
    """Return the host of a tensor on the device, and note both in `hosts`; the CPU for the device itself."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not is_on_device(value):
        return value
    host = torch.empty(0, dtype=value.dtype)
    host.set_(value.untyped_storage().host, value.storage_offset(), value.shape, value.stride())
    hosts[id(host)] = value, host
    return host


def on_storage(like, storage):
    """Return a tensor of the type and shape of `like` over a storage on the device."""
    metadata = {"dtype": like.dtype, "size": tuple(like.shape), "stride": like.stride()}
    metadata["storage_offset"] = like.storage_offset()
    return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(metadata, storage)
