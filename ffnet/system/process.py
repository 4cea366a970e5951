"""The process: its standard streams, the signals that terminate it, and its home folder. Needs no torch."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from ffnet.system.errors import UserError

ENDING_SIGNALS = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
REPEAT_SECONDS = 5.0  # `timeout`, for one, sends its signal twice; the second must not interrupt the cleanup


class Terminated(KeyboardInterrupt):
    """The program received a signal that asks it to terminate; handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt_status(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status after an interrupt, as in shells: 128 plus the number of the signal."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def prepared_streams() -> Iterator[None]:
    """Prepare stdout and stderr for the duration of the program.

    Closed streams are replaced by the null device. Characters that a stream can't encode are escaped. What can't be
    written to stderr is discarded, so that a problem with progress and messages loses no results.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stderr = sys.stderr
    sys.stderr = cast(TextIO, _DroppingStream(stderr))
    try:
        yield
    finally:
        sys.stderr = stderr
        try:
            sys.stdout.flush()
        except OSError:
            discard_output(sys.stdout)  # otherwise Python tries again at exit, with a message and another status


class _DroppingStream:
    """A text stream that discards everything after its first error instead of raising it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            discard_output(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream)


def print_lines(*lines: str) -> None:
    """Print lines to stdout; discard them if the reader has closed its end of the pipe.

    Raises:
        UserError: If stdout can't be written, for instance because its disk is full.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        discard_output(sys.stdout)
    except OSError as error:
        raise UserError(
            f"stdout can't be written ({error.strerror}). Free some space, or redirect it elsewhere."
        ) from error


def discard_output(stream: TextIO) -> None:
    """Redirect a stream, including what it has buffered, to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise Terminated on signals that ask the program to terminate; restore their handling afterwards.

    Signals that are ignored, as under `nohup`, or that already have a handler are left alone. Python allows handlers in
    the main thread only, so nothing changes in another thread.
    """
    numbers = [getattr(signal, name) for name in ENDING_SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    handler = _Handler()
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _Handler:
    """Raises Terminated in this process; a forked process terminates as it would without a handler."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._last = -REPEAT_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        now, last = time.monotonic(), self._last
        self._last = now
        if now - last >= REPEAT_SECONDS:
            raise Terminated(number)


def log_to_stderr(log: logging.Logger, quiet: bool) -> None:
    """Show the messages of a logger on stderr; only errors if `quiet`."""
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.propagate = False  # AIMET gives the root logger a handler of its own


def check_home() -> None:
    """Raise a UserError if this user has no home folder, without which AIMET can't be imported."""
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError("HOME is not set, and the system knows no home folder of this user. Set HOME.") from error
