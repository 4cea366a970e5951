"""Simulate how often the 95 % confidence intervals cover the true value.

    python -m benchmarks.intervals    # about three minutes on two cores

The 48 scenes of the demo are the population: images are drawn from them with replacement, and an interval covers if it
includes the value of all 48. The last column is the percentile interval of a bootstrap, for comparison.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.inputs import DEMO_FOLDER, option_parser
from benchmarks.timing import markdown
from datasets.cityscapes import CityscapesSplit
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.metrics import Interval, statistics
from ffnet.evaluation.scores import FP32
from ffnet.quantization.quantize import quantize
from ffnet.variants import VARIANTS

NAME = "segmentation_ffnet14T_dBBB_mobile"
INT8 = "INT8"
NUMBERS = (4, 8, 24, 100, 500)  # images per draw
RESAMPLES = 500  # of the bootstrap


def main(argv: Sequence[str] | None = None) -> None:
    """Print the coverage of each interval as a Markdown table."""
    parser = option_parser("intervals", __doc__)
    parser.add_argument("--draws", type=int, default=600, metavar="N", help="draws per number (default: %(default)s)")
    draws = parser.parse_args(argv).draws
    fp32, int8 = scene_matrices()
    heading = ("images", "mIoU", "change", "IoU of a class", "mIoU, bootstrap")
    rows = [heading, *((str(n), *map("{:.0f} %".format, coverage(fp32, int8, n, draws))) for n in NUMBERS)]
    print(*markdown(rows), sep="\n")


def scene_matrices() -> tuple[np.ndarray, np.ndarray]:
    """Return the confusion matrices (48, 19, 19) of the demo's scenes in FP32 and in the simulation."""
    splits = [CityscapesSplit(ensure_scenes(default_cache_dir()), split) for split in ("train", "val")]
    model = load_checkpoint(VARIANTS[NAME], DEMO_FOLDER / f"{NAME}.pth").model
    backends = {FP32: model, INT8: quantize(model, splits[0]).lowered}
    scores = [evaluate(backends, images) for images in splits]
    fp32, int8 = (np.concatenate([each.confusion_matrices[name] for each in scores]) for name in backends)
    return fp32, int8


def coverage(fp32: np.ndarray, int8: np.ndarray, number: int, draws: int) -> list[float]:
    """Return the percentage of draws of `number` images whose intervals cover: mIoU, change, classes, bootstrap."""
    generator = np.random.default_rng(0)
    truth, change = statistics(fp32), statistics(int8).labelled_miou.value - statistics(fp32).labelled_miou.value
    covered: list[list[bool]] = [[], [], [], []]
    for _ in range(draws):
        drawn = generator.integers(0, len(fp32), number)
        found = statistics(fp32[drawn])
        covered[0].append(covers(found.miou.share_interval, truth.miou.value))
        covered[1].append(covers((statistics(int8[drawn]).labelled_miou - found.labelled_miou).interval, change))
        classes = [(mine.share_interval, true.value) for mine, true in zip(found.ious, truth.ious, strict=True)]
        covered[2] += [covers(interval, value) for interval, value in classes if interval]
        covered[3].append(covers(bootstrap(fp32[drawn], generator), truth.miou.value))
    return [100 * float(np.mean(each)) for each in covered]


def covers(interval: Interval | None, value: float) -> bool:
    """Return whether an interval includes a value."""
    return interval is not None and interval[0] <= value <= interval[1]


def bootstrap(matrices: np.ndarray, generator: np.random.Generator) -> Interval:
    """Return the percentile interval of the mIoU in percent."""
    weights = generator.multinomial(len(matrices), np.full(len(matrices), 1 / len(matrices)), RESAMPLES).astype(float)
    hits = weights @ matrices.diagonal(axis1=1, axis2=2)
    unions = weights @ (matrices.sum(1) + matrices.sum(2)) - hits
    ious = np.divide(hits, unions, out=np.zeros_like(unions), where=unions > 0)
    lower, upper = np.quantile(100 * ious.sum(1) / (unions > 0).sum(1), (0.025, 0.975))
    return float(lower), float(upper)


if __name__ == "__main__":
    main()
