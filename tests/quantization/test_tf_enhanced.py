"""The fast analyzer against AIMET's own: histograms and encodings to the last bit."""

import pytest
import torch
from aimet_torch.quantization.encoding_analyzer import TfEnhancedEncodingAnalyzer

from ffnet.config import QuantizationConfig
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.tf_enhanced import EXACT, FastTfEnhancedAnalyzer, exact_histogram, use_fast_analyzers
from tests.helpers.networks import three_layer_network

torch.manual_seed(0)
NOISE = torch.randn(2, 6, 9, 11)
ACTIVATIONS = {
    "one batch": [NOISE],
    "within the range": [NOISE, NOISE / 3],
    "the range grows": [NOISE, 1.5 * NOISE, NOISE, 2 * NOISE],
    "beyond the limit": [NOISE, 100 * NOISE, 50 * NOISE, -100 * NOISE],
    "of one sign": [NOISE.relu(), 2 * NOISE.relu(), NOISE.relu()],
    "constant": [torch.full((1, 2, 3, 4), 0.7), NOISE],
    "zero": [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)],
    "infinite": [NOISE, NOISE.where(NOISE < 2, torch.inf), NOISE.where(NOISE > -2, -torch.inf)],
    "infinite at first": [NOISE.where(NOISE < 2, torch.inf), NOISE],
    "channels_last": [batch.contiguous(memory_format=torch.channels_last) for batch in (NOISE, NOISE / 2, 2 * NOISE)],
}
WEIGHT = torch.randn(48, 5, 3, 3)
WEIGHTS = {
    "noise": WEIGHT,
    "a zero channel": WEIGHT * (torch.arange(48) != 3).view(-1, 1, 1, 1),
    "channels of very different ranges": WEIGHT * 2.0 ** torch.arange(-24, 24).view(-1, 1, 1, 1),
    "channels_last": WEIGHT.contiguous(memory_format=torch.channels_last),
    "of one sign": WEIGHT.abs(),
    "outliers": WEIGHT**5,
    "uniform": torch.rand(48, 5, 3, 3) - 0.5,
    "constant channels": WEIGHT[:, :1, :1, :1].expand(WEIGHT.shape).contiguous(),
    "three values": WEIGHT.sign() * (WEIGHT.abs() > 1),
    "huge": WEIGHT * 2.0**64,
    "one value other than zero": WEIGHT * (torch.arange(45).view(5, 3, 3) == 7),
}


def assert_equal(shape, batches, steps, symmetric):
    fast, aimets = FastTfEnhancedAnalyzer(shape), TfEnhancedEncodingAnalyzer(shape)
    for batch in batches:
        fast.compute_encodings_from_stats(fast.update_stats(batch), steps, symmetric)
        aimets.update_stats(batch)
    for one, other in zip(fast.observer.get_stats(), aimets.observer.get_stats(), strict=True):
        for key in ("histogram", "bin_edges", "min", "max"):
            assert torch.equal(getattr(one, key), getattr(other, key)), key
    for one, other in zip(*(a.compute_encodings(steps, symmetric) for a in (fast, aimets)), strict=True):
        assert torch.equal(one, other) and one.shape == shape


@pytest.mark.parametrize("steps", (15, 255, 65535))
@pytest.mark.parametrize("batches", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_give_aimets_histograms_and_encodings(batches, steps):
    assert_equal((), batches, steps, False)


@pytest.mark.parametrize("shape", ((), (48, 1, 1, 1)))
@pytest.mark.parametrize("steps", (7, 15, 255, 65535))
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_give_aimets_histograms_and_encodings(weight, steps, shape):
    assert_equal(shape, [weight], steps, True)


def test_more_values_than_float32_counts_one_by_one_are_counted_exactly():
    values = torch.full((EXACT + 4,), 0.5)
    values[:2] = 0.1
    assert exact_histogram(values, 4, 0.0, 1.0).tolist() == [2, 0, EXACT + 2, 0]
    assert torch.equal(exact_histogram(NOISE.flatten(), 512, -2.0, 3.0), torch.histc(NOISE, 512, -2.0, 3.0))


def test_channels_along_the_second_axis_are_left_to_aimet():
    assert_equal((1, 5, 1, 1), [torch.randn(48, 5, 3, 3)], 255, True)


def test_a_reset_discards_what_was_counted():
    fast, aimets = FastTfEnhancedAnalyzer(()), TfEnhancedEncodingAnalyzer(())
    fast.update_stats(100 * NOISE)
    fast.compute_encodings(255, False)
    fast.reset_stats()
    for analyzer in (fast, aimets):
        analyzer.update_stats(NOISE)
    assert fast.compute_encodings(255, False) == aimets.compute_encodings(255, False)


def test_only_tf_enhanced_analyzers_are_replaced():
    prepared = equalize(three_layer_network())
    for scheme, expected in (("tf_enhanced", FastTfEnhancedAnalyzer), ("tf", None)):
        sim = build_quantsim(prepared, QuantizationConfig(quant_scheme=scheme))
        before = [type(quantizer.encoding_analyzer) for quantizer in sim.quantizers()]
        use_fast_analyzers(sim)
        after = [type(quantizer.encoding_analyzer) for quantizer in sim.quantizers()]
        assert after == [expected or kind for kind in before]
