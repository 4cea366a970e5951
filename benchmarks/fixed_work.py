"""Measure what a run takes that does not depend on the images: one of 64x128, in FP32 and in simulated INT8.

    python -m benchmarks.fixed_work [--json] [--model-name NAME] [--rounds N] [--threads N]

Every round is a process of its own; medians. The weights are random, because speed does not depend on them. Linux only.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import speed
from benchmarks.program import read_stage_seconds, run_program
from benchmarks.tables import markdown
from ffnet.variants import VARIANTS

SIZE = (64, 128)  # of the image: height, width
OUTSIDE_STAGES = "start of Python, imports, report and end"


@dataclass(frozen=True)
class FixedWork:
    """Times of one run, in seconds."""

    run: float  # wall time
    processor: float  # of all threads
    stages: Mapping[str, float]  # wall times

    @property
    def outside_stages(self) -> float:
        """Wall time that belongs to no stage."""
        return self.run - sum(self.stages.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times of the stages and of the whole run."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed.write_images(folder, 1, SIZE)
        torch.save(speed.random_model(args.model_name).state_dict(), folder / "weights.pth")
        rounds = [measure(folder, args.model_name, args.threads) for _ in range(args.rounds)]
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in rounds]))
    else:
        print("\n".join([speed.machine(torch.device("cpu")), "", *markdown(table(rounds))]))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fixed_work",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the times of every round as JSON")
    default = "segmentation_ffnet78S_dBBB_mobile"
    parser.add_argument("--model-name", default=default, choices=VARIANTS, metavar="NAME", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="of the network; default: as torch chooses")
    return parser.parse_args(argv)


def measure(folder: Path, model_name: str, threads: int | None) -> FixedWork:
    """Run the program on the image and the weights of a folder."""
    options: list[str | Path] = ["--dataset-path", folder, "--checkpoint", folder / "weights.pth"]
    with tempfile.TemporaryDirectory() as output:
        run = run_program([*options, "--model-name", model_name, "--output-dir", output], threads)
        return FixedWork(run.seconds, run.processor_seconds, read_stage_seconds(Path(output)))


def table(rounds: Sequence[FixedWork]) -> list[list[str]]:
    """Return the rows of a table of medians."""
    times = {stage: [each.stages[stage] for each in rounds] for stage in rounds[0].stages}
    times[OUTSIDE_STAGES] = [each.outside_stages for each in rounds]
    times["whole run"] = [each.run for each in rounds]
    times["processor time of the whole run"] = [each.processor for each in rounds]
    return [["what", "s"], *([what, f"{statistics.median(seconds):.2f}"] for what, seconds in times.items())]


if __name__ == "__main__":
    main()
