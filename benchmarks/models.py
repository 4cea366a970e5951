"""Measure what several models in one run of the program save, and whether its memory grows with the number of images.

    python -m benchmarks.models [--json] [--images N] [--rounds N] [--threads N]

Time: two published models and the demo's two, each in a run of its own and both in one, alternately, on rendered scenes
of 1024x2048. Memory: five small networks in all backends on 50 and on 500 images of 64x128. All weights are random. The
NPU is left out if onnxruntime-qnn is not installed. Linux only.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed
from benchmarks.measured_program import SMALL_VARIANTS
from benchmarks.models_measurements import Memory, Round, Sharing, measure_memory, measure_sharing
from benchmarks.tables import markdown
from ffnet.variants import DEMO_VARIANTS

PUBLISHED = ("segmentation_ffnet40S_dBBB_mobile", "segmentation_ffnet122NS_CCC_mobile_pre_down")
MEMORY_IMAGES = (50, 500)
LARGEST_GROWTH = 0.05  # of the memory from the first to the last of MEMORY_IMAGES
TIMES = {"run": "whole run", "evaluation": "evaluation", "processor": "processor time of the whole run"}
TIME_COLUMNS = ("models", "two runs, s", "one run, s", "one over two")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times and the memory."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = speed.write_images(folder, args.images)
        pairs = {"demo": DEMO_VARIANTS, "published": PUBLISHED}
        sharing = [
            measure_sharing(pair, images, folder / kind, args.rounds, torch.get_num_threads())
            for kind, pair in pairs.items()
        ]
    memory = measure_memory(MEMORY_IMAGES, npu=importlib.util.find_spec("onnxruntime_qnn") is not None)
    outcome = {"machine": speed.machine(torch.device("cpu")), "sharing": sharing, "memory": memory}
    print(json.dumps(outcome, default=dataclasses.asdict) if args.json else format_outcome(outcome))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--images", type=int, default=4, help="of 1024x2048; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="while time is measured; default: as torch chooses")
    return parser.parse_args(argv)


def format_outcome(outcome: dict[str, Any]) -> str:
    """Return the outcome as Markdown tables, with sentences below them."""
    sharing, memory = outcome["sharing"], outcome["memory"]
    lines = [outcome["machine"], "", *markdown([TIME_COLUMNS, *(row for pair in sharing for row in time_rows(pair))])]
    lines += ["", *map(describe_decoding, sharing), "", *markdown(memory_rows(memory)), "", describe_growth(memory)]
    return "\n".join(lines)


def time_rows(pair: Sharing) -> list[list[str]]:
    """Return a row for each of the times of two models."""
    return [time_row(pair, field, label) for field, label in TIMES.items()]


def time_row(pair: Sharing, field: str, label: str) -> list[str]:
    """Return medians of all rounds; `field`: of `Seconds`."""
    one, two = ([getattr(getattr(each, runs), field) for each in pair.rounds] for runs in ("one_run", "two_runs"))
    seconds = [f"{statistics.median(values):.1f}" for values in (two, one)]
    return [f"{short_names(pair)}, {label}", *seconds, f"{one_over_two(pair.rounds, field):.3f}"]


def one_over_two(rounds: Sequence[Round], field: str) -> float:
    """Return the median over all rounds of the time of one run over that of two; `field`: of `Seconds`."""
    return statistics.median(getattr(each.one_run, field) / getattr(each.two_runs, field) for each in rounds)


def decoding_share(pair: Sharing) -> float:
    """Return the median over all rounds of the time of decoding once over that of the evaluation in two runs."""
    ratios = zip(pair.decoding_seconds, pair.rounds, strict=True)
    return statistics.median(seconds / each.two_runs.evaluation for seconds, each in ratios)


def describe_decoding(pair: Sharing) -> str:
    """Return a sentence on the decoding that one run saves."""
    seconds = statistics.median(pair.decoding_seconds)
    return (
        f"{short_names(pair)}: decoding the {pair.images} images once takes {seconds:.2f} s alone, "
        f"{100 * decoding_share(pair):.1f} % of the evaluation in two runs."
    )


def short_names(pair: Sharing) -> str:
    """Return the names of the models without what all names begin with."""
    return " and ".join(model.removeprefix("segmentation_") for model in pair.models)


def memory_rows(memory: Sequence[Memory]) -> list[list[str]]:
    """Return the rows of the table of memory, with a column for the NPU if it ran."""
    heading = ["images", "main process, GB", *(["processes of the NPU, GB"] if has_npu(memory) else [])]
    rows = [[str(each.images), *(f"{size / 1e9:.3f}" for size in sizes(each))] for each in memory]
    return [heading, *rows, ["growth", *(f"{100 * value:+.1f} %" for value in growth(memory))]]


def sizes(memory: Memory) -> list[int]:
    """Return the measured sizes in bytes: of the main process and, if it ran, of the NPU."""
    return [memory.main, *([] if memory.npu is None else [memory.npu])]


def has_npu(memory: Sequence[Memory]) -> bool:
    """Return whether the NPU ran."""
    return memory[0].npu is not None


def growth(memory: Sequence[Memory]) -> list[float]:
    """Return by which share of the first each size in the last measurement is larger."""
    return [last / first - 1 for first, last in zip(sizes(memory[0]), sizes(memory[-1]), strict=True)]


def describe_growth(memory: Sequence[Memory]) -> str:
    """Return a sentence on what was measured and whether the target is met."""
    backends = "FP32, simulated, on ONNX Runtime" + (" and on the emulated NPU" if has_npu(memory) else "")
    missing = "" if has_npu(memory) else " The NPU is missing, because onnxruntime-qnn is not installed."
    met = "met" if max(growth(memory)) <= LARGEST_GROWTH else "missed"
    return (
        f"{len(SMALL_VARIANTS)} small networks in one run, {backends}: the target, a growth of at most "
        f"{100 * LARGEST_GROWTH:.0f} %, is {met}.{missing}"
    )


if __name__ == "__main__":
    main()
