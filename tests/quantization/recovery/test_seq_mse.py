"""Sequential MSE against AIMET called directly, and against all candidates of a layer tried by hand."""

import pytest
import torch
from aimet_torch.seq_mse import apply_seq_mse as aimet_seq_mse
from torch.utils.data import DataLoader

from ffnet.config import QuantizationConfig
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.quantization.quiet import quiet_aimet
from ffnet.quantization.recovery.seq_mse import apply_seq_mse
from ffnet.quantization.sites import WEIGHT, quantizer_sites
from tests.helpers.networks import random_batches, three_layer_network
from tests.helpers.simulations import compute_weight_encodings, encodings, small_network

IMAGES = [image[None] for batch in random_batches(2, (32, 64)) for image in batch]
CANDIDATES = 20


def new_simulation(prepared, bits=4, scheme="tf_enhanced"):
    return build_quantsim(prepared, QuantizationConfig(param_bw=bits, quant_scheme=scheme))


@pytest.fixture(scope="module")
def prepared():
    return equalize(small_network())


@pytest.fixture(scope="module")
def searched(prepared):
    sim = new_simulation(prepared)
    apply_seq_mse(sim, IMAGES, progress=False)
    return sim


def test_the_ranges_are_those_of_aimet_called_directly(prepared, searched):
    sim = new_simulation(prepared)
    with quiet_aimet():
        aimet_seq_mse(sim, DataLoader(IMAGES, batch_size=None))
    assert encodings(sim) == encodings(searched)
    plain = new_simulation(prepared)
    compute_weight_encodings(plain)
    assert encodings(plain) != encodings(searched)


def test_every_channel_has_the_best_of_20_candidates():
    """Of weights with heavy tails, min-max ranges include the largest and the best ranges do not."""
    model = three_layer_network()
    model[0] = torch.nn.Conv2d(3, 8, 7, 2, padding=3)
    with torch.no_grad():
        model[0].weight.exponential_().mul_(torch.randn(8, 3, 7, 7).sign())
    prepared = equalize(model)
    plain, sim = new_simulation(prepared, scheme="tf"), new_simulation(prepared, scheme="tf")
    compute_weight_encodings(plain)
    apply_seq_mse(sim, IMAGES, progress=False)
    layer = prepared.get_submodule("0")
    widest = plain.model.get_submodule("0").param_quantizers["weight"].get_scale().detach()
    images, errors = torch.cat(IMAGES), []
    with torch.no_grad():
        for share in range(1, CANDIDATES + 1):
            scale = widest * share / CANDIDATES
            weight = (layer.weight / scale).round().clamp(-8, 7) * scale
            outputs = torch.nn.functional.conv2d(images, weight, layer.bias, layer.stride, layer.padding)
            errors.append((outputs - layer(images)).square().mean((0, 2, 3)))
    best = torch.stack(errors).argmin(0) + 1
    found = sim.model.get_submodule("0").param_quantizers["weight"].get_scale().detach()
    assert 1 < best.min() < best.max()
    torch.testing.assert_close(found, widest * best[:, None, None, None] / CANDIDATES, rtol=1e-5, atol=0)


def test_weights_of_a_calibrated_simulation_are_searched_and_activations_kept(prepared, searched):
    sim = new_simulation(prepared)
    calibrate(sim, IMAGES)
    before = encodings(sim)
    apply_seq_mse(sim, IMAGES, progress=False)
    after, weights = encodings(sim), encodings(searched)
    for site in quantizer_sites(sim):
        if site.name in after:
            expected = weights if site.kind == WEIGHT else before
            assert after[site.name] == expected[site.name]


def test_calibrating_afterwards_keeps_the_ranges(prepared):
    sim = new_simulation(prepared)
    apply_seq_mse(sim, IMAGES[:1], progress=False)
    before = encodings(sim)
    calibrate(sim, IMAGES)
    after = encodings(sim)
    assert len(after) > len(before) and {name: after[name] for name in before} == before


def test_weights_of_8_bits_are_not_searched():
    prepared = equalize(three_layer_network())
    plain, sim = new_simulation(prepared, 8), new_simulation(prepared, 8)
    compute_weight_encodings(plain)
    apply_seq_mse(sim, IMAGES[:1], progress=False)
    assert encodings(sim) == encodings(plain)


def test_progress_is_shown_on_stderr_if_it_is_wanted(capfd):
    prepared = equalize(three_layer_network())
    sim = new_simulation(prepared)
    capfd.readouterr()
    apply_seq_mse(sim, IMAGES[:1], progress=False)
    assert "".join(capfd.readouterr()) == ""
    apply_seq_mse(new_simulation(prepared), IMAGES[:1])
    out, err = capfd.readouterr()
    assert out == "" and "Sequential MSE" in err and "3/3" in err
