"""Fixtures that several test packages share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on images this small a second thread only costs time

import pytest
import torch

from ffnet.config import QuantizationConfig
from ffnet.quantization.bias_ranges import raise_weight_scales
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.variants import VARIANTS
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.networks import TOY, golden_state, random_batches, toy_model


@pytest.fixture
def tree(tmp_path):
    """A folder with four val and three train images."""
    write_tree(tmp_path, "val", 4)
    write_tree(tmp_path, "train", 3, seed=1)
    return tmp_path


@pytest.fixture(scope="session")
def toy_variant():
    """TOY, known to the program by its name for the session."""
    VARIANTS[TOY.name] = TOY
    yield TOY
    del VARIANTS[TOY.name]


@pytest.fixture(scope="session")
def toy_checkpoint(toy_variant, tmp_path_factory):
    """A file of TOY's golden weights, in FFNet's own form."""
    path = tmp_path_factory.mktemp("toy") / "toy.pth"
    torch.save(golden_state(toy_model()), path)
    return path


@pytest.fixture(scope="session")
def toy_sim():
    """A calibrated simulation of the toy network, shared by the session: not to be changed."""
    sim = build_quantsim(equalize(toy_model()), QuantizationConfig())
    calibrate(sim, random_batches())
    raise_weight_scales(sim)
    return sim


@pytest.fixture(scope="session")
def toy_lowered(toy_sim):
    """The toy simulation as plain torch modules: not to be changed."""
    return lower(toy_sim)


def pytest_collection_modifyitems(config, items):
    """Deselect tests marked cuda if torch finds no GPU; pytest reports their number."""
    if torch.cuda.is_available():
        return
    elsewhere = [item for item in items if item.get_closest_marker("cuda")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
