"""States: a simulation that was changed and restored, against what it computed before."""

import pytest
import torch

from ffnet.config import QuantizationConfig
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.quantization.sites import ACTIVATION, WEIGHT, quantizer_sites, read_state, site_parameter, write_state
from tests.helpers.networks import random_batches
from tests.helpers.simulations import encodings, logits, small_network

X = random_batches(3)[2]
CONFIG = QuantizationConfig(param_bw=4)


@pytest.fixture(scope="module")
def prepared():
    return equalize(small_network())


@pytest.fixture
def sim(prepared):
    sim = build_quantsim(prepared, CONFIG)
    calibrate(sim, random_batches(1))
    return sim


def change(sim):
    """Change weights, ranges, bit widths and symmetry, and freeze some quantizers."""
    with torch.no_grad():
        for site in quantizer_sites(sim):
            quantizer = site.quantizer
            if site.kind == WEIGHT:
                site_parameter(sim, site).mul_(-2)
                quantizer.qmin, quantizer.qmax, quantizer.symmetric = 0, 255, False
            else:
                quantizer.qmin, quantizer.qmax, quantizer.symmetric = -32768, 32767, True
            quantizer.set_range(quantizer.get_min() * 3 - 1, quantizer.get_max() * 2 + 1)
            quantizer.allow_overwrite(False)


def test_a_changed_simulation_is_restored_bit_for_bit(sim):
    before, held = logits(sim.model, X), encodings(sim)
    kinds = [(site.bit_width, site.quantizer.symmetric) for site in quantizer_sites(sim)]
    state = read_state(sim)
    change(sim)
    assert not torch.allclose(logits(sim.model, X), before)
    write_state(sim, state)
    assert torch.equal(logits(sim.model, X), before) and encodings(sim) == held
    assert [(site.bit_width, site.quantizer.symmetric) for site in quantizer_sites(sim)] == kinds


def test_a_simulation_that_is_not_calibrated_takes_a_state(prepared, sim):
    change(sim)
    other = build_quantsim(prepared, CONFIG)
    write_state(other, read_state(sim))
    assert torch.equal(logits(other.model, X), logits(sim.model, X)) and encodings(other) == encodings(sim)


def test_shared_quantizers_stay_shared(prepared, sim):
    other = build_quantsim(prepared, CONFIG)
    write_state(other, read_state(sim))
    activations = [site for site in quantizer_sites(other) if site.kind == ACTIVATION]
    shared = [site.quantizer for site in activations if site.layer in ("adapter.layers.2", "module_interpolate")]
    assert len(shared) == 2 and all(quantizer is other.model.module_cat.output_quantizers[0] for quantizer in shared)


def test_a_state_holds_no_tensor_of_the_simulation(sim):
    state = read_state(sim)
    copies = {name: (value.low.clone(), value.high.clone()) for name, value in state.items()}
    change(sim)
    assert all(torch.equal(value.low, copies[name][0]) for name, value in state.items())
    assert all(torch.equal(value.high, copies[name][1]) for name, value in state.items())
    assert {type(value.low) for value in state.values()} == {torch.Tensor}
