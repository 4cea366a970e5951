"""Fixtures for the evaluation's tests."""

import pytest

from datasets.cityscapes import CityscapesSplit
from tests.helpers.cityscapes_tree import write_tree


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory):
    """Seven images: an odd number, so that batches differ in size."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_tree(root, "val", 7)
    return CityscapesSplit(root, "val")
