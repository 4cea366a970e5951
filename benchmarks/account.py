"""The process that `benchmarks.accounting` starts: a run of the program that counts its own time.

It imports nothing but the standard library before it begins to count.
"""

import contextlib
import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REST = "rest of the program"


class Account:
    """Exclusive wall time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = [REST]
        self._since = time.time()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time in the block under a name, and not under that around it."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def function(self, name: str, owner: Any, attribute: str) -> None:
        """Count every call of a function or method under a name."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.of(name):
                return original(*arguments, **options)

        setattr(owner, attribute, counted)

    def items(self, name: str, owner: Any, attribute: str) -> None:
        """Count the time in which a generator function's results wait for their next item under a name."""
        original = getattr(owner, attribute)

        def counted(*arguments: Any, **options: Any) -> Iterator[Any]:
            items = iter(original(*arguments, **options))
            try:
                while True:
                    with self.of(name):
                        item = next(items, items)
                    if item is items:
                        return
                    yield item
            finally:
                items.close()

        setattr(owner, attribute, counted)


def run_accounted() -> None:
    """Run the program with this process's arguments, and write its account; the parent started it."""
    begin = time.time()
    path, *argv = sys.argv[1:]
    account = Account()
    import ffnet_quanteval

    imports = ffnet_quanteval.garbage_collection_paused

    @contextlib.contextmanager
    def counted_imports() -> Iterator[None]:
        with account.of("imports of torch, AIMET and the program"), imports():
            yield
        instrument(account)

    ffnet_quanteval.garbage_collection_paused = counted_imports
    status = ffnet_quanteval.main(argv)
    account._switch()
    Path(path).write_text(json.dumps({"begin": begin, "end": time.time(), "seconds": account.seconds}))
    sys.exit(status)


def instrument(account: Account) -> None:
    """Count the stages of a run, and the parts of the calibration and of the evaluation."""
    from ffnet.evaluation import loading, loop
    from ffnet.quantization import quantize, tf_enhanced
    from ffnet.report import delivery
    from ffnet.run import session

    timed = session.timed

    @contextlib.contextmanager
    def counted(name: str, stage_seconds: dict[str, float]) -> Iterator[None]:
        with account.of(name), timed(name, stage_seconds):
            yield

    session.timed = counted
    account.items("waiting for decoded images", loading, "load_batches")
    account.items("copies to the device", loop, "moved")
    account.function("networks, predictions and counts", loop, "_launch")
    account.function("waiting for the device and its counts", loop.LaunchedBatch, "scores")
    account.function("histograms", tf_enhanced.FastTfEnhancedAnalyzer, "update_stats")
    account.function("search for ranges", tf_enhanced.FastTfEnhancedAnalyzer, "compute_encodings_from_stats")
    account.function("lower the simulation", quantize, "lower")
    account.function("report", delivery, "deliver_result")


if __name__ == "__main__":
    run_accounted()
