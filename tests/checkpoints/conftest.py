"""Fixtures of the tests of checkpoints."""

import pytest

from ffnet.variants import VARIANTS
from tests.helpers.checkpoint_folders import TOYS
from tests.helpers.networks import DEMO, PRE_DOWN

USERS = ("model", "checkpoints.candidates", "checkpoints.folder", "checkpoints.loading", "checkpoints.matching")


@pytest.fixture
def few_variants(monkeypatch):
    """The toys and the demo's two are all variants, because building 66 takes seconds."""
    kept = {name: VARIANTS[name] for name in (DEMO, PRE_DOWN)} | TOYS
    monkeypatch.setattr("ffnet.variants.VARIANTS", kept)
    for user in USERS:
        monkeypatch.setattr(f"ffnet.{user}.VARIANTS", kept)
