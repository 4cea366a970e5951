"""Fixtures of the tests of checkpoints."""

import pytest

from tests.helpers.checkpoint_folders import keep_few_variants


@pytest.fixture
def few_variants(monkeypatch):
    """See keep_few_variants."""
    keep_few_variants(monkeypatch)
