"""The walk through the graph against AIMET's own simulation with its quantizers taken out one by one."""

import pytest
import torch

from ffnet import quantize
from ffnet.lower import lower
from ffnet.quantize import Recipe
from ffnet.sensitivity import sensitivity, unquantized
from tests.test_quantize import DEMO, PRE_DOWN, inputs, network

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=(DEMO, pytest.param(PRE_DOWN, marks=pytest.mark.slow)))
def sim(request):
    return quantize.quantize(network(request.param), Recipe(), inputs(1))


@pytest.fixture(scope="module")
def found(sim):
    return sensitivity(sim, lower(sim), inputs(1), progress=False)


def slots(sim):
    """{(layer, place): (container, key)} of every quantizer of AIMET's simulation, in the order of the graph."""
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


def with_quantizers(sim, places, x):
    """Logits of AIMET's simulation in which only the quantizers at `places` are left; they are put back."""
    taken = []
    for place, (container, key) in slots(sim).items():
        if place not in places:
            taken.append((container, key, container[key]))
            container[key] = None
    try:
        with torch.no_grad():
            return sim.model(x).as_subclass(torch.Tensor)
    finally:
        for container, key, quantizer in taken:
            container[key] = quantizer


def figures(reference, logits):
    noise = (reference - logits).double().pow(2).sum()
    sqnr = 10 * torch.log10(reference.double().pow(2).sum() / noise).item()
    return sqnr, 100 * (reference.argmax(1) == logits.argmax(1)).double().mean().item()


def test_every_quantizer_has_a_row_in_graph_order(sim, found):
    rows = sorted(found.rows, key=lambda row: row.position)
    assert [(row.layer, row.place) for row in rows] == list(slots(sim))
    assert {(row.kind == "weight", row.bits) for row in rows} == {(True, 8), (False, 8)}
    assert all((row.kind == "weight") == (row.place == "weight") for row in rows)


def test_figures_are_those_of_aimets_simulation(sim, found):
    places = set(slots(sim))
    x = inputs(1)[0]
    reference = with_quantizers(sim, set(), x)
    with torch.no_grad():
        assert torch.equal(unquantized(sim, lower(sim))(x), reference)
    assert (found.sqnr, found.agreement) == pytest.approx(figures(reference, with_quantizers(sim, places, x)), rel=1e-6)
    rows = sorted(found.rows, key=lambda row: row.position)
    for row in (*rows[:4], rows[len(rows) // 2], *rows[-3:]):
        place = (row.layer, row.place)
        alone, without = (with_quantizers(sim, chosen, x) for chosen in ({place}, places - {place}))
        assert (row.sqnr_on, row.agreement_on) == pytest.approx(figures(reference, alone), rel=1e-4)
        assert (row.sqnr_off, row.agreement_off) == pytest.approx(figures(reference, without), rel=1e-4)


def test_rows_are_ranked_by_the_noise_that_each_makes_alone(found):
    noise = [row.sqnr_on for row in found.rows]
    assert noise == sorted(noise)


def test_a_layer_made_bad_comes_first():
    """A channel that is always zero behind its ReLU, met by huge weights: nothing in FP32, coarse weights in INT8."""
    model = network(DEMO)
    block = model.backbone_model.layer2[1]
    with torch.no_grad():
        block.bn1.weight[0], block.bn1.bias[0] = 0, -1
        block.conv2.weight[:, 0] = 400 * block.conv2.weight.abs().max()
    sim = quantize.quantize(model, Recipe(cle=False), inputs(1))
    worst = sensitivity(sim, lower(sim), inputs(1), progress=False)
    first = worst.rows[0]
    assert (first.layer, first.place) == ("backbone_model.layer2.1.conv2", "weight")
    assert max(worst.rows, key=worst.gain) == first and worst.gain(first) > 3

    quantizer = sim.model.get_submodule("head.layers.3.last_layer.2").output_quantizers[0]
    with torch.no_grad():
        quantizer.set_range(quantizer.get_min() * 200, quantizer.get_max() * 200)
    first = sensitivity(sim, lower(sim), inputs(1), progress=False).rows[0]
    assert (first.layer, first.kind) == ("head.layers.3.last_layer.2", "activation")


def test_nothing_of_the_simulation_or_the_lowered_network_changes(sim):
    lowered = lower(sim)
    x = inputs(1)[0]
    with torch.no_grad():
        before = lowered(x), sim.model(x).as_subclass(torch.Tensor)
        sensitivity(sim, lowered, [x[:1]], progress=False)
        after = lowered(x), sim.model(x).as_subclass(torch.Tensor)
    assert all(map(torch.equal, before, after))


def test_it_says_beforehand_how_long_it_will_take(sim, capsys):
    sensitivity(sim, lower(sim), [inputs(1)[0][:1, :, :32, :32]])
    out, err = capsys.readouterr()
    assert out == "" and "quantizers on 1 images: about" in err.partition("sensitivity:")[0]
