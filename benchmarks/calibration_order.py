"""Measure how far the order of the calibration images and their batch size move the mIoU of the simulation.

    python -m benchmarks.calibration_order    # about ten minutes on two cores

TF-Enhanced takes the range of its histograms from the first batch. The demo's network is calibrated on the 24 images of
the demo's train split in ten orders, and in file order with other batch sizes, and scored on its val split.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.inputs import DEMO_FOLDER, option_parser
from benchmarks.timing import markdown
from datasets.cityscapes import CityscapesSplit
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.config import Runtime
from ffnet.evaluation.loop import evaluate
from ffnet.quantization.quantize import quantize
from ffnet.variants import VARIANTS

NAME = "segmentation_ffnet14T_dBBB_mobile"
BATCH_SIZES = (8, 4, 3, 2, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mIoU of every calibration, and the spread over the orders."""
    parser = option_parser("calibration_order", __doc__)
    parser.add_argument("--orders", type=int, default=10, metavar="N", help="number of orders (default: %(default)s)")
    orders = parser.parse_args(argv).orders
    train, val = (CityscapesSplit(ensure_scenes(default_cache_dir()), split) for split in ("train", "val"))
    model = load_checkpoint(VARIANTS[NAME], DEMO_FOLDER / f"{NAME}.pth").model

    def miou(calibration: CityscapesSplit, batch_size: int) -> float:
        runtime = Runtime(batch_size=batch_size, quiet=True)
        network = quantize(model, calibration, runtime=runtime)
        return evaluate({"simulated": network.lowered}, val, Runtime(quiet=True)).miou("simulated")

    shuffled = [np.random.default_rng(seed).permutation(len(train)).tolist() for seed in range(orders)]
    found = [miou(train.select(order), 8) for order in shuffled]
    rows = [
        ("calibration", "mIoU %"),
        *((f"file order, batch size {size}", f"{miou(train, size):.3f}") for size in BATCH_SIZES),
    ]
    rows.append(
        (
            f"{orders} random orders, batch size 8",
            f"{min(found):.3f} to {max(found):.3f}, standard deviation {np.std(found, ddof=1):.3f}",
        )
    )
    print(*markdown(rows), sep="\n")


if __name__ == "__main__":
    main()
