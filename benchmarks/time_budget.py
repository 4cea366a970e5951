"""Keep a program within a time that is given beforehand. Linux only."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

REPEAT_SECONDS = 5.0  # between interruptions of code that goes on after one


class OutOfTime(BaseException):
    """The time is over. Like KeyboardInterrupt no Exception, so that neither compilers nor error rows handle it."""


@dataclass(frozen=True)
class Budget:
    """A number of seconds from now on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begin", self.clock())

    @property
    def used(self) -> float:
        """The seconds that have gone by."""
        return self.clock() - self.begin

    @property
    def left(self) -> float:
        """The seconds that remain; negative if they are over."""
        return self.seconds - self.used


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread if the block takes longer; it must not stand in another one."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
