"""The comparison of models: fronts against their definition, intervals against plain loops, cases worked by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ffnet.config import Config, QuantizationConfig
from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_ONNX_RUNTIME, INT8_SIMULATED
from ffnet.labels import CLASSES
from ffnet.model import build_model
from ffnet.options import option_values
from ffnet.results.ai_hub import ByRuntime, PublishedLatency
from ffnet.results.comparison import GMACS, LATENCY, class_rows, compare_model, pareto_front
from ffnet.results.comparison_notes import all_notes
from tests.helpers.results import (
    comparison_of,
    plain_model,
    random_scores,
    small_npu,
    small_recovery,
    small_result,
    zoo_comparison,
)

PARAMETERS = {
    variant["name"]: variant["parameters"]
    for variant in json.loads((Path(__file__).parents[1] / "data" / "variants.json").read_text())
}
ZOO_GMACS_FRONT = ["ffnet122NS_CCC_mobile_pre_down", "ffnet40S_dBBB_mobile", "ffnet54S_dBBB_mobile"]
FULL, HALF = (1024, 2048), (512, 1024)


@pytest.fixture(scope="module")
def zoo():
    """Five models with random scores on the same images."""
    return zoo_comparison()


def names(front):
    return [member.model.short_name for member in front.members]


@pytest.mark.parametrize("seed", range(50))
def test_the_pareto_front_is_what_nothing_beats(seed):
    """By brute force, on few different numbers, so that many are equal."""
    rng = np.random.default_rng(seed)
    costs, values = rng.integers(0, 6, (2, rng.integers(1, 20))).tolist()
    pairs = list(zip(costs, values, strict=True))
    unbeaten = {
        index
        for index, (cost, value) in enumerate(pairs)
        if not any(c <= cost and v >= value and (c < cost or v > value) for c, v in pairs)
    }
    front = pareto_front(costs, values)
    assert set(front) == unbeaten and len(front) == len(unbeaten)
    assert [costs[index] for index in front] == sorted(costs[index] for index in front)


def test_the_pareto_front_of_nothing_is_empty():
    assert pareto_front([], []) == []


@pytest.mark.parametrize("name", ("segmentation_ffnet40S_dBBB_mobile", "segmentation_ffnet122NS_CCC_mobile_pre_down"))
def test_parameters_are_the_published_ones_and_gmacs_those_of_all_convolutions(name):
    model = compare_model(small_result(model=name), HALF, None, "a/report.html")
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


def test_a_compared_model_keeps_the_metrics_of_its_result_and_the_published_latency():
    result = small_result(npu=small_npu())
    model = compare_model(result, FULL, "sm8850", None)
    assert (model.backends, model.npu, model.published) == (result.backends, result.npu, result.published)
    assert model.latency == PublishedLatency("Snapdragon 8 Elite Gen 5", FULL, ByRuntime(2.9, 5.2, 3.8))
    assert model.latency_ms == 2.9 and model.int8_miou == 83.75 and model.drops == {FP32: None, INT8_SIMULATED: 16.25}
    assert model.miou(INT8_ONNX_RUNTIME) is None and model.short_name == "ffnet40S_dBBB_mobile"
    assert sorted(set(model.resampled[FP32])) == [100]


def test_gains_are_those_over_the_next_cheaper_member_with_paired_intervals(zoo):
    """The interval against resamples that are drawn here, with the same seed."""
    front = zoo.front(GMACS)
    assert names(front)[:3] == ZOO_GMACS_FRONT and front.eligible == 5
    order = [list(zoo.models).index(member.model) for member in front.members]
    qualities = (0.87, 0.88, 0.885, 0.875, 0.86)
    draws = np.random.default_rng(0).multinomial(24, np.full(24, 1 / 24), 2000)
    totals = {}
    for index in order:
        matrices = random_scores(qualities[index], seed=index).confusion_matrices[INT8_SIMULATED]
        resampled = np.einsum("ri,ijk->rjk", draws, matrices)
        hits = np.einsum("rjj->rj", resampled)
        totals[index] = 100 * (hits / (resampled.sum(1) + resampled.sum(2) - hits)).mean(1)
    assert front.members[0].gain is front.members[0].gain_interval is front.members[0].distinct is None
    for cheaper, index, member in zip(order, order[1:], front.members[1:], strict=False):
        expected = zoo.models[index].int8_miou - zoo.models[cheaper].int8_miou
        assert member.gain == expected > 0
        limits = np.percentile(totals[index] - totals[cheaper], (2.5, 97.5))
        assert member.gain_interval == pytest.approx(limits, abs=1e-9)
        assert member.distinct == (limits[0] > 0)


def test_a_latency_for_images_of_another_size_is_not_on_the_front(zoo):
    """AI Hub measured pre_down models with 512x1024; they would be the fastest."""
    assert [model.latency_ms for model in zoo.models] == [4.0, 4.4, 5.0, 1.5, 1.5]
    front = zoo.front(LATENCY)
    assert names(front) == ["ffnet40S_dBBB_mobile", "ffnet54S_dBBB_mobile", "ffnet78S_dBBB_mobile"]
    assert [member.cost for member in front.members] == [4.0, 4.4, 5.0] and front.eligible == 3
    (note,) = [note for note in all_notes(zoo) if "another size" in note]
    assert "ffnet78S_BCC_mobile_pre_down, ffnet122NS_CCC_mobile_pre_down" in note and "1024x2048" in note
    small = dataclasses.replace(zoo, image_size=HALF)
    assert all(name.endswith("pre_down") for name in names(small.front(LATENCY)))
    assert any("ffnet40S_dBBB_mobile" in note for note in all_notes(small) if "another size" in note)


@pytest.mark.parametrize(
    ("changes", "w8a8"),
    (
        ({"options": option_values(Config())}, True),
        ({"options": option_values(Config(quantization=QuantizationConfig(param_bw=4)))}, False),
        ({"options": option_values(Config(quantization=QuantizationConfig(output_bw=16)))}, False),
        ({"recovery": small_recovery()}, False),
        ({"recovery": small_recovery(raised=[])}, True),
    ),
)
def test_a_latency_with_other_bit_widths_is_not_on_the_front(changes, w8a8):
    comparison = comparison_of([compare_model(small_result(**changes), FULL, None, None)])
    assert bool(comparison.front(LATENCY).members) == w8a8 and comparison.front(GMACS).members
    assert any("8-bit weights" in note for note in all_notes(comparison)) == (not w8a8)


def resamples(seed, offset):
    """Resamples whose differences to those of another seed scatter by 1.4 around the difference of the offsets."""
    return 80 + offset + np.random.default_rng(seed).normal(0, 1, 2000)


def test_the_choice_is_the_cheapest_model_that_is_not_distinct_from_the_best():
    """Of a to d, d is the best; c and b are within the noise, a is not, and e is beaten."""
    offsets = {"a": -10.0, "b": -1.0, "c": -0.5, "d": 0.0}
    models = [
        plain_model(name, 10.0 + rank, 80 + offset, resampled=resamples(rank, offset))
        for rank, (name, offset) in enumerate(offsets.items())
    ]
    front = comparison_of([*models, plain_model("e", 12.5, 70.0)]).front(GMACS)
    assert names(front) == list("abcd")
    assert [member.distinct for member in front.members] == [None, True, False, False]
    assert front.best.model.name == "d" and front.choice.model.name == "b"
    low, high = front.loss_interval(front.choice)
    assert front.describe(500) == (
        "By GMACs, of 5 models: d has the highest mIoU of INT8 simulated, 80.00 % at 13.0 GMACs. The cheapest model "
        "that 500 images cannot distinguish from it is b at 11.0 GMACs, whose mIoU is 1.00 percentage points lower "
        f"(95 % CI [{low:.2f}, {high:.2f}])."
    )
    titles = [(headline.title, headline.member.model.name) for headline in comparison_of(models).headlines()]
    assert titles == [
        ("Highest INT8 mIoU", "d"), ("Fewest GMACs without a distinguishable loss", "b"), ("Fewest GMACs", "a"),
    ]  # fmt: skip


def test_a_distinct_model_between_cheaper_ones_ends_the_choice():
    """a is so noisy that nothing distinguishes it, but b, which costs more, is distinct from the best."""
    noisy = plain_model("a", 1.0, 70.0, resampled=70 + 20 * resamples(0, -80.0))
    front = comparison_of([noisy, plain_model("b", 2.0, 79.0), plain_model("c", 3.0, 80.0)]).front(GMACS)
    assert front.loss_interval(front.members[0])[0] < 0
    assert front.choice.model.name == "c"
    assert front.describe(500).endswith(
        "The next cheaper model on the Pareto front is b at 2.0 GMACs, whose mIoU is 1.00 percentage points lower "
        "(95 % CI [1.00, 1.00])."
    )


def test_without_resamples_there_are_no_intervals_and_the_choice_is_the_best():
    models = [plain_model(name, cost, cost, resampled=np.empty(0)) for name, cost in (("a", 1.0), ("b", 2.0))]
    front = comparison_of(models).front(GMACS)
    assert front.members[1].gain == 1 and front.members[1].gain_interval is front.members[1].distinct is None
    assert front.choice is front.best and front.describe(1).endswith("1.00 percentage points lower.")


def test_a_model_that_is_best_and_cheapest_is_alone_on_the_front():
    front = comparison_of([plain_model("a", 2.0, 70.0), plain_model("b", 1.0, 80.0)]).front(GMACS)
    assert front.describe(500) == (
        "By GMACs, of 2 models: b has the highest mIoU of INT8 simulated, 80.00 % at 1.0 GMACs, and also the fewest "
        "GMACs."
    )


def test_models_without_an_miou_or_with_fewer_images_are_on_no_front():
    models = [
        plain_model("a", 3.0, 70.0, ms=3.0),
        plain_model("unknown", 1.0, None, ms=1.0),
        plain_model("partial", 2.0, 90.0, ms=2.0, images=499),
    ]
    comparison = comparison_of(models)
    assert [names(front) for front in comparison.fronts()] == [["a"], ["a"]]
    assert comparison.best().name == "a"
    notes = all_notes(comparison)
    assert notes[0] == "a note"
    assert any("unknown for: unknown." in note for note in notes)
    assert any("Not scored on all 500 images" in note and note.endswith(": partial.") for note in notes)
    nothing = comparison_of(models[1:2])
    assert nothing.fronts() == [] and nothing.headlines() == [] and nothing.best().name == "unknown"


def test_published_mious_that_are_not_comparable_have_a_note():
    name = "segmentation_ffnet40S_dBBB_mobile"
    shown = {FP32: 79.2, INT8_SIMULATED: 78.9}
    cases = (({}, True), ({FP32: 79.2}, True), (shown, False))
    for published, noted in cases:
        notes = all_notes(comparison_of([plain_model(name, 1.0, 70.0, published=published)]))
        assert any(note.startswith("A published mIoU exists but") for note in notes) == noted
    demo = plain_model("segmentation_ffnet14T_dBBB_mobile", 1.0, 70.0)
    assert all_notes(comparison_of([demo])) == ["a note"]


def test_the_latency_of_the_front_is_that_of_the_fastest_runtime(zoo):
    latency = PublishedLatency("device", FULL, ByRuntime(None, 7.0, 6.5))
    model = plain_model("a", 1.0, 70.0, latency=latency)
    assert comparison_of([model]).front(LATENCY).members[0].cost == 6.5
    (note,) = [note for note in all_notes(zoo) if note.startswith("Latency")]
    assert "Galaxy S25" in note and "fastest" in note


def test_other_backends_are_listed_with_their_images_and_drops():
    backends = small_result().backends
    backends[INT8_ONNX_RUNTIME] = backends[INT8_SIMULATED]
    models = [plain_model("a", 1.0, 70.0, backends=backends, npu=small_npu()), plain_model("b", 1.0, 70.0)]
    found = comparison_of(models).other_backends()
    assert [(s.model.name, s.backend, s.images, s.result.miou, s.drop) for s in found] == [
        ("a", INT8_ONNX_RUNTIME, 500, 83.75, 16.25), ("a", INT8_NPU, 2, 83.75, 16.25),
    ]  # fmt: skip


def test_class_rows_are_differences_to_the_best_model(zoo):
    rows = class_rows(zoo)
    assert [row.label for row in rows] == list(CLASSES)
    best = max(zoo.models, key=lambda model: model.int8_miou)
    for row in rows:
        ious = [model.backends[INT8_SIMULATED].iou[row.label] for model in zoo.models]
        assert row.ious == ious and row.highest == max(ious)
        assert row.differences == [iou - best.backends[INT8_SIMULATED].iou[row.label] for iou in ious]
        assert row.winners(zoo.models) == [zoo.models[int(np.argmax(ious))]]
        assert row.largest_difference == max(map(abs, row.differences)) > 0


def test_a_class_without_an_iou_has_no_best_model():
    models = [plain_model("a", 1.0, 70.0)]
    row = class_rows(comparison_of(models))[CLASSES.index("sky")]
    assert (row.ious, row.differences, row.highest, row.winners(models)) == ([None], [None], None, [])
