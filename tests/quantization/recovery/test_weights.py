"""AdaRound and sequential MSE against AIMET itself, and against all roundings and ranges of small layers."""

import copy
import functools
import itertools
from pathlib import Path

import aimet_torch
import pytest
import torch
from aimet_torch._base.adaround.adaround_loss import AdaroundHyperParameters, AdaroundLoss
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters, AdaroundWrapper
from aimet_torch.nn import QuantizedConv2d
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import remove_activation_quantizers
from torch import fx, nn
from torch.nn import functional

from ffnet.config import QuantizationConfig
from ffnet.model import FFNet
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize, quiet_aimet
from ffnet.quantization.recovery.weights import (
    BETA,
    REGULARIZATION,
    SUMMED_LEARNING_RATE,
    WARM_START,
    LayerSamples,
    SoftRounding,
    apply_adaround,
    apply_seq_mse,
    input_patches,
    is_followed_by_relu,
    optimize_rounding,
    rounding_loss,
)
from ffnet.quantization.sites import WEIGHT, quantizer_sites, site_parameter
from ffnet.variants import VARIANTS
from tests.helpers.networks import random_batches, three_layer_network
from tests.helpers.simulations import compute_weight_encodings, encodings, logits, small_network

KERNELS = {(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3)}  # size, stride and padding of FFNet's convolutions
PER_TENSOR = str(Path(aimet_torch.__file__).parent / "common" / "quantsim_config" / "default_config.json")
CANDIDATES = 20  # ranges that sequential MSE tries
FOUR_BITS = QuantizationConfig(param_bw=4)


def quantized_layer(shape, symmetric):
    """A convolution with a calibrated 4-bit quantizer of its weight, some of whose values are beyond the range."""
    torch.manual_seed(0)
    layer = QuantizedConv2d(3, 8, 3)
    quantizer = QuantizeDequantize(shape, *((-8, 7) if symmetric else (0, 15)), symmetric)
    with quantizer.compute_encodings():
        quantizer(layer.weight.detach() * 0.9)
    layer.param_quantizers["weight"] = quantizer
    return layer


@pytest.fixture(params=[((8, 1, 1, 1), True), ((), False)], ids=["per channel, symmetric", "per tensor, asymmetric"])
def layer(request):
    return quantized_layer(*request.param)


def plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


def test_weights_are_rounded_as_in_aimet(layer):
    ours, theirs = SoftRounding(plain(layer.weight), layer.param_quantizers["weight"]), AdaroundWrapper(layer)
    assert torch.equal(ours.alpha, theirs.alpha)
    for alpha in (ours.alpha.detach().clone(), 3 * torch.randn(ours.alpha.shape)):
        ours.alpha.data, theirs.alpha.data = alpha.clone(), alpha.clone()
        theirs.use_soft_rounding = True
        assert torch.equal(plain(ours.weight(ours.up())), plain(theirs.apply_adaround(layer.weight)))
        theirs.use_soft_rounding = False
        assert torch.equal(plain(ours.hard_weight()), plain(theirs.apply_adaround(layer.weight)))


def test_losses_and_their_gradients_are_aimets(layer):
    iterations = 1000
    ours, theirs = SoftRounding(plain(layer.weight), layer.param_quantizers["weight"]), AdaroundWrapper(layer)
    ours.alpha.data += torch.randn(ours.alpha.shape)
    theirs.alpha.data = ours.alpha.data.clone()
    inputs = torch.randn(50, 27)
    targets = functional.linear(inputs, plain(layer.weight).flatten(1))
    samples = LayerSamples(inputs, targets, None, False)
    schedule = AdaroundHyperParameters(iterations, REGULARIZATION, BETA, WARM_START)
    for iteration in (0, iterations // 5 - 1, iterations // 5, iterations // 2, iterations - 1):
        up = ours.up()
        found = samples.error(ours.weight(up)) + rounding_loss(up, iteration / iterations)
        outputs = functional.linear(inputs, theirs.apply_adaround(layer.weight).flatten(1))
        expected = AdaroundLoss.compute_recon_loss(outputs, targets)
        expected = expected + AdaroundLoss.compute_round_loss(theirs.alpha, schedule, iteration)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = [torch.autograd.grad(loss, each.alpha)[0] for loss, each in ((found, ours), (expected, theirs))]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("seed", "relu"), ((4, False), (5, False), (4, True), (9, True)), ids=str)
def test_the_roundings_of_a_small_layer_are_the_best_of_all(seed, relu):
    """8 weights of 4 bits, whose inputs have a large mean, so that rounding to nearest is far from the best."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 8, 1, 1, generator=generator)
    quantizer = QuantizeDequantize((1, 1, 1, 1), -8, 7, True)
    with quantizer.compute_encodings():
        quantizer(weight)
    inputs = torch.rand(400, 8, generator=generator) + torch.rand(400, 1, generator=generator)

    bias = torch.tensor([0.25])

    def error(values):
        outputs, targets = inputs @ values.flatten() + bias, inputs @ weight.flatten() + bias
        return ((outputs.relu() - targets.relu()) if relu else (outputs - targets)).square().mean().item()

    scale = quantizer.get_scale().item()
    lower = (weight / scale).floor()
    every = (torch.tensor(ups).reshape(weight.shape) for ups in itertools.product((0, 1), repeat=8))
    best = min(error((lower + up).clamp(-8, 7) * scale) for up in every)
    rounding = SoftRounding(weight, quantizer)
    optimize_rounding(rounding, LayerSamples(inputs, inputs @ weight.flatten(1).T + bias, bias, relu), 600)
    assert best * 0.999 <= error(rounding.hard_weight()) <= 1.05 * best
    assert error(plain(quantizer(weight))) > 2 * best


@pytest.mark.parametrize(("size", "stride", "padding"), sorted(KERNELS))
def test_patches_times_the_weight_are_torchs_convolution(size, stride, padding):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, size, stride, padding)
    values = torch.randn(1, 5, 12, 17)
    expected = layer(values)[0]
    height, width = expected.shape[1:]
    patches = input_patches(layer, values, torch.arange(height * width))
    found = functional.linear(patches, layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(found.T.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_all_variants_have_only_convolutions_of_these_kinds():
    found = set()
    for variant in VARIANTS.values():
        with torch.device("meta"):
            network = FFNet(variant)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                assert (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
                (size,), (stride,), (padding,) = map(set, (layer.kernel_size, layer.stride, layer.padding))
                found.add((size, stride, padding))
    assert len(VARIANTS) >= 66 and found == KERNELS


def test_a_relu_is_found_behind_identities_only_if_nothing_else_uses_the_output():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 1) for _ in range(5))
            self.relu, self.identity, self.pool = nn.ReLU(), nn.Identity(), nn.MaxPool2d(2)

        def forward(self, x):
            x = self.relu(self.a(x))
            x = self.relu(self.identity(self.b(x)))
            x = self.relu(self.pool(self.c(x)))
            shared = self.d(x)
            return self.e(self.relu(shared) + shared)

    model = fx.symbolic_trace(Network())
    nodes = {node.name: node for node in model.graph.nodes}
    assert [is_followed_by_relu(model, nodes[name]) for name in "abcde"] == [True, True, False, False, False]


IMAGES = [image[None] for batch in random_batches(2, (32, 64)) for image in batch]


@pytest.fixture(scope="module")
def prepared():
    return equalize(small_network())


@pytest.fixture(scope="module")
def nearest(prepared):
    """A calibrated simulation of the small network with weights of 4 bits."""
    sim = build_quantsim(prepared, FOUR_BITS)
    calibrate(sim, IMAGES)
    return sim


@pytest.fixture(scope="module")
def rounded(prepared):
    """The same simulation after AdaRound."""
    sim = build_quantsim(prepared, FOUR_BITS)
    calibrate(sim, IMAGES)
    apply_adaround(sim, prepared, IMAGES, 200, progress=False)
    return sim


def weights(sim):
    return {site.layer: site for site in quantizer_sites(sim) if site.kind == WEIGHT}


def test_every_weight_is_an_integer_next_to_the_float_weight_and_encodings_stay(prepared, nearest, rounded):
    assert encodings(rounded) == encodings(nearest)
    assert [site.name for site in quantizer_sites(rounded)] == [site.name for site in quantizer_sites(nearest)]
    sites = weights(rounded)
    assert len(sites) == 6
    changed = 0
    for layer, site in sites.items():
        weight, quantizer = plain(site_parameter(rounded, site)), site.quantizer
        assert torch.equal(plain(quantizer(weight)), weight)
        low, high = plain(quantizer.get_min()), plain(quantizer.get_max())
        original = prepared.get_submodule(layer).weight.detach()
        steps = (weight - original.clamp(low, high)).abs() / plain(quantizer.get_scale())
        assert steps.max() < 1 + 1e-4
        changed += int((steps > 0.5 + 1e-4).sum())
    assert changed > 10


def layer_outputs(network, layers):
    """{layer: its outputs on IMAGES}."""
    found = {layer: [] for layer in layers}
    hooks = [
        network.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: found[layer].append(plain(output))
        )
        for layer in layers
    ]
    for image in IMAGES:
        logits(network, image)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(outputs) for layer, outputs in found.items()}


def layer_errors(sim, float_network, with_relu=()):
    """{layer: squared error of its outputs, if no activation is quantized}."""
    layers = list(weights(sim))
    expected = layer_outputs(float_network, layers)
    with remove_activation_quantizers(list(sim.model.modules())):
        found = layer_outputs(sim.model, layers)
    for outputs in (found, expected):
        outputs |= {layer: outputs[layer].relu() for layer in with_relu}
    return {layer: (found[layer] - expected[layer]).square().mean().item() for layer in layers}


def test_every_layer_has_a_smaller_error_than_with_weights_rounded_to_nearest(prepared, nearest, rounded):
    relus = ["stem.layers.0", "block.conv1", "adapter.layers.0"]
    before, after = (layer_errors(sim, prepared, relus) for sim in (nearest, rounded))
    assert set(relus) < set(before)
    ratios = {layer: after[layer] / before[layer] for layer in before}
    assert ratios.pop("stem.layers.0") < 1.01  # its input is noise without a mean: rounding to nearest is best
    assert max(ratios.values()) < 0.7


def test_a_second_run_gives_the_same_weights():
    prepared, states = equalize(three_layer_network()), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sim = build_quantsim(prepared, FOUR_BITS)
        compute_weight_encodings(sim)
        apply_adaround(sim, prepared, IMAGES[:1], 20, progress=False)
        states.append([site_parameter(sim, site) for site in weights(sim).values()])
    assert all(map(torch.equal, *states))


def test_calibrating_the_activations_afterwards_keeps_weights_and_their_encodings(prepared):
    sim = build_quantsim(prepared, QuantizationConfig(param_bw=4, config_file=PER_TENSOR))
    for site in weights(sim).values():
        site.quantizer.symmetric = False
    compute_weight_encodings(sim)
    before = encodings(sim)
    apply_adaround(sim, prepared, IMAGES[:1], 20, progress=False)
    calibrate(sim, IMAGES)
    after = encodings(sim)
    assert before and len(after) > len(before) and {name: after[name] for name in before} == before
    for site in weights(sim).values():
        weight = site_parameter(sim, site)
        assert torch.equal(plain(site.quantizer(weight)), plain(weight))


@pytest.mark.slow
def test_the_error_is_about_that_of_aimets_adaround(tmp_path, monkeypatch):
    """AIMET takes all positions in each iteration, and its learning rate is made for 15,000 iterations."""
    prepared = equalize(three_layer_network())
    with quiet_aimet(), monkeypatch.context() as patches:
        patches.setattr(torch.optim, "Adam", functools.partial(torch.optim.Adam, lr=SUMMED_LEARNING_RATE / 300))
        parameters = AdaroundParameters(IMAGES, len(IMAGES), 300)
        theirs = Adaround.apply_adaround(copy.deepcopy(prepared), IMAGES[0], parameters, str(tmp_path), "x", 4)
    expected, found = (layer_outputs(network, ["4"])["4"] for network in (prepared, theirs))
    aimets = (found - expected).square().mean().item()
    sim = build_quantsim(prepared, FOUR_BITS)
    compute_weight_encodings(sim)
    nearest = layer_errors(sim, prepared)["4"]
    apply_adaround(sim, prepared, IMAGES, 300, progress=False)
    assert layer_errors(sim, prepared)["4"] < 1.05 * aimets < 0.7 * nearest


def test_every_channel_has_the_best_of_20_candidates():
    """Of weights with heavy tails, min-max ranges include the largest and the best ranges do not."""
    model = three_layer_network()
    model[0] = nn.Conv2d(3, 8, 7, 2, padding=3)
    with torch.no_grad():
        model[0].weight.exponential_().mul_(torch.randn(8, 3, 7, 7).sign())
    prepared = equalize(model)
    plain, sim = (
        build_quantsim(prepared, QuantizationConfig(param_bw=4, quant_scheme="tf")),
        build_quantsim(prepared, QuantizationConfig(param_bw=4, quant_scheme="tf")),
    )
    compute_weight_encodings(plain)
    apply_seq_mse(sim, prepared, IMAGES, progress=False)
    calibrate(sim, IMAGES)  # keeps the ranges
    layer = prepared.get_submodule("0")
    widest = plain.model.get_submodule("0").param_quantizers["weight"].get_scale().detach()
    images, errors = torch.cat(IMAGES), []
    with torch.no_grad():
        for share in range(1, CANDIDATES + 1):
            scale = widest * share / CANDIDATES
            weight = (layer.weight / scale).round().clamp(-8, 7) * scale
            outputs = functional.conv2d(images, weight, layer.bias, layer.stride, layer.padding)
            errors.append((outputs - layer(images)).square().mean((0, 2, 3)))
    best = torch.stack(errors).argmin(0) + 1
    found = sim.model.get_submodule("0").param_quantizers["weight"].get_scale().detach()
    assert 1 < best.min() < best.max()
    torch.testing.assert_close(found, widest * best[:, None, None, None] / CANDIDATES, rtol=1e-5, atol=0)
