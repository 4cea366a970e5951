"""Measure what the emulated NPU costs: time of compilation and per image, memory, and what more processes bring.

    python -m benchmarks.npu [--json] [--model-name NAME] [--images N]

A network at 1024x2048 and the demo's at 512x1024, W8A8, with random weights, calibrated on one rendered scene. Numbers
of processes are compared alternately in one run. Needs onnxruntime-qnn, and Linux.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.tables import markdown
from ffnet.chips import check_npu_package

LARGE, SMALL = (1024, 2048), (512, 1024)  # height, width of the images
DEMO_MODEL = "segmentation_ffnet14T_dBBB_mobile"
LARGE_PROCESSES, DEMO_PROCESSES = 2, 3
COLUMNS = (
    "network",
    "input",
    "compilation, s",
    "per image, s",
    "processor time per image, s",
    "peak memory of a process, GB",
    "2 processes over 1",
    "3 processes over 1",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the costs of both networks."""
    args = parse_args(argv)
    check_npu_package()
    # The only lazy imports: the NPU's processes import this module again, and torch would count as their memory.
    from benchmarks import npu_measurements as measurements

    outcome = {
        "machine": measurements.machine(),
        "networks": [
            measurements.measure_network(args.model_name, LARGE, LARGE_PROCESSES, args.images),
            # Four times as many images, because they have a quarter of the pixels.
            measurements.measure_network(DEMO_MODEL, SMALL, DEMO_PROCESSES, 4 * args.images),
        ],
    }
    print(json.dumps(outcome, default=dataclasses.asdict) if args.json else format_outcome(outcome))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.npu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model-name", default="segmentation_ffnet40S_dBBB_mobile", help="default %(default)s")
    parser.add_argument("--images", type=int, default=2, help="number of images per process; default %(default)s")
    return parser.parse_args(argv)


def format_outcome(outcome: dict[str, Any]) -> str:
    """Return the outcome as a Markdown table."""
    rows = [COLUMNS, *map(format_costs, outcome["networks"])]
    return "\n".join((outcome["machine"], "", *markdown(rows)))


def format_costs(costs: Any) -> list[str]:
    """Return the cells of a row; `costs`: an `npu_measurements.Costs`."""
    seconds = (costs.compilation_seconds, costs.image_seconds, costs.processor_seconds)
    ratios = [f"{costs.throughput[count]:.2f}" if count in costs.throughput else "" for count in (2, 3)]
    size = "x".join(map(str, costs.size))
    return [costs.network, size, *(f"{value:.1f}" for value in seconds), f"{costs.peak_gb:.2f}", *ratios]


if __name__ == "__main__":
    main()
