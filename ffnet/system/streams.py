"""Standard output and standard error: results come out whatever these streams can show or hold. Needs no torch."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from ffnet.system.errors import UserError


@contextlib.contextmanager
def prepared_streams() -> Iterator[None]:
    """Prepare stdout and stderr for the duration of the program.

    Streams that were closed lead to the null device. Characters that a stream can't encode are escaped. What can't be
    written to stderr is dropped, because progress and messages must not cost results.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stderr = sys.stderr
    sys.stderr = cast(TextIO, _DroppingStream(stderr))
    try:
        yield
    finally:
        sys.stderr = stderr
        try:
            sys.stdout.flush()
        except OSError:
            discard_output(sys.stdout)  # otherwise Python tries again at its end, with a message and another status


class _DroppingStream:
    """A text stream without its errors: from the first one on, everything is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            discard_output(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream)


def print_lines(*lines: str) -> None:
    """Print lines to stdout. It is no error if the reader has closed its end of the pipe.

    Raises:
        UserError: if stdout can't be written, for instance because its disk is full.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        discard_output(sys.stdout)
    except OSError as error:
        raise UserError(
            f"stdout can't be written ({error.strerror}). Free some space, or redirect it elsewhere."
        ) from error


def discard_output(stream: TextIO) -> None:
    """Have a stream lead to the null device, also what it still buffers."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
