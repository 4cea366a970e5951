"""The one function that quantizes, against the same steps with AIMET's own calibration."""

from dataclasses import replace

import pytest
import torch

from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation.loading import normalize
from ffnet.quantization.quantize import quantize
from ffnet.quantization.quantsim import equalize, quiet_aimet
from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.networks import three_layer_network
from tests.helpers.simulations import calibrated_by_aimet, encodings, logits, random_images, small_network

QUIET = Runtime(quiet=True, num_workers=0)


@pytest.mark.slow
def test_quantize_equalizes_calibrates_on_the_images_and_raises_weight_scales():
    model, images = small_network(), random_images(3)
    norm = model.block.bn1
    with torch.no_grad():  # a channel of nearly zero weights with a bias
        norm.weight[3], norm.bias[3] = 1e-12, 400
    config = QuantizationConfig(cle=False, param_bw=4)
    network = quantize(model, images, config, replace(QUIET, batch_size=2))
    batches = [normalize(torch.stack([image for image, _ in images[i : i + 2]])) for i in (0, 2)]
    expected = calibrated_by_aimet(equalize(model, cle=False), batches, config)
    assert encodings(network.sim) != encodings(expected)
    assert raise_weight_scales(expected) == network.raised_scales == {"block.conv1": 1}
    assert encodings(network.sim) == encodings(expected)
    assert torch.equal(logits(network.lowered, batches[0]), logits(expected.model, batches[0]))
    found = network.found
    assert (found.calibration_images, found.batch_size, found.recovery, network.loaded) == (3, 2, None, None)


def test_encodings_from_a_file_need_no_images(tmp_path):
    sim = quantize(three_layer_network(), random_images(3), QuantizationConfig(), QUIET).sim
    with quiet_aimet():
        sim.save_encodings_to_json(str(tmp_path), "encodings")
    config = QuantizationConfig(encodings=tmp_path / "encodings.json")
    network = quantize(three_layer_network(), None, config, QUIET)
    assert encodings(network.sim) == encodings(sim)
    assert (network.found.calibration_images, network.loaded.missing) == (0, ())
