"""Measure what quantization does to an FFNet: mIoU on Cityscapes in FP32 and in INT8.

python ffnet_quanteval.py --demo
python ffnet_quanteval.py --dataset-path /data/cityscapes --model-name segmentation_ffnet40S_dBBB_mobile
"""

import contextlib
import gc
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence

from ffnet.chips import format_chips
from ffnet.config import LIST_CHIPS, Config
from ffnet.options import PROGRAM, parse_args
from ffnet.report.models import format_models
from ffnet.run import preflight
from ffnet.system.errors import UserError
from ffnet.system.memory import describe_lack, is_out_of_memory
from ffnet.system.process import (
    check_folders,
    heartbeat,
    interrupt_status,
    log_to_stderr,
    prepared_streams,
    print_lines,
    signals_as_interrupts,
)
from ffnet.system.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation that the command line (`sys.argv` if None) asks for, and return the exit status.

    0: success; 1: --fail-under is exceeded; 2: an option, a file or the environment is wrong; 130: interrupted
    (Ctrl-C); 143: ended by SIGTERM; 129: ended by SIGHUP.
    """
    with prepared_streams():
        try:
            with signals_as_interrupts():
                return run(parse_args(argv))
        except KeyboardInterrupt as interrupt:
            return interrupt_status(interrupt)
        except Exception as error:
            if not (isinstance(error, (UserError, OSError)) or is_out_of_memory(error)):
                raise
            sys.stderr.write(f"{PROGRAM}: error: {describe_error(error)}\n")  # at once: each rank of torchrun has one
            return 2


def run(config: Config) -> int:
    """Do what the configuration asks for, and return the exit status."""
    if LIST_CHIPS in config.npu.chips:
        print_lines(format_chips())
        return 0
    if config.list_models:
        print_lines(format_models())
        return 0
    preflight.check(config)
    log_to_stderr(logging.getLogger("ffnet"), config.runtime.quiet)
    check_folders()
    with garbage_collection_paused(), heartbeat("Loading torch and AIMET", os.environ.get("RANK", "0") == "0"):
        # The only lazy imports: torch and AIMET take seconds, and option errors need neither.
        from ffnet.report.delivery import deliver
        from ffnet.run.inputs import select_device
        from ffnet.run.onnx_file import evaluate_onnx
        from ffnet.run.pipeline import evaluate_models
        from ffnet.run.ranks import open_ranks

    onnx = config.model.onnx
    with open_ranks("cpu" if onnx else select_device(config)) as ranks:
        results = evaluate_onnx(config, onnx, ranks) if onnx else evaluate_models(config, ranks)
        if ranks.is_main:
            return deliver(results, config)
        deque(results, maxlen=0)  # every rank has the same results
        return 0


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Disable garbage collection during imports, and exclude the imported objects from it until the process ends.

    There are half a million of them, and nearly all are needed until the end. Traversing them repeatedly took a third
    of the time to start and to exit.
    """
    imported_before = "ffnet.run.pipeline" in sys.modules  # then there may be garbage of earlier runs
    if imported_before or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def describe_error(error: Exception) -> str:
    """Return an error as one line that names the file it is about."""
    text = str(error)
    if is_out_of_memory(error) and not isinstance(error, UserError):
        text = describe_lack(error)
    elif isinstance(error, OSError):
        text = f"{error.filename or 'input or output'}: {error.strerror or error}"
    return printable(text)


if __name__ == "__main__":
    sys.exit(main())
