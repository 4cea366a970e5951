"""Measure how much accuracy recovery regains on the demo's networks, at W4A8 and W8A8.

    python -m benchmarks.accuracy_recovery                                     # 40 minutes, with a process per network
    python -m benchmarks.accuracy_recovery --model-name segmentation_ffnet14T_dBBB_mobile --npu-images 0

The program runs with each set of options, on the demo's networks and on ill-conditioned copies of them. It calibrates
and selects on the train split and is scored on the val split: simulated, by ONNX Runtime, and on Qualcomm's NPU,
emulated, on some of the images.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import DEMO_FOLDER, option_parser
from benchmarks.program import run_program
from demo.ill_conditioned import ill_conditioned
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.chips import DEFAULT_CHIP, check_npu_package
from ffnet.evaluation.scores import FP32, NPU, ONNX_RUNTIME, SIMULATED, BackendNames
from ffnet.system.text import format_interval, format_number, format_table
from ffnet.variants import DEMO_VARIANTS

RUNS = (  # bit widths and options
    ("W4A8", ""),
    ("W4A8", "--seq-mse"),
    ("W4A8", "--seq-mse --adaround"),
    ("W4A8", "--max-drop 0.3"),
    ("W4A8", "--max-drop 0.05"),
    ("W8A8", ""),
    ("W8A8", "--adaround"),
    ("W8A8", "--max-drop 0"),
)
COLUMNS = (
    "network", "bits", "options", "FP32 mIoU %", "simulated", "change", "95 % CI", "ONNX Runtime", "NPU",
    "simulated on NPU images", "nodes on CPU", "bit operations", "weight bytes", "recovery s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mIoU of every network with every set of options; show each row on stderr once it is known."""
    parser = option_parser("accuracy_recovery", __doc__)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this network; default both")
    parser.add_argument("--limit", type=int, metavar="N", help="number of val images to score; default all")
    npu_help = "number of these images, every n-th, that the NPU runs; 0: without the NPU (default: %(default)s)"
    parser.add_argument("--npu-images", type=int, default=8, metavar="N", help=npu_help)
    args = parser.parse_args(argv)
    if args.npu_images:
        check_npu_package()
    common = ["--demo", "--calibration-split", "train", "--execute"]
    common += ["--npu", DEFAULT_CHIP, "--npu-images", str(args.npu_images)] if args.npu_images else []
    common += ["--limit", str(args.limit)] if args.limit else []
    rows = [COLUMNS]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model_name or DEMO_VARIANTS:
            for network, checkpoint in write_checkpoints(name, Path(folder)):
                for bit_widths, options in RUNS:
                    command = [*common, "--model-name", name, "--checkpoint", checkpoint, *options.split()]
                    command += ["--default-param-bw", bit_widths[1]]
                    (result,) = run_program(command).results
                    rows.append((network, bit_widths, options or "(none)", *result_cells(result)))
                    print(*rows[-1], sep="  ", file=sys.stderr)
    print(format_table(rows))


def write_checkpoints(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the checkpoint of a demo network and of its ill-conditioned copy, which is written."""
    original = DEMO_FOLDER / f"{name}.pth"
    yield name, original
    copy = folder / f"{name}.pth"
    torch.save(ill_conditioned(load_checkpoint(name, original).model).state_dict(), copy)
    yield f"{name}, ill-conditioned", copy


def result_cells(result: dict[str, Any]) -> list[str]:
    """Return the cells of COLUMNS from the fourth on; `result` is the content of result.json."""
    backends, npu, recovery = result["backends"], result["npu"], result["recovery"]
    on_npu, names = npu["backends"] if npu else {}, BackendNames(result["precision"])
    simulated, nodes = backends[names.of(SIMULATED)], npu and len(npu["cpu_nodes"])
    steps = {step["name"]: step for step in recovery["steps"]} if recovery else {}
    chosen = steps[recovery["chosen"]] if recovery else {}
    return [
        format_number(backends[FP32]["miou"]),
        format_number(simulated["miou"]),
        format_number(simulated["change"], sign="+"),
        format_interval(simulated["change_interval"]),
        format_number(backends[names.of(ONNX_RUNTIME)]["miou"]),
        *(format_number(on_npu.get(names.of(each), {}).get("miou")) for each in (NPU, SIMULATED)),
        format_number(nodes, 0),
        *(format_number(chosen.get(cost), 3) for cost in ("bit_operations", "weight_bytes")),
        format_number(result["stage_seconds"].get("recover accuracy"), 0),
    ]


if __name__ == "__main__":
    main()
