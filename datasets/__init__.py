"""Readers of data sets. They check file names and headers without torch, which is imported to decode an image."""

from datasets.files import DatasetError
from datasets.layouts import LAYOUTS, find_label_set, find_layout
from datasets.split import Split

__all__ = ["LAYOUTS", "DatasetError", "Split", "find_label_set", "find_layout"]
