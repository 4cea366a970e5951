"""Run AIMET without its progress messages."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from aimet_torch.common.utils import AimetLogger, TqdmStreamHandler


@contextlib.contextmanager
def quiet_aimet() -> Iterator[None]:
    """Run AIMET without its progress messages; its warnings go to stderr."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):  # its use of torch.jit.trace
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        for logger in (logging.getLogger(area.value) for area in AimetLogger.LogAreas):
            logger.setLevel(logging.WARNING)
            for handler in logger.handlers:
                if isinstance(handler, TqdmStreamHandler):
                    handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
        # It warns about every FFNet, whose sizes are taken at run time; this matters only to tools that reorder hooks.
        logging.getLogger(AimetLogger.LogAreas.ConnectedGraph.value).setLevel(logging.ERROR)
        yield
