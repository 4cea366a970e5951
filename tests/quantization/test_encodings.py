"""Encodings that AIMET itself wrote, in every format, against the calibrated simulation they came from."""

import copy
import re

import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize

from ffnet.config import QuantizationConfig
from ffnet.quantization.encodings import exact_range
from ffnet.quantization.encodings_file import Encoding
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.system.errors import UserError
from tests.helpers.encodings_files import FILES, PLAIN, Case, export, make_case
from tests.helpers.networks import DEMO, PRE_DOWN, golden_model, random_batches
from tests.helpers.simulations import encodings, logits, small_network

pytestmark = pytest.mark.filterwarnings("ignore")  # of AIMET and torch, whose older exporters make the files
SHARED = ("adapter.layers.2", "module_interpolate", "module_cat")  # layers whose outputs share a quantizer


@pytest.fixture(
    scope="module",
    params=["small", pytest.param(PRE_DOWN, marks=pytest.mark.slow)],
)
def case(request, tmp_path_factory):
    if request.param == "small":
        return request.getfixturevalue("small_case")
    return make_case(golden_model(request.param), tmp_path_factory.mktemp("encodings"))


@pytest.mark.parametrize("name", FILES)
def test_files_that_aimet_wrote_give_the_same_bits(case, name):
    sim, loaded = case.load(case.folder / name)
    assert (loaded.missing, loaded.unexpected, loaded.separated) == ((), (), ())
    case.assert_same(sim)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamo"), ((DEMO, True), (PRE_DOWN, True), ("segmentation_ffnet18_dAAC", False)))
def test_names_of_both_exporters_in_other_networks_are_matched(name, dynamo, tmp_path):
    prepared = equalize(golden_model(name))
    case = Case(prepared, build_quantsim(prepared, QuantizationConfig()), tmp_path, random_batches(3)[2])
    calibrate(case.sim, random_batches(1))
    export(case.sim, case.x, tmp_path / "model.onnx", "2.0.0", dynamo)
    sim, loaded = case.load(tmp_path / "model.encodings")
    assert not loaded.unexpected
    case.assert_same(sim)


def names_of_aimet_1(content):
    """Names of AIMET 1.x in a file by layer: modules that the preparer made at the top, re-used ReLUs by their path."""

    def old(layer):
        parent, _, name = layer.rpartition(".")
        if not name.startswith("module_"):
            return layer
        relu = name.startswith("module_relu")
        return f"module_{parent}_{name.removeprefix('module_')}".replace(".", "_") if relu else name

    return content | {
        "activation_encodings": {old(layer): value for layer, value in content["activation_encodings"].items()}
    }


def lists_instead_of_numbers(content):
    activations = {
        layer: {side: list(tensors.values()) for side, tensors in sides.items()}
        for layer, sides in content["activation_encodings"].items()
    }
    return content | {"activation_encodings": activations}


class Wrapper(torch.nn.Module):
    """Holds a network under one name in another."""

    def __init__(self, names, network):
        super().__init__()
        first, *rest = names
        self.name = first
        self.add_module(first, Wrapper(rest, network) if rest else network)

    def forward(self, x):
        return getattr(self, self.name)(x)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """The Case with all files that AIMET writes of the small network in wrappers."""
    return make_case(Wrapper(("module", "net"), small_network()).eval(), tmp_path_factory.mktemp("wrapped"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_files_that_aimet_wrote_of_a_wrapped_network_give_the_same_bits_without_its_prefix(small_case, wrapped, name):
    sim, loaded = small_case.load(wrapped.folder / name)
    assert (loaded.missing, loaded.unexpected, loaded.separated, loaded.prefix) == ((), (), (), "module.net.")
    small_case.assert_same(sim)


def test_layers_as_aimet_1_wrote_them_of_a_wrapped_network_are_read(small_case, wrapped):
    sim, loaded = small_case.load(names_of_aimet_1(wrapped.content()))
    assert loaded.prefix == "module.net."
    small_case.assert_same(sim)


def test_names_of_which_some_have_a_prefix_are_left_as_they_are(small_case):
    content = small_case.content()
    params = content["param_encodings"]
    params["module.stem.layers.0.weight"] = params.pop("stem.layers.0.weight")
    loaded = small_case.load(content, partial=True)[1]
    assert loaded.unexpected == ("module.stem.layers.0.weight",) and loaded.prefix == ""


@pytest.mark.parametrize("change", (names_of_aimet_1, lists_instead_of_numbers))
def test_layers_as_aimet_1_wrote_them_are_read(case, change):
    changed = change(case.content())
    assert changed != case.content()
    case.assert_same(case.load(changed)[0])


def test_the_input_is_found_at_the_layer_where_aimet_1_put_it(case):
    content = case.content()
    layer = next(layer for layer, sides in content["activation_encodings"].items() if "input" in sides)
    if layer == "module_pad":  # which AIMET 1.22 did not make a module of
        content["activation_encodings"]["smoothing"] = content["activation_encodings"].pop(layer)
    case.assert_same(case.load(content)[0])


def test_bit_width_and_symmetry_are_those_of_the_file(three_layer_case):
    content = three_layer_case.content()
    output = content["activation_encodings"]["1"]["output"]
    output["0"] = {"bitwidth": 16, "dtype": "int", "is_symmetric": "True", "scale": 0.001, "offset": -32768}
    quantizer = three_layer_case.load(content)[0].model.get_submodule("1").output_quantizers[0]
    assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-32768, 32767, True)
    assert quantizer.get_scale().item() == torch.tensor(0.001).item() and quantizer.get_offset() == 0


def symmetric_channel(scale, offset, steps):
    ends = {"min": scale * offset, "max": scale * (offset + steps)}
    return {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "scale": scale, "offset": offset} | ends


@pytest.mark.parametrize("offsets, steps", (((-127,), 254), ((0,), 255), ((-128, 0), 255)))
def test_strict_and_unsigned_symmetry_of_aimet_1_are_simulated(three_layer_case, offsets, steps):
    content = three_layer_case.content()
    layer = three_layer_case.prepared.get_submodule("2")
    offsets = [offsets[i % len(offsets)] for i in range(layer.out_channels)]
    content["param_encodings"]["2.weight"] = [symmetric_channel(1e-3, offset, steps) for offset in offsets]
    loaded = three_layer_case.load(content)[0].model.get_submodule("2")
    held = logits(loaded.param_quantizers["weight"], layer.weight).double() / 1e-3
    low = torch.tensor(offsets)[:, None, None, None]
    expected = (layer.weight.detach().double() / 1e-3).round().clamp(low, low + steps)
    assert (held - expected).abs().max() < 1e-3


def test_shared_quantizers_take_one_entry_or_one_each(small_case):
    content = small_case.content()
    activations = content["activation_encodings"]
    one = copy.deepcopy(content)
    for layer in SHARED[:-1]:
        del one["activation_encodings"][layer]
    small_case.assert_same(small_case.load(one)[0])

    for scale, layer in enumerate(SHARED, start=1):
        own = {"scale": scale / 1024, "min": 0.0, "max": scale / 1024 * 255}
        activations[layer]["output"]["0"] |= own
    sim, loaded = small_case.load(content)
    assert loaded.separated == tuple(f"{layer}.output_quantizers.0" for layer in SHARED)
    held = [sim.model.get_submodule(layer).output_quantizers[0].get_scale().item() for layer in SHARED]
    assert held == [scale / 1024 for scale in range(1, 4)]
    assert torch.equal(logits(lower(sim), small_case.x), logits(sim.model, small_case.x))


def test_missing_and_unexpected_entries_are_listed_in_the_error(three_layer_case):
    content = three_layer_case.content()
    del content["param_encodings"]["0.weight"]
    content["activation_encodings"]["nobody"] = content["activation_encodings"]["1"]
    with pytest.raises(UserError) as caught:
        three_layer_case.load(content)
    for text in ("written.json", "no entry for 1 quantizer (0.param_quantizers.weight)",
                 "and 1 unexpected name (nobody output 0). ", "--partial-encodings"):  # fmt: skip
        assert text in str(caught.value)


def test_partial_files_leave_exactly_the_rest_to_calibration(small_case):
    content = small_case.content()
    activations = content["activation_encodings"]
    content["param_encodings"].pop("block.conv1.weight")
    activations.pop("block.conv2")
    activations["nobody"] = activations["module_cat"]
    # Two of three that share a quantizer, now different from each other.
    activations["adapter.layers.2"]["output"]["0"] |= {"scale": 0.5, "max": 127.5}
    activations["module_cat"]["output"]["0"] |= {"scale": 0.25, "max": 63.75}
    activations.pop("module_interpolate")
    sim, loaded = small_case.load(content, partial=True)
    blank = [name for name, quantizer in sim.named_quantizers() if not quantizer.is_initialized()]
    assert set(loaded.missing) == set(blank) and loaded.unexpected == ("nobody output 0",)
    assert set(blank) == {
        "block.conv1.param_quantizers.weight",
        "block.conv2.output_quantizers.0",
        "module_interpolate.output_quantizers.0",
    }
    before = encodings(sim)
    calibrate(sim, random_batches())
    after = encodings(sim)
    assert {name: after[name] for name in before} == before and after.keys() == {*before, *blank}
    weight = "block.conv1.param_quantizers.weight"
    assert after[weight] == encodings(small_case.sim)[weight]


@pytest.mark.parametrize("form", (lambda weights: {"param_encodings": weights}, dict), ids=("2.x", "before 1.32"))
def test_weights_alone_as_adaround_writes_them_are_loaded_as_aimet_does(three_layer_case, form):
    content = form(three_layer_case.content()["param_encodings"])
    with pytest.raises(UserError, match="no entry for 4 quantizers .* or add --partial-encodings to calibrate"):
        three_layer_case.load(content)
    sim, loaded = three_layer_case.load(content, partial=True)
    reference = build_quantsim(three_layer_case.prepared, QuantizationConfig())
    reference.load_encodings(content)
    assert encodings(sim).keys() == encodings(reference).keys() and len(loaded.missing) == 4
    calibrate(sim, random_batches())
    three_layer_case.assert_same(sim)


def drop_a_channel(content):
    del content["param_encodings"]["0.weight"][0]


def at_relu(encoding):
    return lambda content: content["activation_encodings"]["1"]["output"].update({"0": encoding})


def rename_all(content):
    content["activation_encodings"] = {}
    content["param_encodings"] = {"fc.weight": [PLAIN]}


UNSUITABLE = (
    (drop_a_channel, "0.param_quantizers.weight needs 8 scales, but the file has 7"),
    (at_relu([PLAIN] * 2), "1.output_quantizers.0 needs 1 scale, but the file has 2"),
    (at_relu(PLAIN | {"bitwidth": 32, "max": 42949671.95}), "at most 31"),
    (at_relu(PLAIN | {"scale": 1e-20, "min": -100e-20, "max": 155e-20}), "a scale of 1e-20"),
    (rename_all, "no entry matches this network; the entries are fc.weight"),
)


@pytest.mark.parametrize("change, message", UNSUITABLE)
def test_entries_that_do_not_suit_their_quantizers_are_errors_even_in_partial_files(three_layer_case, change, message):
    content = three_layer_case.content()
    change(content)
    path = re.escape(str(three_layer_case.folder / "written.json"))
    with pytest.raises(UserError, match=f"--encodings {path}: .*{message}"):
        three_layer_case.load(content, partial=True)


@pytest.mark.parametrize("bits", (4, 8, 16))
def test_every_scale_that_aimet_derives_is_reproduced_exactly(bits):
    low, high = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(bits)).unbind()
    one, other = (QuantizeDequantize(low.shape, 0, 2**bits - 1, False) for _ in range(2))
    one.set_range(-5 * low, 3 * high + 0.01)
    scale, offset = one.get_scale().detach(), one.get_offset().detach()
    other.set_range(*exact_range(scale.double(), offset.double(), Encoding(one.qmin, one.qmax, (), ())))
    assert torch.equal(other.get_scale(), scale) and torch.equal(other.get_offset(), offset)
