"""Compare the INT8 mIoU of this project's export with that of NNCF's quantization with accuracy control.

    python -m benchmarks.accuracy_control                                   # eight minutes on two busy cores
    python -m benchmarks.accuracy_control --images 4 --train-images 6 --validation-images 2 --json

NNCF (`nncf.quantize_with_accuracy_control`) quantizes the FP32 ONNX file to INT8 and, as long as the mIoU on validation
images drops by more than `--max-drop` percentage points, returns to float the operations that cost most. Both tools
start from the same networks, the demo's and ill-conditioned copies of them, and calibrate on the same images of the
train split; NNCF validates on others of that split. ONNX Runtime runs all files on the same images of the val split.

Needs benchmarks/requirements-nncf.txt. NNCF reports its progress on stderr.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from ffnet.system.errors import UserError
from ffnet.system.text import count, list_names
from ffnet.variants import DEMO_VARIANTS

PROGRAM = "python -m benchmarks.accuracy_control"
VALIDATION_IMAGES = 8
MAX_DROP = 0.3
COLUMNS = ("mIoU %", "FP32", "ffnet_quanteval", "NNCF", "NNCF, accuracy control", "operations left in float")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the mIoU of every network in FP32 and quantized by both tools; return the exit status."""
    args = parse_args(argv)
    try:
        check_nncf()
        # The only lazy import, so that --help and a missing package answer at once.
        from benchmarks import accuracy_control_measurements as measurements

        result = measurements.measure(args)
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1, default=dataclasses.asdict) if args.json else format_result(result))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this network; default both")
    parser.add_argument("--images", type=int, metavar="N", help="number of val images to score; default all")
    parser.add_argument("--train-images", type=int, metavar="N", help="number of train images; default all")
    parser.add_argument(
        "--validation-images",
        type=int,
        default=VALIDATION_IMAGES,
        metavar="N",
        help="number of these train images, spread evenly, on which NNCF measures the mIoU; the others calibrate "
        "(%(default)s)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=MAX_DROP,
        metavar="DROP",
        help="mIoU drop, in percentage points on the validation images, that NNCF accepts (%(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="default: torch hub's cache folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def check_nncf() -> None:
    """Raise a UserError that says how to install NNCF if it is missing."""
    if not importlib.util.find_spec("nncf"):
        raise UserError("nncf is not installed. Install it with `pip install -r benchmarks/requirements-nncf.txt`.")


def format_result(result: dict[str, Any]) -> str:
    """Return the mIoU as a Markdown table, with the operations that NNCF left in float below it."""
    scores = result["scores"]
    title = (
        f"INT8 by NNCF {result['nncf']}, max_drop {result['max_drop']:g}, and by ffnet_quanteval; "
        f"all files run by ONNX Runtime {result['versions']['onnxruntime']} on {count(result['images'], 'val image')}, "
        f"calibrated on {count(result['calibration_images'], 'train image')}; "
        f"NNCF validated on {count(result['validation_images'], 'other train image')}"
    )
    rows = [COLUMNS, *map(format_score, scores)]
    names = [f"Left in float, {each.network}: {list_names(each.in_float)}" for each in scores if each.in_float]
    return "\n".join((title, "", *markdown(rows), "", *names)).rstrip()


def format_score(score: Any) -> list[str]:
    """Return the cells of a row; `score`: an `accuracy_control_measurements.NetworkScore`."""
    mious = (score.fp32, score.project, score.nncf, score.controlled)
    return [score.network, *(f"{miou:.2f}" for miou in mious), f"{len(score.in_float)} of {score.operations}"]


if __name__ == "__main__":
    sys.exit(main())
