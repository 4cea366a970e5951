"""Fixtures that several test packages share."""

import importlib.util
import os
import signal
from pathlib import Path

CHECKOUT = str(Path(__file__).parents[1])  # for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (CHECKOUT, os.environ.get("PYTHONPATH"))))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on images this small a second thread only costs time

import pytest
import torch

from ffnet.config import QuantizationConfig
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.variants import VARIANTS
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.exports import export_simulation
from tests.helpers.networks import TOY, golden_state, random_batches, three_layer_network, toy_model
from tests.helpers.simulations import simulate
from tests.helpers.two_models import SMOOTHED, write_data


@pytest.fixture(scope="session", autouse=True)
def usual_signals():
    """Signals are handled as in a terminal, also if the tests run in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory):
    """The tests run in an empty folder: what lies in the checkout changes nothing, and nothing is left there."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working"))
    yield
    os.chdir(before)


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
def two_models(toy_variant):
    """TOY and its pre_down sibling, known to the program by their names for the session."""
    VARIANTS[SMOOTHED.name] = SMOOTHED
    yield toy_variant, SMOOTHED
    del VARIANTS[SMOOTHED.name]


@pytest.fixture(scope="module")
def data(two_models, tmp_path_factory):
    """A folder with images, and with the weights of two models."""
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


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


@pytest.fixture(scope="session")
def small_export():
    """A network of three layers, exported: torch.export takes a multiple of the time for the toy network."""
    model = three_layer_network()
    sim = simulate(model, quant_scheme="tf")
    raise_weight_scales(sim)
    return export_simulation(model, sim, random_batches()[0])


def pytest_collection_modifyitems(config, items):
    """Deselect tests that need a GPU or the NPU's runtime where there is none; pytest reports their number.

    Tests in forks come first: torch's autograd refuses to run in a fork of a process that has used it.
    """
    items.sort(key=lambda item: not {"run_on_ranks", "run_in_fork"} & vars(item.module).keys())
    available = {"cuda": torch.cuda.is_available(), "npu": importlib.util.find_spec("onnxruntime_qnn")}
    missing = [marker for marker, found in available.items() if not found]
    elsewhere = [item for item in items if any(map(item.get_closest_marker, missing))]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
