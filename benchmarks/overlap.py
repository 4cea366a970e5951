"""Measure whether the evaluation loop takes as long as the slower of decoding and computing, and not as both.

    python -m benchmarks.overlap [--images N]

A stand-in for the network sleeps, which does not hold the interpreter's lock, as long as one thread decodes an image.
The last column is the speed of the same pure Python code beside that of no decoding: the rest is what decoding holds
of the lock.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.inputs import option_parser, write_images
from benchmarks.timing import describe_machine, markdown
from datasets import Split
from ffnet.config import Runtime
from ffnet.evaluation.loading import load_batches
from ffnet.evaluation.loop import evaluate

THREADS = (1, 4, 16)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for every number of decoding threads."""
    parser = option_parser("overlap", __doc__)
    parser.add_argument("--images", type=int, default=32, help="default %(default)s")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        images = write_images(Path(name) / "images", args.images, scenes=4)
        rows = [measure(images, threads) for threads in THREADS]
    heading = ("threads", "decoding, s", "computing, s", "loop, s", "loop over the slower", "Python's speed beside it")
    print("\n".join([describe_machine(), "", *markdown([heading, *rows])]))


def measure(images: Split, threads: int) -> Sequence[str]:
    """Return the row of a number of decoding threads."""
    runtime = Runtime(batch_size=1, num_workers=threads, quiet=True)
    alone = python_speed(lambda: time.sleep(2))
    beside = python_speed(lambda: all(True for _ in load_batches(images, runtime)))
    decoding = _seconds(lambda: all(True for _ in load_batches(images, runtime)))
    logits = torch.zeros(1, 19, 8, 16)

    def network(inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(2 * decoding / len(images))
        return logits

    decoded = [images[index] for index in range(len(images))]
    computing, loop = (
        _seconds(lambda each=each: evaluate({"sleep": network}, each, runtime)) for each in (decoded, images)
    )
    ratio = f"{loop / max(decoding, computing):.2f}"
    return str(threads), f"{decoding:.2f}", f"{computing:.2f}", f"{loop:.2f}", ratio, f"{100 * beside / alone:.0f} %"


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def python_speed(work: Callable[[], object]) -> float:
    """Return how many steps of pure Python a second this thread makes while another one works."""
    thread = threading.Thread(target=work)
    steps, begin = 0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        for _ in range(1000):
            steps += 1
    return steps / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
