"""Print results on stdout. Needs no torch."""

import os
import sys


def print_lines(*lines: str) -> None:
    """Print lines to stdout. It is no error if the reader has closed its end of the pipe."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
