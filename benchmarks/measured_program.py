"""Run ffnet_quanteval, then print what its process took: processor time in seconds, peak resident memory in bytes.

    python -m benchmarks.measured_program OPTIONS

Both are the last line on stdout. It has five more networks than the program, SMALL_VARIANTS, for measurements that the
published ones are too large for. Needs no torch before the program does: processes of the NPU import this module again.
Linux only.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import ffnet_quanteval
from benchmarks.worker_usage import peak_bytes
from ffnet.variants import DEMO_VARIANTS, VARIANTS, SegHead, UpHead

WIDTHS = (8, 12, 16, 20, 24)  # channels of all layers
SMALL_VARIANTS = {
    variant.name: variant
    for variant in (
        replace(
            VARIANTS[DEMO_VARIANTS[0]],
            name=f"segmentation_ffnet_small{width}",
            blocks=(1, 1, 1, 1),
            channels=(width, width, width, width),
            up_head=UpHead((width, width, width, width), (width, width, width, width)),
            seg_head=SegHead(width, 1),
        )
        for width in WIDTHS
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    VARIANTS.update(SMALL_VARIANTS)
    status = ffnet_quanteval.main(argv)
    print(time.process_time(), peak_bytes())
    return status


if __name__ == "__main__":
    sys.exit(main())
