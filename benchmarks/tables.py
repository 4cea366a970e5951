"""Markdown tables. Needs no torch: processes of the NPU import benchmarks that print them."""

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is the heading."""
    heading, *others = rows
    return [*markdown_heading(heading), *map(markdown_row, others)]


def markdown_heading(cells: Sequence[str]) -> list[str]:
    """Return the heading of a Markdown table and the line below it."""
    return [markdown_row(cells), markdown_row(["---"] * len(cells))]


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
