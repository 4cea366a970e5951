"""The search for a better configuration: which steps it takes, which it drops, and where it ends."""

import contextlib
import dataclasses

import pytest
import torch

from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation import metrics
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.scores import FP32, INT8_SIMULATED
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.recovery.search import (
    ADAROUND,
    PLAIN,
    SEQ_MSE,
    RecoverySearch,
    calibrate_or_restore,
    recover,
)
from ffnet.quantization.sites import (
    UNSAVED,
    SavedStates,
    load_state,
    quantizer_sites,
    read_state,
    save_state,
    write_state,
)
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.system.errors import UserError
from ffnet.system.process import Terminated
from ffnet.system.schema import parse
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


class Kept(SavedStates):
    """Keeps what is saved as the bytes of files, and stops the search after some of it as a signal does."""

    def __init__(self, folder):
        self.folder, self.left = folder, None
        folder.mkdir()

    def load(self, name, like, form):
        path = self.folder / name
        if not path.exists():
            return None
        state, description = load_state(path, like)
        return state, parse(form, description)

    def save(self, name, state, description=None):
        assert not (self.folder / name).exists()
        (self.folder / name).write_bytes(save_state(state, description))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Terminated(15)


def make_search(labelled=True, recovery_images=2, saved=UNSAVED, **config):
    """Return a search on the small network at W4A8, on four calibration images and three selection images."""
    model = small_network()
    options = QuantizationConfig(param_bw=4, recovery_images=recovery_images, **config)
    float_network = equalize(model)
    sim = build_quantsim(float_network, options)
    calibration = make_images(model, 4, seed=0)
    calibrate_or_restore("ranges", sim, calibration, RUNTIME, saved)
    return RecoverySearch(sim, float_network, calibration, make_images(model, 3, 1, labelled), options, RUNTIME, saved)


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
    scores = evaluate({FP32: small_network(), INT8_SIMULATED: lower(search.sim)}, search.selection, RUNTIME)
    fp32, int8 = (100 * metrics.mean_iou(scores.total(name)) for name in (FP32, INT8_SIMULATED))
    assert search.best.drop == pytest.approx(fp32 - int8, abs=0.3)  # AdaRound's result is in `state`, FP32 is equalized
    assert search.best.matrices[INT8_SIMULATED].tolist() == scores.confusion_matrices[INT8_SIMULATED].tolist()


def test_a_target_that_is_met_needs_no_step():
    search = make_search(max_drop=100.0)
    search.run()
    assert names(search.tried) == [PLAIN]


@pytest.mark.slow
def test_more_bits_come_last_and_only_as_many_as_the_target_needs():
    search = make_search(max_drop=0.0, adaround=20)
    plain = bit_widths(search.sim)
    search.run()
    shown = [candidate for candidate in search.tried if candidate.shown]
    assert names(shown)[:3] == [PLAIN, SEQ_MSE, BOTH]
    assert [len(candidate.raised) for candidate in shown[3:7]] == [1, 2, 4, 8]
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


@pytest.mark.slow
def test_a_search_that_is_stopped_after_every_saved_part_ends_as_one_that_is_not_stopped(tmp_path):
    """After every layer of sequential MSE and AdaRound, every calibration and every measurement there is a stop."""

    def run(saved):
        search = make_search(saved=saved, max_drop=0.0, adaround=20)
        recovery = recover(search)
        steps = [dataclasses.replace(step, seconds=0) for step in recovery.steps]
        state = {name: vars(value) for name, value in read_state(search.sim).items()}
        return dataclasses.replace(recovery, steps=steps), state, [each.matrices for each in search.tried]

    expected, saved, found = run(UNSAVED), Kept(tmp_path / "saved"), None
    while found is None:
        saved.left = 1
        with contextlib.suppress(Terminated):
            found = run(saved)
    names = {path.name for path in saved.folder.iterdir()}
    layers = {site.layer for site in quantizer_sites(make_search().sim) if site.kind == "weight"}
    assert len(found[2]) > 3 and names > {f"{step}-{layer}" for step in ("seq-mse", "adaround") for layer in layers}
    assert found[0] == expected[0]
    for name, values in expected[1].items():
        for field, value in values.items():
            assert (
                torch.equal(found[1][name][field], value) if torch.is_tensor(value) else found[1][name][field] == value
            )
    for one, other in zip(found[2], expected[2], strict=True):
        assert {name: each.tolist() for name, each in one.items()} == {
            name: each.tolist() for name, each in other.items()
        }


def test_it_says_what_it_will_try_and_when_it_ends(caplog):
    with caplog.at_level("INFO", "ffnet"):
        make_search(max_drop=100.0).run()
    (message,) = caplog.messages
    assert "sequential MSE (about 1 s), AdaRound (about" in message and "at most 100 percentage points" in message
    assert "mixed precision (up to" in message
