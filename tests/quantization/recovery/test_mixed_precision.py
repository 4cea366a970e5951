"""Mixed precision: searches among sets that are known to suffice, and bit widths worked by hand."""

import itertools

import pytest

from ffnet.config import QuantizationConfig
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.quantization.recovery.mixed_precision import (
    drop_unneeded,
    mixed_state,
    precision_groups,
    raise_until,
    raised_state,
    rank_groups,
)
from ffnet.quantization.sensitivity import Sensitivity, SensitivityRow
from ffnet.quantization.sites import ACTIVATION, WEIGHT, quantizer_sites, read_state, write_state
from tests.helpers.networks import random_batches, three_layer_network
from tests.helpers.simulations import encodings, logits, simulate, small_network

X = random_batches(3)[2]
SHARED = ("adapter.layers.2", "module_interpolate", "module_cat")  # layers whose outputs share a quantizer


class Needed:
    """Accepts every choice with all numbers of `needed`, and counts the evaluations."""

    def __init__(self, needed):
        self.needed, self.evaluated = set(needed), []

    def __call__(self, raised):
        self.evaluated.append(tuple(raised))
        return self.needed <= set(raised)


@pytest.mark.parametrize("number", range(1, 8))
def test_groups_are_raised_by_powers_of_two_and_exactly_the_needed_ones_stay_raised(number):
    """All subsets of up to 7 groups; no choice is evaluated twice."""
    for needed in itertools.chain.from_iterable(itertools.combinations(range(number), k) for k in range(1, number + 1)):
        meets = Needed(needed)
        raised = raise_until(range(number), meets)
        last = max(needed)
        assert list(raised) == list(range(min(1 << last.bit_length(), number)))
        assert list(drop_unneeded(raised, meets)) == list(needed)
        assert len(set(meets.evaluated)) == len(meets.evaluated)


@pytest.mark.parametrize("number", (0, 1, 5))
def test_groups_that_do_not_suffice_give_none(number):
    meets = Needed([number])
    assert raise_until(range(number), meets) is None
    assert number == 0 or len(meets.evaluated[-1]) == number


def test_the_one_group_that_matters_of_16_is_found_with_few_evaluations():
    for needed in range(16):
        meets = Needed([needed])
        assert list(drop_unneeded(raise_until(range(16), meets), meets)) == [needed]
        assert len(meets.evaluated) <= 12


def test_what_is_left_is_accepted_even_if_fewer_groups_may_be_better():
    """Accepted: the four groups, and any choice of two; three are too many."""
    accepted = [(5, 6, 7, 8)]

    def meets(raised):
        accepted.extend([tuple(raised)] if len(raised) == 2 else [])
        return len(raised) in (4, 2)

    assert tuple(drop_unneeded([5, 6, 7, 8], meets)) in accepted


@pytest.fixture(scope="module")
def sim():
    return simulate(small_network(), random_batches(1), param_bw=4)


def names(groups):
    return [[site.name for site in group] for group in groups]


def test_quantizers_that_are_shared_form_one_group_in_order_of_execution(sim):
    groups = precision_groups(sim)
    assert {f"{layer}.output_quantizers.0" for layer in SHARED} in map(set, names(groups))
    assert sum(len(group) for group in groups) == len(quantizer_sites(sim))
    assert len(groups) == len({id(quantizer) for quantizer in sim.quantizers()})
    order = [site.name for site in quantizer_sites(sim)]
    positions = [order.index(group[0]) for group in names(groups)]
    assert positions == sorted(positions)
    assert {group[0].kind for group in groups} == {WEIGHT, ACTIVATION}


@pytest.mark.parametrize(
    ("param_bw", "output_bw", "weights", "activations"),
    ((4, 8, 3, 4), (8, 8, 0, 4), (4, 16, 3, 0), (16, 8, 0, 0), (9, 4, 0, 0)),
)
def test_only_quantizers_with_fewer_bits_are_raised_and_int32_biases_keep_their_range(
    param_bw, output_bw, weights, activations
):
    sim = build_quantsim(equalize(three_layer_network()), QuantizationConfig(param_bw=param_bw, output_bw=output_bw))
    kinds = [group[0].kind for group in precision_groups(sim)]
    assert (kinds.count(WEIGHT), kinds.count(ACTIVATION)) == (weights, activations)


def test_groups_are_in_the_order_of_their_most_sensitive_quantizer():
    sim = build_quantsim(equalize(small_network()), QuantizationConfig(param_bw=4))
    sites = quantizer_sites(sim)
    first = [("block.conv2", WEIGHT), ("module_interpolate", ACTIVATION), ("classifier", ACTIVATION)]
    order = first + [(site.layer, site.kind) for site in sites if (site.layer, site.kind) not in first]
    rows = [SensitivityRow(layer, kind, "", 0, 8, 10.0, 99.0, 10.0, 99.0) for layer, kind in order]
    groups = precision_groups(sim)
    ranked = rank_groups(groups, Sensitivity(rows, 10.0, 99.0, 1))
    assert [group[0].kind for group in ranked[:3]] == [WEIGHT, ACTIVATION, ACTIVATION]
    expected = [{"block.conv2"}, set(SHARED), {"classifier"}]
    assert [{site.layer for site in group} for group in ranked[:3]] == expected
    assert ranked[3:] == [group for group in groups if group not in ranked[:3]]


def bits(sim):
    return {site.name: site.bit_width for site in quantizer_sites(sim)}


def test_raised_quantizers_have_more_bits_and_all_others_their_old_encodings():
    batches = random_batches(1)
    sim = simulate(small_network(), batches, param_bw=4)
    for site in quantizer_sites(sim):  # as after sequential MSE and AdaRound
        site.quantizer.allow_overwrite(site.kind == ACTIVATION)
    before, low_bits, low = encodings(sim), bits(sim), read_state(sim)
    low_logits = logits(sim.model, X)
    groups = precision_groups(sim)
    high = raised_state(sim, groups, lambda: calibrate(sim, batches))
    expected = simulate(small_network(), batches, param_bw=8, output_bw=16)
    assert bits(sim) == bits(expected) and encodings(sim) == encodings(expected)

    chosen = [group for group in groups if group[0].layer in ("block.conv2", "module_interpolate", *SHARED)]
    raised = {site.name for group in chosen for site in group}
    assert len(chosen) == 3 and len(raised) == 5
    write_state(sim, mixed_state(low, high, chosen))
    mixed, all_high = encodings(sim), encodings(expected)
    assert mixed == {name: (all_high if name in raised else before)[name] for name in before}
    assert bits(sim) == {name: bits(expected)[name] if name in raised else low_bits[name] for name in low_bits}
    write_state(sim, mixed_state(low, high, []))
    assert encodings(sim) == before and (logits(sim.model, X) == low_logits).all()
