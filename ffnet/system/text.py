"""Format numbers, names and tables for messages."""

import re
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]  # cells as text; the first row is the heading


def printable(text: str, keep: str = "") -> str:
    """Return text with escapes for all characters that are not printable, such as ESC and line feed, except `keep`.

    Names in files come from anyone: they must not control a terminal, reverse the text after them, or begin a line.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "3 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_size(size: tuple[int, int] | None) -> str:
    """Return height and width, such as "1024x2048"; None stands for images of several sizes."""
    return "{}x{}".format(*size) if size else "several sizes"


def format_duration(seconds: float) -> str:
    """Return an estimated time, such as "about 40 s" or "about 5 min"."""
    return f"about {max(1, round(seconds))} s" if seconds < 100 else f"about {round(seconds / 60)} min"


def list_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names of a list, shortened to 80 characters each, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more


def runtime_reason(error: Exception) -> str:
    """Return the first line of an exception of ONNX Runtime, without its error number, at most 200 characters."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip().partition("\n")[0])[:200]


def format_number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Return a number with `digits` decimals, and with a plus sign if `sign` is "+"; a hyphen for None."""
    return "-" if value is None else f"{value:{sign}z.{digits}f}"


def format_interval(limits: tuple[float, float] | None, digits: int = 2) -> str:
    """Return the lower and the upper limit in brackets with `digits` decimals; a hyphen for None."""
    return f"[{format_number(limits[0], digits)}, {format_number(limits[1], digits)}]" if limits else "-"


def decimals(base: float | None, *entries: tuple[float | None, float | None, tuple[float, float] | None]) -> int:
    """Return how many decimals, 2 to 4, numbers need so that rounding turns no change into zero or its opposite.

    Args:
        base: What the entries are compared with; None if it is not shown.
        entries: A value, its change against `base`, and the interval of the change.
    """
    for digits in range(2, 5):
        signs = [(limit, round(limit, digits)) for *_, limits in entries for limit in limits or ()]
        if base is not None:
            signs += [(round(v, digits) - round(base, digits), round(c, digits)) for v, c, _ in entries if v and c]
        if all((first > 0) - (first < 0) == (second > 0) - (second < 0) for first, second in signs):
            return digits
    return 2


def format_table(rows: Rows) -> str:
    """Return rows as lines with aligned columns: the first to the left, the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join((row[0].ljust(widths[0]), *line[1:])) for row, line in zip(rows, lines, strict=True))
