"""Cityscapes with fine labels, for the Python API."""

from pathlib import Path

from datasets.split import Split


class CityscapesSplit(Split):
    """One split of Cityscapes; see Split."""

    def __init__(self, root: str | Path, split: str, limit: int | None = None) -> None:
        super().__init__("cityscapes", root, split, limit)
