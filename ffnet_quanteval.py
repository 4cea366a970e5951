"""Measure what quantization does to an FFNet: mIoU on Cityscapes in FP32 and in INT8.

python ffnet_quanteval.py --demo
python ffnet_quanteval.py --dataset-path /data/cityscapes --model-name segmentation_ffnet40S_dBBB_mobile
"""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator, Sequence

from datasets import DatasetError
from ffnet import cli
from ffnet.chips import format_chips
from ffnet.config import LIST_CHIPS
from ffnet.system.errors import UserError
from ffnet.system.process import ensure_home, interrupt_status, prepared_streams, print_lines, signals_as_interrupts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation that the command line (`sys.argv` if None) asks for, and return the exit status.

    0: success; 1: --fail-under is exceeded; 2: an option, a file or the environment is wrong; 130: interrupted
    (Ctrl-C); 143: ended by SIGTERM; 129: ended by SIGHUP.
    """
    with prepared_streams():
        try:
            with signals_as_interrupts():
                return run(argv)
        except KeyboardInterrupt as interrupt:
            return interrupt_status(interrupt)
        except (UserError, DatasetError, OSError) as error:
            print(f"{cli.PROGRAM}: error: {describe_error(error)}", file=sys.stderr)
            return 2


def run(argv: Sequence[str] | None) -> int:
    """Do what the command line asks for, and return the exit status."""
    config = cli.parse_args(argv)
    if config.npu.chip == LIST_CHIPS:
        print_lines(format_chips())
        return 0
    log_to_stderr(config.runtime.quiet)
    ensure_home()
    with garbage_collection_paused():
        # The only lazy imports: torch and AIMET take seconds, and option errors need neither.
        from ffnet.report import delivery
        from ffnet.run import pipeline

    if config.list_models:
        return delivery.print_models()
    results = pipeline.evaluate_onnx(config) if config.model.onnx else pipeline.evaluate_models(config)
    return delivery.deliver(results, config)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Disable garbage collection during imports, and exclude the imported objects from it until the process ends.

    There are half a million of them, and nearly all are needed until the end. To look at them again and again took a
    third of the time of starting and ending.
    """
    imported_before = "ffnet.run.pipeline" in sys.modules  # there may be garbage of earlier runs, which has to be freed
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


def log_to_stderr(quiet: bool) -> None:
    """Show the project's own log messages on stderr; only errors if `quiet`."""
    logger = logging.getLogger("ffnet")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.propagate = False  # AIMET gives the root logger a handler of its own


def describe_error(error: Exception) -> str:
    """Return an error as one line that names the file it is about."""
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
