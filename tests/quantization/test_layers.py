"""The errors of layers by hand, and against AIMET's own tools."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from aimet_torch.common.utils import CallbackFunc
from aimet_torch.quant_analyzer import QuantAnalyzer
from torch import nn

from ffnet.checkpoints.loading import load_checkpoint
from ffnet.quantization.layers import (
    activations,
    compare_activations,
    histograms,
    layer_names,
    layer_rows,
    record,
    worst_weights,
)
from ffnet.quantization.lowering import FakeQuantize, lower
from ffnet.quantization.quantsim import equalize
from ffnet.quantization.sensitivity import remove_quantizers
from ffnet.quantization.sites import quantizer_sites
from tests.helpers.exports import scenes
from tests.helpers.networks import DEMO, PRE_DOWN, demo_checkpoint, golden_model, random_batches
from tests.helpers.simulations import simulate, small_network


class Doubler(nn.Module):
    def forward(self, x):
        return 2 * x


def network(quantizer):
    """Two layers, the image itself and its double, each with a quantizer behind it."""
    return nn.Sequential(OrderedDict(first=quantizer(), twice=Doubler(), second=quantizer()))


def byte():
    """The quantizer of 0, 0.1, ..., 25.5."""
    return FakeQuantize(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 255)


def test_the_sqnr_of_two_layers_is_the_one_by_hand():
    """Values 0.04, 0.26 and 10: the first layer has 0, 0.3 and 10, the second 0, 0.6 and 20."""
    lowered, plain = network(byte), network(nn.Identity)
    compared = {name: (name, lowered.get_submodule(name)) for name in ("first", "second")}
    image = torch.tensor([0.04, 0.26, 10.0])
    found = compare_activations(plain, compared, [(image, record(lowered, compared, image))] * 2)
    expected = 10 * math.log10((0.04**2 + 0.26**2 + 10**2) / (0.04**2 + 0.04**2))
    assert found["first"].total == found["first"].own == pytest.approx(expected, rel=1e-5)
    assert found["second"].total == pytest.approx(expected, rel=1e-5)  # everything is doubled
    assert found["second"].own is None or found["second"].own > 100  # it doubles 0, 0.3 and 10 exactly


def test_a_histogram_counts_the_values_in_fp32_and_the_share_that_is_clipped():
    image = torch.tensor([-100.0, 0.0, 0.3, 0.36, 25.5, 25.6, 27.0, 1000.0])
    (found,) = histograms(network(nn.Identity), {"first": ("first", byte())}, {"first": "its name"}, [image])
    counts = {index: count for index, count in enumerate(found.counts) if count}
    assert counts == {0: 1, 16: 2, 17: 1, 79: 1, 80: 1, 83: 1, 95: 1}  # bins of four steps: 80 begins at 25.55
    assert (found.layer, found.clipped) == ("its name", 0.5)
    assert (found.low, found.high, found.step) == pytest.approx((0.0, 25.5, 0.1))


def test_functions_have_the_name_of_the_module_that_calls_them():
    model = golden_model(PRE_DOWN)
    sim = simulate(model, random_batches(1, (64, 64)), quant_scheme="tf")
    names = layer_names(model, sim)
    assert names["module_interpolate_5"] == "head.layers.2: interpolate 3"
    assert names["head.layers.1.module_add_7"] == "head.layers.1: add 2"
    assert names["backbone_model.layer1.0.module_relu_1"] == "backbone_model.layer1.0.relu 2"
    assert (names["module_pad"], names["module_cat"]) == ("pad", "head.layers.2: cat")
    rows = layer_rows(model, sim)
    labels = [row.layer for row in rows]
    assert len(set(labels)) == len(labels) and not [label for label in labels if "module_" in label]
    assert (rows[0].layer, rows[-1].tensor, rows[-1].layer) == ("image", "logits", "head.layers.3.last_layer.3")


def test_the_ranges_of_weights_are_those_of_aimets_networks_before_and_after_equalization():
    model = small_network()
    sim = simulate(model, random_batches(1), param_bw=4)
    found = worst_weights(model, SimpleNamespace(sim=sim, float_network=sim.model, lowered=lower(sim)))
    assert len(found) == 5 and found == sorted(found, key=lambda each: each.sqnr)
    for each in found:
        for ranges, prepared in ((each.before, equalize(model, cle=False)), (each.after, equalize(model))):
            weight = prepared.get_submodule(each.layer).weight
            assert ranges == pytest.approx(weight.abs().amax((1, 2, 3)).tolist(), rel=1e-3)
        weight = sim.model.get_submodule(each.layer).weight.detach()
        error = weight - sim.model.get_submodule(each.layer).param_quantizers["weight"](weight).detach()
        assert each.sqnr == pytest.approx(10 * math.log10(weight.square().sum() / error.square().sum()), rel=1e-4)


@pytest.mark.slow
def test_the_total_errors_of_the_demos_network_are_those_of_aimets_quant_analyzer(tmp_path):
    model = load_checkpoint(DEMO, demo_checkpoint(DEMO)).model
    image = scenes()[:1]
    sim, prepared = simulate(model, [image]), equalize(model)
    lowered, values = lower(sim), {}
    compared = activations(quantizer_sites(sim), lowered)
    plain = remove_quantizers(sim, prepared, lowered)
    found = compare_activations(plain, compared, [(image, record(lowered, compared, image))])
    for name, (module, _) in compared.items():
        plain.get_submodule(module).register_forward_hook(lambda *call, name=name: values.update({name: call[2]}))
    plain(image)
    callback = CallbackFunc(lambda *_: 0.0)
    analyzer = QuantAnalyzer(prepared, image, callback, callback)
    analyzer.enable_per_layer_mse_loss([image], 1)
    expected = analyzer.export_per_layer_mse_loss(sim, str(tmp_path))
    layers = {site.tensor: site.layer for site in quantizer_sites(sim) if site.role == "output"}
    assert len(layers) == len(found) - 1 > 40
    for tensor, layer in layers.items():
        signal = values[tensor].square().mean().item()
        assert found[tensor].total == pytest.approx(10 * math.log10(signal / expected[layer]), rel=1e-4)
