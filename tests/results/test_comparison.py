"""The comparison of models: fronts and intervals against their definitions, and cases worked by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from ffnet.evaluation.metrics import Estimate
from ffnet.evaluation.scores import FP32, SIMULATED
from ffnet.model import build_model
from ffnet.results.comparison import GMACS, LATENCY, Candidate, compare_model, excludes_zero, pareto_front
from tests.helpers.names import INT8_SIMULATED
from tests.helpers.results import (
    ZOO,
    compared_models,
    comparison_of,
    plain_model,
    random_scores,
    small_npu,
    small_result,
    zoo_comparison,
)

PARAMETERS = {
    variant["name"]: variant["parameters"]
    for variant in json.loads((Path(__file__).parents[1] / "data" / "variants.json").read_text())
}
FULL, HALF = (1024, 2048), (512, 1024)


@pytest.fixture(scope="module")
def zoo():
    """Five models with random scores on the same images."""
    return zoo_comparison()


def names(front):
    return [member.model.short_name for member in front.members]


@pytest.mark.parametrize("seed", range(20))
def test_the_pareto_front_is_what_nothing_beats(seed):
    """By brute force, on few different numbers, so that many are equal."""
    rng = np.random.default_rng(seed)
    costs, values = rng.integers(0, 6, (2, rng.integers(1, 20))).tolist()
    candidates = [
        Candidate(index, cost, Estimate(value, np.empty(0), 0))
        for index, (cost, value) in enumerate(zip(costs, values, strict=True))
    ]
    unbeaten = {
        one.model
        for one in candidates
        if not any(
            cost <= one.cost and value >= one.estimate.value and (cost, value) != (one.cost, one.estimate.value)
            for cost, value in zip(costs, values, strict=True)
        )
    }
    front = pareto_front(candidates)
    assert {member.model for member in front} == unbeaten and len(front) == len(unbeaten)
    assert [member.cost for member in front] == sorted(member.cost for member in front)
    assert pareto_front([]) == []


@pytest.mark.parametrize("name", ("segmentation_ffnet40S_dBBB_mobile", "segmentation_ffnet122NS_CCC_mobile_pre_down"))
def test_parameters_are_the_published_ones_and_gmacs_those_of_all_convolutions(name):
    model = compare_model(small_result(model=name, size=HALF), None, "a/report.html")
    assert model.parameters == PARAMETERS[name] and model.link == "a/report.html"
    counted = []

    def count(module, _, output):
        counted.append(output.numel() * module.weight[0].numel())

    with torch.device("meta"):
        network = build_model(name)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        network.to("meta")(torch.empty(1, 3, *HALF))
    smoothing = 255 * 510 * 3 * 25 if "pre_down" in name else 0
    assert model.gmacs == (sum(counted) + smoothing) / 1e9 and len(counted) > 50


def test_a_compared_model_has_the_fields_of_its_result_and_no_scores():
    result = small_result(npu=small_npu(), size=FULL)
    model = compare_model(result, "sm8850", None)
    assert model.result == result and model.result.details.scores.confusion_matrices == {}
    assert (model.short_name, model.latency, model.miou) == ("ffnet40S_dBBB_mobile", 3.05, 83.75)
    fp32_alone = dataclasses.replace(result, backends={FP32: result.backends[FP32]})
    assert dataclasses.replace(model, result=fp32_alone).miou is None


def test_gains_are_those_over_the_next_cheaper_member_with_paired_intervals():
    """Against a loop that leaves out each image in turn."""
    qualities = (0.87, 0.88)
    comparison = comparison_of(compared_models(ZOO[:2], qualities))
    cheaper, member = comparison.front(GMACS).members
    assert cheaper.gain is cheaper.gain_interval is None
    matrices = np.array([random_scores(q, seed=seed).confusion_matrices[SIMULATED] for seed, q in enumerate(qualities)])

    def gain(images):
        totals = matrices[:, images].sum(1)
        hits = totals.diagonal(axis1=1, axis2=2)
        first, second = 100 * (hits / (totals.sum(1) + totals.sum(2) - hits)).mean(1)
        return second - first

    without_one = [gain([image for image in range(24) if image != left_out]) for left_out in range(24)]
    expected = scipy.stats.t.interval(0.95, 23, gain(range(24)), np.sqrt(23 * np.var(without_one)))
    assert member.gain.value == pytest.approx(member.model.miou - cheaper.model.miou)
    assert member.gain_interval == pytest.approx(expected)
    assert member.gain_interval[1] - member.gain_interval[0] > 0.4 and excludes_zero(member.gain_interval)


def test_a_stray_pixel_of_a_class_that_no_label_has_does_not_decide_between_models():
    """The better model has the lower mIoU by the official definition, because of one pixel."""
    models = []
    for name, quality, stray in zip(ZOO[:2], (0.87, 0.88), (0, 1), strict=True):
        scores = random_scores(quality)
        for matrices in scores.confusion_matrices.values():
            matrices[:, 18] = matrices[:, :, 18] = 0
        scores.confusion_matrices[SIMULATED][0, 0, 18] = stray
        models.append(compare_model(small_result(scores, model=name, size=FULL), None, None))
    cheaper, member = comparison_of(models).front(GMACS).members
    assert member.model.simulated.miou < cheaper.model.simulated.miou - 2 and 0.5 < member.gain.value < 2
    assert member.gain.value == pytest.approx(member.model.miou - cheaper.model.miou)
    assert excludes_zero(member.gain_interval)


def test_a_latency_for_images_of_another_size_is_not_on_the_front(zoo):
    """AI Hub measured two models with 512x1024; they would be the fastest."""
    front = zoo.front(LATENCY)
    assert names(front) == ["ffnet40S_dBBB_mobile", "ffnet54S_dBBB_mobile", "ffnet78S_dBBB_mobile"]
    assert [member.cost for member in front.members] == [3.986, 4.387, 4.947] and len(front.candidates) == 3
    assert [front.has(model) for model in zoo.models] == [True, True, True, None, None]
    (note,) = [note for note in zoo.notes() if "another size" in note]
    assert note.endswith(": ffnet78S_BCC_mobile, ffnet122NS_CCC_mobile.")
    assert any("on Samsung Galaxy S25, from Qualcomm AI Hub" in note for note in zoo.notes())
    small = comparison_of(compared_models(ZOO, (0.8,) * 5, size=HALF))
    assert names(small.front(LATENCY)) == ["ffnet122NS_CCC_mobile", "ffnet78S_BCC_mobile"]


@pytest.mark.parametrize(
    ("changes", "w8a8"),
    (
        ({"precision": "INT8"}, True),
        ({"precision": "W4A8"}, False),
        ({"precision": "W8A16"}, False),
        ({"precision": "W8A8 mixed"}, False),
    ),
)
def test_a_latency_with_other_bit_widths_is_not_on_the_front(changes, w8a8):
    comparison = comparison_of([compare_model(small_result(size=FULL, **changes), None, None)])
    assert bool(comparison.front(LATENCY).members) == w8a8 and comparison.front(GMACS).members
    assert any("8-bit weights" in note for note in comparison.notes()) == (not w8a8)


def replicates(seed, offset):
    """A mIoU without each of 500 images, whose difference to one of another seed has a standard error of 1.4."""
    return 80 + offset + np.random.default_rng(seed).normal(0, 499**-0.5, 500)


def test_the_choice_is_the_cheapest_model_that_is_not_distinct_from_the_best():
    """Of a to d, d is the best; c and b are within the noise, a is not, and e is beaten."""
    offsets = {"a": -10.0, "b": -1.0, "c": -0.5, "d": 0.0}
    models = [
        plain_model(name, 10.0 + rank, 80 + offset, replicates=replicates(rank, offset))
        for rank, (name, offset) in enumerate(offsets.items())
    ]
    front = comparison_of([*models, plain_model("e", 12.5, 70.0)]).front(GMACS)
    assert names(front) == list("abcd") and len(front.candidates) == 5
    assert [excludes_zero(member.gain_interval) for member in front.members] == [None, True, False, False]
    assert front.best.model.short_name == "d" and front.choice.model.short_name == "b"
    low, high = front.loss(front.choice).interval
    assert front.describe(500) == (
        "By GMACs, of 5 models: d has the highest mIoU in the simulation, 80.00 % at 13.0 GMACs. The cheapest model "
        "that 500 images cannot distinguish from it is b at 11.0 GMACs, whose mIoU is 1.00 percentage points lower "
        f"(95 % CI [{low:.2f}, {high:.2f}])."
    )


def test_a_distinct_model_between_cheaper_ones_ends_the_choice():
    """a is so noisy that nothing distinguishes it, but b, which costs more, is distinct from the best."""
    noisy = plain_model("a", 1.0, 70.0, replicates=70 + 20 * replicates(0, -80.0))
    front = comparison_of([noisy, plain_model("b", 2.0, 79.0), plain_model("c", 3.0, 80.0)]).front(GMACS)
    assert front.loss(front.members[0]).interval[0] < 0
    assert front.choice.model.short_name == "c"
    assert front.describe(500).endswith(
        "The next cheaper model on the Pareto front is b at 2.0 GMACs, whose mIoU is 1.00 percentage points lower "
        "(95 % CI [1.00, 1.00])."
    )


def test_without_intervals_the_choice_is_the_best():
    models = [plain_model(name, cost, cost, replicates=np.array([cost])) for name, cost in (("a", 1.0), ("b", 2.0))]
    front = comparison_of(models).front(GMACS)
    assert front.members[1].gain.value == 1 and front.members[1].gain_interval is None
    assert front.choice is front.best and front.describe(1).endswith("1.00 percentage points lower.")


def test_a_model_that_is_best_and_cheapest_is_alone_on_the_front():
    front = comparison_of([plain_model("a", 2.0, 70.0), plain_model("b", 1.0, 80.0)]).front(GMACS)
    assert front.describe(500) == (
        "By GMACs, of 2 models: b has the highest mIoU in the simulation, 80.00 % at 1.0 GMACs, and also the fewest "
        "GMACs."
    )


def test_a_model_without_an_miou_is_on_no_front():
    unknown = plain_model("unknown", 1.0, None, ms=1.0)
    comparison = comparison_of([plain_model("a", 3.0, 70.0, ms=3.0), unknown])
    assert [names(front) for front in comparison.fronts()] == [["a"], ["a"]] and comparison.best().short_name == "a"
    first, *others = comparison.notes()
    assert first == "a note" and any(note.endswith("is unknown: unknown.") for note in others)
    assert comparison_of([unknown]).fronts() == [] and comparison_of([unknown]).best() is unknown


def test_published_mious_that_are_not_comparable_have_a_note():
    cases = (({}, True), ({FP32: 79.2}, True), ({FP32: 79.2, INT8_SIMULATED: 78.9}, False))
    for published, noted in cases:
        notes = comparison_of([plain_model(ZOO[0], 1.0, 70.0, published=published)]).notes()
        assert any(note.startswith("A published mIoU is not comparable") for note in notes) == noted
    demo = plain_model("segmentation_ffnet14T_dBBB_mobile", 1.0, 70.0)
    assert comparison_of([demo]).notes() == ["a note"]


def test_different_images_on_the_npu_have_a_note():
    models = [plain_model(name, 1.0, 70.0, npu=small_npu(images=[name])) for name in ("a", "b")]
    assert any("different images on the NPU" in note for note in comparison_of(models).notes())
    assert comparison_of(models[:1]).notes() == ["a note"]


def test_the_latency_of_the_front_is_that_of_the_fastest_runtime():
    model = plain_model("a", 1.0, 70.0, ms=7.0)
    faster = dataclasses.replace(model.published, latency={"qnn_dlc": 7.0, "onnx": 6.5})
    model = dataclasses.replace(model, published=faster)
    assert comparison_of([model]).front(LATENCY).members[0].cost == 6.5
