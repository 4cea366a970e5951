"""Measure what several models in one run of the program save, and whether its memory grows with the number of images.

    python -m benchmarks.models [--images N] [--rounds N] [--threads N]

Time: the demo's two models and two published ones, each in a run of its own and both in one, alternately, on rendered
scenes of 1024x2048. Memory: the demo's two models in all backends on 50 and on 500 images of 64x128. All weights are
random. The NPU is left out if onnxruntime-qnn is not installed. Linux only.
"""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.inputs import option_parser, write_checkpoint, write_images
from benchmarks.program import run_program
from benchmarks.timing import Seconds, describe_machine, markdown, median_ratio, medians
from ffnet.variants import DEMO_VARIANTS

PUBLISHED = ("segmentation_ffnet40S_dBBB_mobile", "segmentation_ffnet122NS_CCC_mobile_pre_down")
QUICK_CALIBRATION = ("--quant-scheme", "tf", "--calibration-images", "1")  # the start is a small part of a long run
MEMORY_IMAGES = (50, 500)
LARGEST_GROWTH = 0.05  # allowed growth of memory from the first to the second of MEMORY_IMAGES


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times and the memory."""
    parser = option_parser("models", __doc__)
    parser.add_argument("--images", type=int, default=4, help="number of 1024x2048 images; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="while time is measured (default: chosen by torch)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir()
        for model in (*DEMO_VARIANTS, *PUBLISHED):
            write_checkpoint(model, checkpoints / f"{model}.pth")
        write_images(folder / "large", args.images)
        write_images(folder / "small", max(MEMORY_IMAGES), (64, 128))
        options = ["--checkpoint", checkpoints]
        rows = [("models", "two runs, s", "one run, s", "one over two")]
        for models in (DEMO_VARIANTS, PUBLISHED):
            large = [*options, "--dataset-path", folder / "large", *QUICK_CALIBRATION]
            rows += time_rows(models, measure_times(models, large, args.rounds, args.threads))
        print("\n".join([describe_machine(), "", *markdown(rows), ""]), flush=True)
        print("\n".join(memory_lines([*options, "--dataset-path", folder / "small"])))


def measure_times(models: Sequence[str], options: Sequence[str | Path], rounds: int, threads: int | None) -> Seconds:
    """Run models in runs of their own and then in one, in every round; return wall and processor times."""
    seconds: Seconds = {"two runs": [], "one run": [], "two runs, processor": [], "one run, processor": []}
    for _ in tqdm(range(rounds), " and ".join(models), unit="round", disable=None):
        for name, groups in {"two runs": [[model] for model in models], "one run": [models]}.items():
            runs = [run_program([*options, "--model-name", *group], threads) for group in groups]
            seconds[name].append(sum(run.seconds for run in runs))
            seconds[f"{name}, processor"].append(sum(run.processor_seconds for run in runs))
    return seconds


def time_rows(models: Sequence[str], seconds: Seconds) -> list[tuple[str, ...]]:
    """Return the medians of wall and processor time as rows of a table."""
    names = " and ".join(model.removeprefix("segmentation_") for model in models)
    rows = []
    for what, suffix in {"whole run": "", "processor time of the whole run": ", processor"}.items():
        two, one = (f"{name}{suffix}" for name in ("two runs", "one run"))
        times = [f"{medians(seconds)[key]:.1f}" for key in (two, one)]
        rows.append((f"{names}, {what}", *times, f"{median_ratio(seconds[one], seconds[two]):.3f}"))
    return rows


def memory_lines(options: Sequence[str | Path]) -> list[str]:
    """Return a table of the memory for each of MEMORY_IMAGES, and a sentence on its growth.

    One thread runs the networks: for layers this small, two threads mostly wait for each other on busy machines.
    """
    npu = importlib.util.find_spec("onnxruntime_qnn") is not None
    options = [*options, "--model-name", *DEMO_VARIANTS, "--execute", "--calibration-images", "16"]
    options += ["--npu", "--npu-images", "all"] if npu else []
    runs = [run_program([*options, "--limit", str(images)], threads=1) for images in MEMORY_IMAGES]
    sizes = [[run.peak_bytes, run.npu_bytes] if npu else [run.peak_bytes] for run in runs]
    growth = [last / first - 1 for first, last in zip(*sizes, strict=True)]
    heading = ["images", "main process, GB", "processes of the NPU, GB"][: 1 + len(growth)]
    rows = [
        [str(images), *(f"{size / 1e9:.3f}" for size in row)] for images, row in zip(MEMORY_IMAGES, sizes, strict=True)
    ]
    met = "met" if max(growth) <= LARGEST_GROWTH else "missed"
    table = markdown([heading, *rows, ["growth", *(f"{100 * value:+.1f} %" for value in growth)]])
    return [*table, "", f"The target, a growth of at most {100 * LARGEST_GROWTH:.0f} %, is {met}."]


if __name__ == "__main__":
    main()
