"""Measure what accuracy recovery wins back on the demo's networks, at W4A8 and W8A8.

    python -m benchmarks.accuracy_recovery                                     # 40 minutes, with a process per network
    python -m benchmarks.accuracy_recovery --model-name segmentation_ffnet14T_dBBB_mobile --npu-images 0 --json

The program itself runs with each set of options, on the demo's networks and on ill-conditioned copies of them. It
calibrates and chooses on the train split and is scored on the val split: simulated, by ONNX Runtime, and on Qualcomm's
NPU, emulated, on some of the images.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnet.chips import check_npu_package
from ffnet.system.text import format_table
from ffnet.variants import DEMO_VARIANTS

NPU_IMAGES = 8
COLUMNS = (
    "network", "bits", "options", "FP32 mIoU %", "simulated", "drop", "95 % CI", "ONNX Runtime", "NPU",
    "simulated there", "nodes on CPU", "bit operations", "weight bytes", "recovery s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mIoU of every network with every set of options."""
    args = parse_args(argv)
    if args.npu_images:
        check_npu_package()
    # The only lazy import: the processes that run the NPU import this module again, and torch and AIMET take seconds.
    from benchmarks import accuracy_recovery_measurements as measurements

    rows = measurements.measure(args)
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if args.json else format_rows(rows))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this network; default both")
    parser.add_argument("--limit", type=int, metavar="N", help="number of val images to score; default all")
    parser.add_argument(
        "--npu-images",
        type=int,
        default=NPU_IMAGES,
        metavar="N",
        help="number of these images, spread evenly, that the NPU runs; 0: without the NPU (%(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="default: torch hub's cache folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def format_rows(rows: Sequence[Any]) -> str:
    """Return the table of `accuracy_recovery_measurements.Row`s."""
    return format_table([COLUMNS, *map(format_row, rows)])


def format_row(row: Any) -> tuple[str, ...]:
    """Return the cells of one row; "-" for what was not measured."""
    low, high = row.drop_interval
    return (
        row.network,
        row.bit_widths,
        row.options or "(none)",
        f"{row.fp32_miou:.2f}",
        f"{row.simulated_miou:.2f}",
        f"{row.fp32_miou - row.simulated_miou:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{row.onnx_runtime_miou:.2f}",
        *(_number(value, 2) for value in (row.npu_miou, row.simulated_miou_there)),
        "-" if row.cpu_nodes is None else str(len(row.cpu_nodes)),
        *(_number(value, 3) for value in (row.bit_operations, row.weight_bytes)),
        _number(row.seconds, 0),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
