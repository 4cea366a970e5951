"""Measure what a run takes that does not depend on the images: one of 64x128, in FP32 and in simulated INT8.

    python -m benchmarks.fixed_work [--model-name NAME] [--rounds N] [--threads N]

Every round is a process of its own; medians over the rounds. The weights are random. Linux only.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.inputs import option_parser, write_checkpoint, write_images
from benchmarks.program import ProgramRun, run_program
from benchmarks.timing import describe_machine, markdown, medians
from ffnet.variants import DEFAULT_MODEL


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times of the stages and of the whole run."""
    parser = option_parser("fixed_work", __doc__, DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="threads that run the network (default: chosen by torch)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, 1, (64, 128))
        checkpoint = write_checkpoint(args.model_name, folder / "weights.pth")
        options = ["--dataset-path", folder, "--checkpoint", checkpoint, "--model-name", args.model_name]
        runs = [run_program(options, args.threads) for _ in range(args.rounds)]
    print("\n".join([f"{args.model_name}: {describe_machine()}", "", *markdown(table(runs))]))


def table(runs: Sequence[ProgramRun]) -> list[tuple[str, str]]:
    """Return the rows of a table of medians."""
    seconds = {stage: [run.stage_seconds[stage] for run in runs] for stage in runs[0].stage_seconds}
    outside = [run.seconds - sum(run.stage_seconds.values()) for run in runs]
    seconds["start of Python, imports, report and end"] = outside
    seconds["whole run"] = [run.seconds for run in runs]
    seconds["processor time of the whole run"] = [run.processor_seconds for run in runs]
    return [("what", "s"), *((what, f"{value:.2f}") for what, value in medians(seconds).items())]


if __name__ == "__main__":
    main()
