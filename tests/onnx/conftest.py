"""Fixtures for the tests of exported files."""

import pytest
import torch

from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.exports import export_simulation, exported
from tests.helpers.networks import PRE_DOWN, random_batches, three_layer_network, toy_model
from tests.helpers.simulations import simulate

SMALL_EXPORT, TOY_EXPORT = "small_export", "toy_export"


@pytest.fixture(scope="session")
def toy_export(toy_sim):
    """The toy simulation, exported."""
    return export_simulation(toy_model(), toy_sim, random_batches()[0])


@pytest.fixture(params=[SMALL_EXPORT, *(pytest.param(name, marks=pytest.mark.slow) for name in (TOY_EXPORT, PRE_DOWN))])
def export_case(request):
    """The exported network of three layers; in the slow tests the toy and a trained network, too."""
    is_fixture = request.param in (SMALL_EXPORT, TOY_EXPORT)
    return request.getfixturevalue(request.param) if is_fixture else exported(request.param)


@pytest.fixture(scope="session")
def dead_channel_exports():
    """Two exports of a network with a bias of 40 in a channel nearly without weights: as calibrated, and raised."""
    model = three_layer_network()
    with torch.no_grad():
        model[2].weight[3], model[2].bias[3] = 1e-12, 40
    exports = []
    for _ in range(2):
        sim = simulate(model, cle=False, quant_scheme="tf")
        if exports:
            assert raise_weight_scales(sim) == {"2": 1}
        exports.append(export_simulation(model, sim, random_batches()[0]))
    return exports
