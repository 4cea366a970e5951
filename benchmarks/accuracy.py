"""Compare the INT8 mIoU of this project's export with that of ONNX Runtime's static quantization.

    python -m benchmarks.accuracy                                   # up to 45 minutes on two cores
    python -m benchmarks.accuracy --npu-images 0                    # a few minutes; does not need onnxruntime-qnn
    python -m benchmarks.accuracy --images 4 --calibration-images 4 --npu-images 2 --json

Both tools start from the same FP32 networks, the demo's and ill-conditioned copies of them, and calibrate on the same
images of the train split. ONNX Runtime then runs all files on the same images of the val split, and Qualcomm's NPU,
emulated, on some of them. The baseline is used as its documentation advises: preprocessed FP32 file, QDQ, signed
weights with a scale per channel, uint8 activations.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnet.chips import check_npu_package
from ffnet.evaluation.backends import FP32
from ffnet.system.text import count, format_table, list_names
from ffnet.variants import DEMO_VARIANTS

NPU_IMAGES = 8
FAILS = "fails"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mIoU of every network in FP32 and quantized by both tools."""
    args = parse_args(argv)
    if args.npu_images:
        check_npu_package()
    # The only lazy import: the processes that run the NPU import this module again, and torch and AIMET take seconds.
    from benchmarks import accuracy_measurements as measurements

    result = measurements.measure(args)
    print(json.dumps(result, indent=1, default=dataclasses.asdict) if args.json else format_result(result))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this network; default both")
    parser.add_argument("--images", type=int, metavar="N", help="number of val images to score; default all")
    parser.add_argument("--calibration-images", type=int, metavar="N", help="number of train images; default all")
    parser.add_argument(
        "--npu-images",
        type=int,
        default=NPU_IMAGES,
        metavar="N",
        help="number of these val images, spread evenly, that the NPU runs; 0: without the NPU (%(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="default: torch hub's cache folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def format_result(result: dict[str, Any]) -> str:
    """Return the mIoU as tables: of all files by ONNX Runtime, and of all files by ONNX Runtime and by the NPU."""
    columns = list(next(iter(result["miou"].values())))
    rows = [("mIoU %", *columns)]
    rows += [(network, *(f"{mious[name]:.2f}" for name in columns)) for network, mious in result["miou"].items()]
    lines = [
        f"W8A8: all files run by ONNX Runtime {result['versions']['onnxruntime']} on {result['images']} val images, "
        f"calibrated on {result['calibration_images']} train images",
        "ffnet_quanteval: cross-layer equalization and TF-Enhanced; others: onnxruntime.quantization.quantize_static",
        format_table(rows),
    ]
    return "\n".join(lines + (format_npu(result["npu"], columns) if result["npu"] else []))


def format_npu(npu: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the lines about the NPU; `npu`: the entry of the result, `columns`: names of the files."""
    scores = npu["scores"]
    table: list[tuple[str, ...]] = [("mIoU %", "", "run by", *columns)]
    for network, bits in dict.fromkeys((score.network, score.bit_widths) for score in scores):
        if bits != FP32:
            files = {each.tool: each for each in scores if each.network == network and each.bit_widths in (FP32, bits)}
            table.append((network, bits, "CPU", *(f"{files[name].cpu_miou:.2f}" for name in columns)))
            table.append((network, bits, "NPU", *(format_miou(files[name].npu_miou) for name in columns)))
    title = (
        f"All files run by ONNX Runtime on the CPU and by the NPU of {npu['chip']}, emulated by onnxruntime-qnn "
        f"{npu['version']}, on the same {count(len(npu['images']), 'val image')}"
    )
    exceptions = [describe_npu(score) for score in scores if score.failure or score.cpu_nodes]
    others = "All other files" if exceptions else "All files"
    return ["", title, format_table(table), *exceptions, f"{others} ran on the NPU with 0 nodes on the CPU."]


def format_miou(miou: float | None) -> str:
    """Return an mIoU, or that the file can't be run."""
    return FAILS if miou is None else f"{miou:.2f}"


def describe_npu(score: Any) -> str:
    """Return why the NPU does not run a file, or which nodes; `score`: an `accuracy_measurements.FileScore`."""
    file = f"{score.network}, {score.bit_widths}, {score.tool}"
    if score.failure:
        return f"{file} {FAILS}: {score.failure}"
    return f"{file}: {count(len(score.cpu_nodes), 'node')} on the CPU, {list_names(score.cpu_nodes)}"


if __name__ == "__main__":
    main()
