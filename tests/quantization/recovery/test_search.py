"""The search for a better configuration: which steps it takes, which it drops, and where it ends."""

import numpy as np
import pytest
import torch

from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation import metrics
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.metrics import Estimate, Statistics
from ffnet.evaluation.scores import FP32, SIMULATED
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate_on_images, equalize
from ffnet.quantization.recovery.search import ADAROUND, PLAIN, SEQ_MSE, Candidate, RecoverySearch
from ffnet.quantization.sites import quantizer_sites, write_state
from ffnet.quantization.weighted_layers import Cost, raise_weight_scales
from ffnet.system.errors import UserError
from tests.helpers.simulations import small_network

RUNTIME = Runtime(batch_size=2, quiet=True)
SIZE = (32, 64)
BOTH = f"{SEQ_MSE} and {ADAROUND}"


def make_images(model, number, seed, labelled=True):
    """Return random images whose labels are the network's own predictions, so that its mIoU in FP32 is 100."""
    images = torch.randint(0, 256, (number, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(model(normalize(images)), size=SIZE, mode="bilinear")
    labels = logits.argmax(1).to(torch.uint8)
    return list(zip(images, labels if labelled else torch.full_like(labels, 255), strict=True))


def make_search(labelled=True, recovery_images=2, **config):
    """Return a search on the small network at W4A8, on four calibration images and three selection images."""
    model = small_network()
    options = QuantizationConfig(param_bw=4, recovery_images=recovery_images, **config)
    float_network = equalize(model)
    sim = build_quantsim(float_network, options)
    calibration = make_images(model, 4, seed=0)
    calibrate_on_images(sim, calibration, RUNTIME)
    return RecoverySearch(sim, float_network, calibration, make_images(model, 3, 1, labelled), options, RUNTIME)


def names(candidates):
    return [candidate.name for candidate in candidates]


def bit_widths(sim):
    return {site.name: site.bit_width for site in quantizer_sites(sim)}


def test_requested_steps_are_all_taken_and_the_last_one_is_used():
    search = make_search(seq_mse=True, adaround=20)
    search.run()
    assert names(search.tried) == [PLAIN, SEQ_MSE, BOTH]
    assert search.best.name == BOTH
    assert {candidate.cost for candidate in search.tried} == {search.tried[0].cost}
    assert search.tried[0].cost.weight_bytes == 0.5


def test_the_drop_is_that_of_an_evaluation_of_the_saved_state():
    search = make_search(adaround=20)
    search.run()
    write_state(search.sim, search.best.state)
    raise_weight_scales(search.sim)
    scores = evaluate({FP32: search.float_network, SIMULATED: lower(search.sim)}, search.selection, RUNTIME)
    fp32, simulated = scores.total(FP32), scores.total(SIMULATED)
    labelled = fp32.sum(1) > 0
    drop = 100 * (metrics.iou(fp32) - metrics.iou(simulated))[labelled].mean()
    assert search.best.drop == pytest.approx(drop) and 0 < labelled.sum() < 19
    assert search.best.statistics.miou.value == pytest.approx(scores.miou(SIMULATED))


def candidate(name, change, without, cost=1.0):
    """A configuration with a mIoU change; `without`: the change without each selection image."""
    estimate = Estimate(change, np.array(without), len(without))
    return Candidate(name, {}, (), Statistics(estimate, estimate, ()), estimate, Cost(cost, cost), 1.0)


NOISY = candidate("noisy", -0.04, [-0.06, -0.04, -0.04, -0.02])  # standard error: (3 / 4 * 0.0008) ** 0.5 = 0.0245
STEADY = candidate("steady", -0.04, [-0.04] * 4, cost=2.0)


def test_a_target_is_met_if_the_estimate_and_one_standard_error_do():
    assert NOISY.meets(0.0646) and not NOISY.meets(0.0644) and STEADY.meets(0.0401)


def test_too_few_images_and_a_target_of_0_leave_it_to_the_estimate():
    few = candidate("three images", -0.04, [-0.06, -0.04, -0.02])
    assert few.meets(0.0401) and not few.meets(0.0399)
    assert candidate("target 0", 0.0, [-0.02, 0.0, 0.0, 0.02]).meets(0) and not candidate("a", -0.001, [0.0]).meets(0)


def test_a_configuration_that_meets_the_target_by_chance_is_not_chosen():
    search = make_search(max_drop=0.05)
    search.tried = [NOISY]
    missed = search.outcome(False)
    assert missed.met is False and "No configuration met --max-drop 0.05" in missed.describe()
    search.tried = [NOISY, STEADY]
    outcome = search.outcome(False)
    assert outcome.chosen == "steady" and outcome.met
    assert [(step.name, step.met) for step in outcome.steps] == [("noisy", False), ("steady", True)]


def test_a_target_that_is_met_needs_no_step():
    search = make_search(max_drop=100.0)
    search.run()
    assert names(search.tried) == [PLAIN]


@pytest.mark.slow
def test_more_bits_come_last_and_only_as_many_as_the_target_needs():
    search = make_search(max_drop=0.0, adaround=20)
    plain = bit_widths(search.sim)
    search.run()
    assert names(search.tried)[:3] == [PLAIN, SEQ_MSE, BOTH]
    assert [len(candidate.raised) for candidate in search.tried[3:7]] == [1, 2, 4, 8]
    steps = [step.name for step in search.outcome(False).steps]
    assert steps == names(search.tried) and len(set(steps)) == len(steps)
    smallest = min(candidate.drop for candidate in search.tried)
    assert search.best.drop == smallest or search.best.drop <= 0
    write_state(search.sim, search.best.state)
    raised = {site.name for sites in search.best.raised for site in sites}
    changed = {name for name, bits in bit_widths(search.sim).items() if bits != plain[name]}
    assert changed == raised


@pytest.mark.slow
def test_the_cheapest_configuration_that_meets_the_target_is_used():
    search = make_search(max_drop=0.0, adaround=20)
    search.run()
    target = sorted(candidate.drop for candidate in search.tried)[len(search.tried) // 2]
    meeting = [candidate for candidate in search.tried if candidate.drop <= target]
    search.config = QuantizationConfig(param_bw=4, max_drop=target)
    assert search.best.cost.bit_operations == min(each.cost.bit_operations for each in meeting)


@pytest.mark.slow
def test_a_step_starts_from_the_best_configuration_so_far(monkeypatch):
    """A step that spoils the network is measured and then left out."""
    search = make_search(max_drop=0.0, adaround=20)

    def spoil(*_):
        for site in quantizer_sites(search.sim):
            if site.kind == "weight":
                site.quantizer.set_range(site.quantizer.min * 50, site.quantizer.max * 50)
                site.quantizer.allow_overwrite(False)

    monkeypatch.setattr("ffnet.quantization.recovery.search.apply_seq_mse", spoil)
    search.run()
    assert names(search.tried)[:3] == [PLAIN, SEQ_MSE, ADAROUND]
    assert SEQ_MSE not in names(search.bases)


def test_an_interrupted_search_knows_the_best_so_far(monkeypatch):
    search = make_search(max_drop=0.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ffnet.quantization.recovery.search.apply_adaround", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert search.best.name in (PLAIN, SEQ_MSE)
    assert search.best.drop == min(candidate.drop for candidate in search.tried)


@pytest.mark.slow
def test_a_target_needs_labels():
    with pytest.raises(UserError, match="no pixel of the selection images is labelled"):
        make_search(labelled=False, max_drop=1.0).run()
    without_target = make_search(labelled=False, adaround=5)
    without_target.run()
    assert without_target.best.drop != without_target.best.drop


def test_a_step_without_enough_memory_names_the_option(monkeypatch):
    search = make_search(adaround=5, recovery_images=7)

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("ffnet.quantization.recovery.search.apply_adaround", fail)
    with pytest.raises(UserError, match="--recovery-images 7: the memory does not suffice for AdaRound"):
        search.run()


def test_it_says_what_it_will_try_and_when_it_ends(caplog):
    with caplog.at_level("INFO", "ffnet"):
        make_search(max_drop=100.0).run()
    (message,) = caplog.messages
    assert "sequential MSE (about 1 s), AdaRound (about" in message and "at most 100 percentage points" in message
    assert "mixed precision (up to" in message
