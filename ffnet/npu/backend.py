"""Run exported files on Qualcomm's NPU, emulated on a PC or in hardware, in processes of their own."""

import dataclasses
import importlib.metadata
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffnet.chips import CHIPS
from ffnet.config import CONTEXT_FILE, MODEL_FILE, NPU_FOLDER, NpuConfig
from ffnet.npu import worker as npu_worker
from ffnet.npu.worker import NpuSession, NpuTarget
from ffnet.onnx.input_format import NORMALIZED_RGB, InputFormat
from ffnet.onnx.runtime import resize
from ffnet.onnx.validation import check_onnx
from ffnet.system.errors import UserError


class NpuProcess(AbstractContextManager):
    """A process that calls the functions of `npu_worker` for one target; it ends on exit, even during a call."""

    def __init__(self, target: NpuTarget) -> None:
        self._target = target
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=npu_worker.serve, args=(remote,), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        remote.close()

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the process call a function; its target comes first among the arguments."""
        try:
            self._connection.send((function, self._target, *arguments))
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> Any:
        """Return the result of the call, or raise its error; a UserError if the process has ended."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the process and return its result."""
        self.send(function, *arguments)
        return self.receive()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ended(self) -> UserError:
        """Return the error for a process that ended although it was still needed."""
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        cause = "Perhaps the memory did not suffice" if code == -signal.SIGKILL else "Qualcomm's library crashed in it"
        return UserError(
            f"--npu: the process that runs {self._target.path} for {self._target.chip.part} {how}. {cause}. Run "
            "again with --npu-images 1 to see whether it happens again, or without --npu."
        )


class NpuBackend(ExitStack):
    """An ONNX file on the NPU as a backend. Each image of a batch runs in a process of its own; `close` ends them."""

    def __init__(self, target: NpuTarget, processes: int = 1, input_format: InputFormat = NORMALIZED_RGB) -> None:
        """Compile the file; raise a UserError if that is impossible. On the hardware there is one process only."""
        super().__init__()
        self.target = target
        self.input_format = input_format
        self.header = check_onnx(target.path)
        if None in self.header.input_shape:
            raise UserError(
                f"--npu {target.chip.part}: {target.path} has an input of variable shape, and the NPU needs a fixed "
                "one. Export the network with batch size 1 and a fixed height and width."
            )
        self.processes = [self.enter_context(NpuProcess(target))]
        try:
            self.session: NpuSession = self.processes[0].call(npu_worker.describe_session)
            self.start_processes(processes)
        except BaseException:
            self.close()
            raise

    def start_processes(self, processes: int) -> None:
        """Have at least N processes, each of which compiles the file; on the hardware there is one only."""
        missing = 0 if self.session.hardware else processes - len(self.processes)
        started = [self.enter_context(NpuProcess(self.target)) for _ in range(missing)]
        for process in started:
            process.send(npu_worker.describe_session)
        for process in started:
            process.receive()
        self.processes += started

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """Return logits (N, classes, h, w) float32 of normalized images (N, 3, H, W) float32, on the CPU."""
        images = resize(self.input_format.convert(images.cpu()), self.header.input_shape[2:]).contiguous()
        arrays, outputs = self.header.encode(images.numpy()), []
        for start in range(0, len(arrays), len(self.processes)):
            group = list(zip(self.processes, arrays[start:], strict=False))
            for process, image in group:
                process.send(npu_worker.run, image[None])
            outputs += [process.receive()[self.header.output_name] for process, _ in group]
        return torch.from_numpy(self.header.decode(np.concatenate(outputs)))


@contextmanager
def open_on_npu(target: NpuTarget) -> Iterator[Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Open a file in a process; the result returns all outputs by name for an image (1, 3, H, W) float32."""
    with NpuProcess(target) as process:
        yield partial(process.call, npu_worker.run)


def write_npu_contexts(work: Path, npu: NpuConfig) -> dict[str, Any]:
    """Compile `model.onnx` in `work` for the chips that take it, at least one; return entries of the manifest."""
    entries, errors = list[dict[str, Any]](), list[UserError]()
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "onnxruntime-qnn")}
    for chip in (CHIPS[part] for part in npu.chips):
        file = work / NPU_FOLDER / chip.part / CONTEXT_FILE
        try:
            with NpuProcess(NpuTarget(work / MODEL_FILE, chip, npu.fallback)) as process:
                process.call(npu_worker.describe_session)  # a chip that refuses the file gets no folder
                file.parent.mkdir(parents=True)
                session = dataclasses.asdict(process.call(npu_worker.describe_session, file))
        except UserError as error:
            errors.append(error)
            continue
        entry = {"chip": dataclasses.asdict(chip), "file": file.relative_to(work).as_posix()}
        entries.append(entry | {"versions": versions | {"qairt": session.pop("qairt")}, **session})
    if not entries:
        raise errors[0]
    return {"npu": entries[0], **({"npu_others": entries[1:]} if len(npu.chips) > 1 else {})}
