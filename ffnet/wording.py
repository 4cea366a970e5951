"""Numbers and names in messages."""

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "3 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names of a list, shortened to 80 characters each, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more
