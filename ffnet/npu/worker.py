"""Compile and run ONNX files with Qualcomm's runtime for its NPU, in a process of its own. Needs no torch.

`onnxruntime-qnn` is ONNX Runtime's plugin for the NPU (the Hexagon Tensor Processor, HTP). On a PC without one, the
plugin executes the network that it compiled for a chip in software, with the NPU's arithmetic.

The plugin prints on stdout and stderr past Python and can crash: `serve` keeps both from the main process.
"""

import contextlib
import functools
import os
import re
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime

from ffnet.chips import Chip
from ffnet.system.errors import UserError
from ffnet.system.text import count, list_names, runtime_reason

PLUGIN = "QNNExecutionProvider"
# What the plugin logs for a node that the NPU refuses; Conv and Resize get the suffix from ONNX Runtime.
REFUSED = re.compile(r"failed for node `(.+?)(?:_token_\d+|_\d+)?` of type `(\w+)`")


class NodesRefusedError(UserError):
    """An error about nodes that the NPU can't run; it can be sent to another process."""

    def __init__(self, message: str, nodes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nodes = list(nodes)


@dataclass(frozen=True)
class NpuTarget:
    """What is compiled for which chip."""

    path: Path  # ONNX file
    chip: Chip
    fallback: bool = False  # nodes that the NPU refuses may run on the CPU


@dataclass(frozen=True)
class NpuSession:
    """How a file runs on the NPU."""

    hardware: bool  # an NPU in this PC runs it; otherwise the software does
    qairt: str  # version of Qualcomm's libraries in the package
    cpu_nodes: tuple[str, ...]  # names of the nodes that run on the CPU
    inputs: tuple[dict[str, Any], ...]  # name, shape and dtype
    outputs: tuple[dict[str, Any], ...]


def serve(connection: Connection) -> None:
    """Call the functions that arrive with their arguments, and send back results or errors, until the other end closes.

    What this process prints goes to a file, which the functions take as `log`. Ctrl-C is left to the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryFile() as log, contextlib.suppress(EOFError):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        while True:
            function, *arguments = connection.recv()
            try:
                answer = function(*arguments, log=log)
            except Exception as error:
                answer = error
            connection.send(answer)


def describe_session(target: NpuTarget, context: Path | None = None, *, log: BinaryIO) -> NpuSession:
    """Compile a file and return how it runs.

    Write the compiled network to `context` (.onnx), if given, and beside it the binary for the chip.
    """
    return _compile(target, context, log)[1]


def run(target: NpuTarget, image: np.ndarray, log: BinaryIO) -> dict[str, np.ndarray]:
    """Return the outputs of a file by name for its input, (1, 3, H, W) of the file's type."""
    session, _ = _compile(target, None, log)
    try:
        arrays = session.run(None, {session.get_inputs()[0].name: image})
    except Exception as error:  # onnxruntime's exceptions share no base class
        message = f"{target.path}: onnxruntime-qnn failed while running this file ({runtime_reason(error)})"
        raise UserError(f"{message}. Check that the file takes images of this size.") from error
    return dict(zip((output.name for output in session.get_outputs()), arrays, strict=True))


@functools.lru_cache(maxsize=1)
def _compile(target: NpuTarget, context: Path | None, log: BinaryIO) -> tuple[onnxruntime.InferenceSession, NpuSession]:
    """Return a session on the NPU with its description."""
    device, hardware = _device()
    provider = {"backend_path": _qnn().get_qnn_htp_path(), "offload_graph_io_quantization": "0"}
    if not hardware:  # a PC with an NPU compiles for its own
        provider["soc_model"] = str(target.chip.soc_model)
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices([device], provider)
    settings = {"session.record_ep_graph_assignment_info": "1"}
    if context:
        settings |= {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    begin = log.seek(0, os.SEEK_END)
    try:
        session = onnxruntime.InferenceSession(str(target.path), options)
    except Exception as error:  # onnxruntime's exceptions share no base class
        log.seek(begin)
        raise _refusal(target, log.read().decode(errors="replace"), error) from error
    groups = session.get_provider_graph_assignment_info()
    cpu_nodes = tuple(node.name for group in groups if group.ep_name != PLUGIN for node in group.get_nodes())
    if cpu_nodes and not target.fallback:
        raise NodesRefusedError(
            f"--npu {target.chip.part}: {count(len(cpu_nodes), 'node')} of {target.path} can't run on this NPU: "
            f"{list_names(cpu_nodes)}. Add --npu-fallback to run them on the CPU, or name another chip.",
            cpu_nodes,
        )
    qairt = _qnn().build_and_package_info.qnn_version
    inputs, outputs = (
        tuple({"name": each.name, "shape": each.shape, "dtype": each.type} for each in values)
        for values in (session.get_inputs(), session.get_outputs())
    )
    return session, NpuSession(hardware, qairt, cpu_nodes, inputs, outputs)


def _refusal(target: NpuTarget, log: str, error: Exception) -> UserError:
    """Return the error for a file that can't be compiled; `log`: what the plugin printed meanwhile."""
    refused = list(dict.fromkeys(f"{name} ({operator})" for name, operator in REFUSED.findall(log)))
    subject = f"--npu {target.chip.part}: {target.path} can't be compiled for this NPU"
    if not refused:
        reason = f"onnxruntime-qnn says {runtime_reason(error)!r}. Name another chip; --npu list prints them."
        return UserError(f"{subject}: {reason}")
    return NodesRefusedError(
        f"{subject}, which refuses {count(len(refused), 'node')}: {list_names(refused)}. ONNX Runtime can't move them "
        "to the CPU either, because the nodes around them are already laid out for the NPU. Name another chip.",
        refused,
    )


@functools.cache
def _qnn() -> Any:
    """Import the optional plugin and register it with ONNX Runtime; raise a UserError if a library is missing."""
    try:
        import onnxruntime_qnn

        onnxruntime.register_execution_provider_library(PLUGIN, onnxruntime_qnn.get_library_path())
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise UserError(
            f"--npu: onnxruntime-qnn can't be loaded ({runtime_reason(error)}). Install it again with `pip install -r "
            "requirements-npu.txt`, or remove --npu."
        ) from error
    return onnxruntime_qnn


def _device() -> tuple[Any, bool]:
    """Return the device that the plugin runs networks on, and whether it is an NPU in this PC."""
    _qnn()
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PLUGIN]
    npus = [device for device in devices if device.device.type == onnxruntime.OrtHardwareDeviceType.NPU]
    if not devices:
        raise UserError("--npu: onnxruntime-qnn finds no device here. Install it again with requirements-npu.txt.")
    return (npus or devices)[0], bool(npus)
