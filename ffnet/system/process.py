"""The process: its standard streams, the signals that terminate it, and the folders it needs. Needs no torch."""

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from tqdm import tqdm

from ffnet.system.errors import UserError
from ffnet.system.text import printable

ENDING_SIGNALS = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
SILENT_SECONDS = 9.0  # without progress on stderr, after which it is said that the work goes on
PROGRESS_SECONDS = 9.0  # between two lines of a progress bar, if stderr is not a terminal
REPEAT_SECONDS = 5.0  # `timeout`, for one, sends its signal twice; the second must not interrupt the cleanup

logger = logging.getLogger(__name__)


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
    sys.stderr = cast(TextIO, _Stderr(stderr))
    try:
        yield
    finally:
        sys.stderr = stderr
        try:
            sys.stdout.flush()
        except OSError:
            discard_output(sys.stdout)  # otherwise Python tries again at exit, with a message and another status


class _Stderr:
    """A text stream that escapes control characters and discards everything after its first error.

    Unless it is a terminal, a progress bar, which tqdm draws anew after each carriage return, becomes a line at its end
    and one every PROGRESS_SECONDS.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._bar = ""  # state of a bar that is not written yet
        self._line_begins = True
        self._bar_written = 0.0
        self.last_written = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        redraws = text.startswith("\r")
        keep = "\t\n\r" if redraws else "\t\n"
        shown = text if self._in_place else self._without_bars(text, redraws)
        self.last_written = time.monotonic() if shown else self.last_written
        try:
            self._stream.write(printable(shown, keep))
        except OSError:
            discard_output(self._stream)
        return len(text)

    def _without_bars(self, text: str, redraws: bool) -> str:
        now = time.monotonic()
        if redraws:
            self._bar_written = self._bar_written if self._bar else now
            self._bar, text = text.rpartition("\r")[2].strip(), ""
            if self._bar and now - self._bar_written >= PROGRESS_SECONDS:
                text, self._bar_written = f"{self._bar}\n", now
        elif text == "\n" and self._bar and self._line_begins:
            text, self._bar = f"{self._bar}\n", ""
        self._line_begins = text.endswith("\n") if text else self._line_begins
        return text

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream)


def print_lines(*lines: str) -> None:
    """Print lines to stdout with escaped control characters; discard them if the reader has closed the pipe.

    Raises:
        UserError: If stdout can't be written, for instance because its disk is full.
    """
    try:
        print(*(printable(line, keep="\n") for line in lines), sep="\n", flush=True)
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
    process, last = os.getpid(), -REPEAT_SECONDS

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != process:  # a forked process terminates as it would without a handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        before, last = last, time.monotonic()
        if last - before >= REPEAT_SECONDS:
            raise Terminated(number)

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def log_to_stderr(log: logging.Logger, quiet: bool) -> None:
    """Show the messages of a logger on stderr, each on one line; only errors if `quiet`."""
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.handlers[0].setFormatter(_OneLine())
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.propagate = False  # AIMET gives the root logger a handler of its own


@contextlib.contextmanager
def heartbeat(title: str, shown: bool = True) -> Iterator[None]:
    """Redraw progress bars, or say how long the work takes, after every SILENT_SECONDS without output on stderr."""
    ended, begin = threading.Event(), time.monotonic()

    def beat() -> None:
        last = begin
        while not ended.wait(0.5):
            last, now = max(last, getattr(sys.stderr, "last_written", 0.0)), time.monotonic()
            if now - last < SILENT_SECONDS:
                continue
            if bars := list(getattr(tqdm, "_instances", ())):
                for bar in bars:
                    bar.refresh()
            else:
                logger.info(f"{title}: {now - begin:.0f} s so far")
                last = now

    thread = threading.Thread(target=beat, daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        ended.set()


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def check_folders() -> None:
    """Raise a UserError if there is no home or no temporary folder, without which AIMET can't be imported."""
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError("HOME is not set, and the system knows no home folder of this user. Set HOME.") from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"TMPDIR: {error.strerror}. Set it to a folder that can be written to.") from error
