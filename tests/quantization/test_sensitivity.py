"""Sensitivities against AIMET's own simulation with its quantizers removed one by one."""

import pytest
import torch

from ffnet.quantization.lowering import lower
from ffnet.quantization.sensitivity import analyze_sensitivity, remove_quantizers
from tests.helpers.networks import PRE_DOWN, golden_model, random_batches
from tests.helpers.simulations import logits, simulate, small_network


@pytest.fixture(
    scope="module",
    params=["small", pytest.param(PRE_DOWN, marks=pytest.mark.slow)],
)
def sim(request):
    model = small_network() if request.param == "small" else golden_model(request.param)
    return simulate(model, random_batches(1))


@pytest.fixture(scope="module")
def found(sim):
    return analyze_sensitivity(sim, sim.model, lower(sim), random_batches(1), progress=False)


def quantizers_of(sim):
    """{(layer, role): (container, key)} of every quantizer of AIMET's simulation, in the order of the graph."""
    result = {}
    for node in sim.model.graph.nodes:
        module = sim.model.get_submodule(node.target) if node.op == "call_module" else None
        if hasattr(module, "param_quantizers"):
            for side in ("input", "param", "output"):
                quantizers = getattr(module, f"{side}_quantizers")
                for key in quantizers if side == "param" else range(len(quantizers)):
                    if quantizers[key] is not None:
                        result[node.target, key if side == "param" else side] = quantizers, key
    return result


def logits_with(sim, enabled, x):
    """Logits of AIMET's simulation in which only the quantizers in `enabled` are left; the others are put back."""
    removed = []
    for name, (container, key) in quantizers_of(sim).items():
        if name not in enabled:
            removed.append((container, key, container[key]))
            container[key] = None
    try:
        return logits(sim.model, x)
    finally:
        for container, key, quantizer in removed:
            container[key] = quantizer


def metrics(reference, quantized):
    noise = (reference - quantized).double().pow(2).sum()
    sqnr = 10 * torch.log10(reference.double().pow(2).sum() / noise).item()
    return sqnr, 100 * (reference.argmax(1) == quantized.argmax(1)).double().mean().item()


def test_every_quantizer_has_a_row_in_order_of_execution(sim, found):
    rows = sorted(found.rows, key=lambda row: row.position)
    assert [(row.layer, row.role) for row in rows] == list(quantizers_of(sim))
    assert [row.position for row in rows] == list(range(len(rows)))
    assert {(row.kind == "weight", row.bits) for row in rows} == {(True, 8), (False, 8)}
    assert all((row.kind == "weight") == (row.role == "weight") for row in rows)
    assert found.rows == sorted(found.rows, key=lambda row: row.sqnr_only_enabled)


def test_values_are_those_of_aimets_simulation(sim, found):
    names = set(quantizers_of(sim))
    x = random_batches(1)[0]
    reference = logits_with(sim, set(), x)
    assert torch.equal(logits(remove_quantizers(sim, sim.model, lower(sim)), x), reference)
    assert (found.sqnr, found.agreement) == pytest.approx(metrics(reference, logits_with(sim, names, x)), rel=1e-6)
    rows = sorted(found.rows, key=lambda row: row.position)
    for row in (*rows[:4], rows[len(rows) // 2], *rows[-3:]):
        name = (row.layer, row.role)
        only, without = (logits_with(sim, enabled, x) for enabled in ({name}, names - {name}))
        enabled, disabled = metrics(reference, only), metrics(reference, without)
        assert (row.sqnr_only_enabled, row.agreement_only_enabled) == pytest.approx(enabled, rel=1e-4)
        assert (row.sqnr_only_disabled, row.agreement_only_disabled) == pytest.approx(disabled, rel=1e-4)


def test_images_are_summed_over_batches(sim):
    (batch,) = random_batches(1)
    whole, parts = (analyze_sensitivity(sim, sim.model, lower(sim), x, False) for x in ([batch], list(batch.split(1))))
    assert whole.images == parts.images == 2
    # Convolutions round differently for other batch sizes, which moves single values to the next quantization step.
    assert whole.agreement == pytest.approx(parts.agreement, abs=0.5)
    assert whole.sqnr == pytest.approx(parts.sqnr, rel=1e-2)


@pytest.mark.slow
def test_several_inputs_and_parameters_of_a_layer_are_named():
    sim = simulate(small_network(), random_batches(1))
    classifier, addition = sim.model.classifier, sim.model.get_submodule("block.module_add")
    classifier.param_quantizers["bias"] = sim.model.block.relu.output_quantizers[0]
    addition.input_quantizers[1] = sim.model.block.conv2.output_quantizers[0]
    rows = analyze_sensitivity(sim, sim.model, lower(sim), random_batches(1), progress=False).rows
    names = {(row.layer, row.role) for row in rows}
    assert {("classifier", "weight+bias"), ("block.module_add", "input_1")} < names


@pytest.mark.slow
def test_a_bad_layer_comes_first():
    """A channel that is always zero behind its ReLU, read by huge weights: no change in FP32, coarse INT8 weights."""
    model = small_network()
    with torch.no_grad():
        model.block.bn1.weight[0], model.block.bn1.bias[0] = 0, -1
        model.block.conv2.weight[:, 0] = 400 * model.block.conv2.weight.abs().max()
    sim = simulate(model, random_batches(1), cle=False)
    worst = analyze_sensitivity(sim, sim.model, lower(sim), random_batches(1), progress=False)
    first = worst.rows[0]
    assert (first.layer, first.role) == ("block.conv2", "weight")
    assert max(worst.rows, key=worst.gain) == first and worst.gain(first) > 3

    quantizer = sim.model.classifier.output_quantizers[0]
    with torch.no_grad():
        quantizer.set_range(quantizer.get_min() * 200, quantizer.get_max() * 200)
    first = analyze_sensitivity(sim, sim.model, lower(sim), random_batches(1), progress=False).rows[0]
    assert (first.layer, first.kind) == ("classifier", "activation")


def test_neither_the_simulation_nor_the_lowered_network_changes(sim):
    lowered = lower(sim)
    x = random_batches(1)[0]
    before = logits(lowered, x), logits(sim.model, x)
    analyze_sensitivity(sim, sim.model, lowered, [x[:1]], progress=False)
    assert all(map(torch.equal, before, (logits(lowered, x), logits(sim.model, x))))
