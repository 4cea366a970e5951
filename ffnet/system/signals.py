"""Signals that ask the program to end: it ends as after Ctrl-C, with its files removed and its results kept."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

ENDING_SIGNALS = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
REPEAT_SECONDS = 5.0  # `timeout`, for one, sends its signal twice; a repetition must not interrupt the cleaning up


class Terminated(KeyboardInterrupt):
    """The program got a signal that asks it to end; handled wherever Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt_status(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status after an interrupt, as shells have it: 128 and the number of the signal."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Have the signals that ask the program to end raise Terminated, and restore their handling afterwards.

    A signal that is ignored, as under `nohup`, or that has a handler already is left alone. Python allows handlers in
    its main thread only, so that nothing changes in another one.
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
    """Raises Terminated in this process; a process that was forked from it ends as without a handler."""

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
