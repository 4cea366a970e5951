"""Sites that change their bit width together, worked by hand."""

from ffnet.quantization.precision import precision_groups
from ffnet.quantization.sites import quantizer_sites
from tests.helpers.simulations import simulate, small_network


def test_the_inputs_and_the_output_of_a_concatenation_are_the_only_sites_that_change_together():
    sim = simulate(small_network(), quant_scheme="tf")
    groups = precision_groups(sim)
    shared = [[site.tensor for site in group] for group in groups if len(group) > 1]
    assert shared == [["adapter.layers.2", "module_interpolate", "module_cat"]]
    tensors = [site.tensor for group in groups for site in group]
    assert sorted(tensors) == sorted(site.tensor for site in quantizer_sites(sim))
    assert tensors[0] == "image" and tensors[-1] == "logits"


def test_raising_a_group_changes_its_sites_and_no_other():
    sim = simulate(small_network(), quant_scheme="tf")
    group = next(group for group in precision_groups(sim) if len(group) > 1)
    group[0].quantizer.qmax = 65535
    assert {site.tensor for site in quantizer_sites(sim) if site.bit_width == 16} == {site.tensor for site in group}
