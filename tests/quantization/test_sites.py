"""Quantizer sites, worked by hand and against AIMET's own names and order of execution."""

import pytest
from torch import nn

from ffnet.quantization.lowering import FakeQuantize
from ffnet.quantization.sites import ACTIVATION, precision, quantizer_sites
from tests.helpers.networks import PRE_DOWN, golden_model, random_batches, three_layer_network
from tests.helpers.simulations import logits, simulate

# AIMET's name, kind, tensor in the ONNX file, name in the lowered network, bits
THREE_LAYERS = [
    ("0.input_quantizers.0", "activation", "image", "0_input_quantizer", 16),
    ("0.param_quantizers.weight", "weight", "0.weight", "0", 4),
    ("1.output_quantizers.0", "activation", "1", "1_output_quantizer", 16),
    ("2.param_quantizers.weight", "weight", "2.weight", "2", 4),
    ("3.output_quantizers.0", "activation", "3", "3_output_quantizer", 16),
    ("4.param_quantizers.weight", "weight", "4.weight", "4", 4),
    ("4.output_quantizers.0", "activation", "logits", "4_output_quantizer", 16),
]


@pytest.fixture(
    scope="module",
    params=["toy", pytest.param(PRE_DOWN, marks=pytest.mark.slow)],
)
def sim(request, toy_sim):
    return toy_sim if request.param == "toy" else simulate(golden_model(request.param), random_batches(1))


def test_sites_of_a_three_layer_network_are_those_worked_by_hand():
    sites = quantizer_sites(simulate(three_layer_network(), param_bw=4, output_bw=16))
    assert [(site.name, site.kind, site.tensor, site.lowered_name, site.bit_width) for site in sites] == THREE_LAYERS


@pytest.mark.parametrize(
    ("weights", "activations", "raised", "expected"),
    ((8, 8, {}, "INT8"), (4, 8, {}, "W4A8"), (4, 16, {}, "W4A16"), (4, 8, {1: 8}, "W4A8 mixed"),
     (8, 8, {0: 16}, "W8A8 mixed")),
)  # fmt: skip
def test_the_precision_is_that_of_the_smallest_bit_widths(weights, activations, raised, expected):
    sim = simulate(three_layer_network(), param_bw=weights, output_bw=activations)
    for position, bits in raised.items():
        quantizer_sites(sim)[position].quantizer.bitwidth = bits
    assert precision(sim) == expected


def test_sites_hold_the_quantizers_that_aimet_has_under_their_names(sim):
    sites = quantizer_sites(sim)
    modules = dict(sim.model.named_modules(remove_duplicate=False))
    assert all(site.quantizer is modules[site.name] for site in sites)
    assert {site.name for site in sites} >= {name for name, _ in sim.named_quantizers()}
    assert {id(site.quantizer) for site in sites} == {id(quantizer) for quantizer in sim.quantizers()}
    assert len({site.name for site in sites}) == len(sites)


def test_activation_sites_are_in_the_order_in_which_aimet_runs_their_quantizers(sim):
    calls = []
    hooks = [
        quantizer.register_forward_hook(lambda module, *_: calls.append(id(module))) for quantizer in sim.quantizers()
    ]
    logits(sim.model, random_batches()[0])
    for hook in hooks:
        hook.remove()
    sites = quantizer_sites(sim)
    weights = {id(site.quantizer) for site in sites if site.kind != ACTIVATION}
    assert [call for call in calls if call not in weights] == [
        id(site.quantizer) for site in sites if site.kind == ACTIVATION
    ]


def test_activation_sites_name_every_fake_quantizer_of_the_lowered_network(toy_sim, toy_lowered):
    names = [site.lowered_name for site in quantizer_sites(toy_sim) if site.kind == ACTIVATION]
    modules = {name for name, module in toy_lowered.named_modules() if isinstance(module, FakeQuantize)}
    assert set(names) == modules and len(names) == len(modules)


def test_only_sites_with_a_tensor_of_their_own_in_onnx_files_name_one():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) + x

    sim = simulate(Sum().eval(), cle=False)
    addition = sim.model.module_add
    addition.input_quantizers[1] = addition.output_quantizers[0]
    inputs = {site.name: site for site in quantizer_sites(sim) if site.role == "input"}
    assert inputs["conv.input_quantizers.0"].tensor == "image"
    site = inputs["module_add.input_quantizers.1"]
    assert (site.tensor, site.lowered_name) == (None, "module_add_input_quantizer_1")
