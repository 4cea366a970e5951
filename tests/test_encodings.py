"""Encodings that AIMET itself wrote, of every form, against the calibrated simulation they came from."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnet import quantize
from ffnet.encodings import LARGEST_FILE, Encoding, _range, load_encodings, read_encodings
from ffnet.errors import UserError
from ffnet.lower import lower
from ffnet.quantize import Recipe
from tests.test_quantize import DEMO, MODELS, inputs, network

pytestmark = pytest.mark.filterwarnings("ignore")  # of AIMET and torch, whose older exporters make the files
CAT = "head.layers.1.fam_4.layers.2"  # its output's quantizer is shared by the interpolations and the concatenation


@dataclass(frozen=True)
class Case:
    prepared: Any
    sim: Any  # calibrated
    folder: Path  # with the files that AIMET wrote of it
    x: Any

    def fresh(self):
        return quantize.simulate(self.prepared, Recipe())

    def content(self, name="layers.json"):
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module", params=(DEMO, pytest.param(MODELS[1], marks=pytest.mark.slow)))
def case(request, tmp_path_factory):
    return make_case(request.param, tmp_path_factory.mktemp("encodings"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_case(DEMO, tmp_path_factory.mktemp("encodings"))


def make_case(name, folder):
    prepared = quantize.equalize(network(name))
    sim = quantize.simulate(prepared, Recipe())
    quantize.calibrate(sim, inputs())
    x = inputs(3)[2]
    sim.save_encodings_to_json(str(folder), "layers")
    sim.export(str(folder), "old", dummy_input=x)  # writes old.encodings and old_torch.encodings
    for version in ("0.6.1", "1.0.0", "2.0.0"):
        export(sim, x, folder / f"tensors_{version}.onnx", version, dynamo=False)
    return Case(prepared, sim, folder, x)


def export(sim, x, path, version, dynamo):
    sim.onnx.export(
        (x,), str(path), input_names=["image"], output_names=["logits"], encoding_version=version, dynamo=dynamo
    )


def write(folder, content):
    path = folder / "written.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(case, content, partial=False):
    """(sim, Loaded) of a fresh simulation with the encodings of a file or of a file's content."""
    path = content if isinstance(content, Path) else write(case.folder, content)
    sim = case.fresh()
    return sim, load_encodings(sim, read_encodings(path), partial)


def grids(sim):
    """{name: (scales, least and largest integer times scale)} of the quantizers that have encodings."""
    return {
        name: (q.get_scale().tolist(), (q.get_offset() + q.qmin).tolist(), (q.get_offset() + q.qmax).tolist())
        for name, q in quantize.quantizers(sim)
        if q.is_initialized()
    }


def assert_same(case, sim):
    assert grids(sim) == grids(case.sim)
    with torch.no_grad():
        assert torch.equal(sim.model(case.x), case.sim.model(case.x))


FILES = ("layers.json", "old_torch.encodings", "old.encodings",
         *(f"tensors_{version}.encodings" for version in ("0.6.1", "1.0.0", "2.0.0")))  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_aimet_wrote_give_the_same_bits(case, name):
    sim, loaded = load(case, case.folder / name)
    assert (loaded.missing, loaded.surplus, loaded.untied) == ((), (), ())
    assert_same(case, sim)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*MODELS, "segmentation_ffnet18_dAAC"))
@pytest.mark.parametrize("dynamo", (True, False))
def test_names_of_both_exporters_in_other_networks(name, dynamo, tmp_path):
    prepared = quantize.equalize(network(name))
    case = Case(prepared, quantize.simulate(prepared, Recipe()), tmp_path, inputs(3)[2])
    quantize.calibrate(case.sim, inputs(1))
    export(case.sim, case.x, tmp_path / "model.onnx", "2.0.0", dynamo)
    sim, loaded = load(case, tmp_path / "model.encodings")
    assert not loaded.surplus
    assert_same(case, sim)


def names_of_aimet_1(content):
    """Of a file by layer: modules made by the preparer at the top, re-used ReLUs with their path; text for booleans."""

    def old(layer):
        parent, _, name = layer.rpartition(".")
        if not name.startswith("module_"):
            return layer
        relu = name.startswith("module_relu")
        return f"module_{parent}_{name.removeprefix('module_')}".replace(".", "_") if relu else name

    return content | {
        "activation_encodings": {old(layer): value for layer, value in content["activation_encodings"].items()}
    }


def lists_in_place_of_numbers(content):
    activations = {
        layer: {side: list(tensors.values()) for side, tensors in sides.items()}
        for layer, sides in content["activation_encodings"].items()
    }
    return content | {"activation_encodings": activations}


@pytest.mark.parametrize("change", (names_of_aimet_1, lists_in_place_of_numbers))
def test_layers_as_aimet_1_wrote_them(case, change):
    changed = change(case.content())
    assert changed != case.content()
    assert_same(case, load(case, changed)[0])


def test_the_input_is_found_where_aimet_1_named_it(case):
    content = case.content()
    layer = next(layer for layer, sides in content["activation_encodings"].items() if "input" in sides)
    if layer == "module_pad":  # which AIMET 1.22 did not make a module of
        content["activation_encodings"]["smoothing"] = content["activation_encodings"].pop(layer)
    assert_same(case, load(case, content)[0])


@pytest.mark.parametrize("names", (("t.1", "449"), ("x", "output"), ("picture", "logits"), ("image", "scores")))
def test_input_and_output_are_called_what_the_exporter_liked(demo, names):
    content = demo.content("tensors_2.0.0.encodings")
    for entry in content["encodings"]:
        entry["name"] = {"image": names[0], "logits": names[1]}.get(entry["name"], entry["name"])
    assert_same(demo, load(demo, content)[0])


def test_files_say_bit_widths_and_symmetry(demo):
    content = demo.content()
    layer = content["activation_encodings"]["backbone_model.relu"]["output"]
    layer["0"] = {"bitwidth": 16, "dtype": "int", "is_symmetric": "True", "scale": 0.001, "offset": -32768}
    quantizer = load(demo, content)[0].model.get_submodule("backbone_model.relu").output_quantizers[0]
    assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-32768, 32767, True)
    assert quantizer.get_scale().item() == torch.tensor(0.001).item() and quantizer.get_offset() == 0


def symmetric_channel(scale, offset, steps):
    ends = {"min": scale * offset, "max": scale * (offset + steps)}
    return {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "scale": scale, "offset": offset} | ends


@pytest.mark.parametrize("offsets, steps", (((-127,), 254), ((0,), 255), ((-128, 0), 255)))
def test_strict_and_unsigned_symmetry_of_aimet_1(demo, offsets, steps):
    content = demo.content()
    name, layer = "backbone_model.conv1.weight", demo.prepared.backbone_model.conv1
    offsets = [offsets[i % len(offsets)] for i in range(layer.out_channels)]
    content["param_encodings"][name] = [symmetric_channel(1e-3, offset, steps) for offset in offsets]
    loaded = load(demo, content)[0].model.get_submodule("backbone_model.conv1")
    with torch.no_grad():
        held = loaded.param_quantizers["weight"](layer.weight).as_subclass(torch.Tensor).double() / 1e-3
        low = torch.tensor(offsets)[:, None, None, None]
        expected = (layer.weight.double() / 1e-3).round().clamp(low, low + steps)
    assert (held - expected).abs().max() < 1e-3


def test_shared_quantizers_take_one_entry_or_one_each(demo):
    content = demo.content()
    activations = content["activation_encodings"]
    group = (CAT, *(f"module_interpolate_{i}" for i in (3, 4, 5)), "module_cat")
    alone = copy.deepcopy(content)
    for layer in group[:-1]:
        del alone["activation_encodings"][layer]
    assert_same(demo, load(demo, alone)[0])

    for scale, layer in enumerate(group, start=1):
        own = {"scale": scale / 1024, "min": 0.0, "max": scale / 1024 * 255}
        activations[layer]["output"]["0"] |= own
    sim, loaded = load(demo, content)
    assert loaded.untied == tuple(f"{layer}.output_quantizers.0" for layer in group)
    held = [sim.model.get_submodule(layer).output_quantizers[0].get_scale().item() for layer in group]
    assert held == [scale / 1024 for scale in range(1, 6)]
    with torch.no_grad():
        assert torch.equal(lower(sim)(demo.x), sim.model(demo.x).as_subclass(torch.Tensor))


def test_missing_and_surplus_entries_are_listed_and_refused(demo):
    content = demo.content()
    del content["param_encodings"]["backbone_model.conv0.weight"]
    content["activation_encodings"]["backbone_model.nobody"] = content["activation_encodings"]["module_cat"]
    with pytest.raises(UserError) as caught:
        load(demo, content)
    for text in ("written.json", "conv0.param_quantizers.weight", "backbone_model.nobody output 0", "--partial-enc"):
        assert text in str(caught.value)


def test_partial_files_leave_exactly_the_rest_to_calibration(demo):
    content = demo.content()
    content["param_encodings"].pop("backbone_model.conv1.weight")
    content["activation_encodings"].pop("head.layers.1.module_add_6")
    content["activation_encodings"]["nobody"] = content["activation_encodings"]["module_cat"]
    # Two of five that share a quantizer, now different from each other.
    content["activation_encodings"][CAT]["output"]["0"] |= {"scale": 0.5, "max": 127.5}
    content["activation_encodings"]["module_cat"]["output"]["0"] |= {"scale": 0.25, "max": 63.75}
    for i in (3, 4, 5):
        content["activation_encodings"].pop(f"module_interpolate_{i}")
    sim, loaded = load(demo, content, partial=True)
    blank = [name for name, quantizer in quantize.quantizers(sim) if not quantizer.is_initialized()]
    assert set(loaded.missing) == set(blank) and loaded.surplus == ("nobody output 0",)
    assert set(blank) == {
        "backbone_model.conv1.param_quantizers.weight",
        "head.layers.1.module_add_6.output_quantizers.0",
        "module_interpolate_3.output_quantizers.0",
    }
    before = grids(sim)
    quantize.calibrate(sim, inputs())
    after = grids(sim)
    assert {name: after[name] for name in before} == before and after.keys() == {*before, *blank}
    weight = "backbone_model.conv1.param_quantizers.weight"
    assert after[weight] == grids(demo.sim)[weight]


def numbered(content):
    for i, entry in enumerate(content["encodings"]):
        if not entry["name"].endswith(("weight", "bias")):
            entry["name"] = str(200 + i)


def contradict(content):
    content["encodings"].append(content["encodings"][0] | {"name": "input", "y_scale": 1.0})


def drop_a_channel(content):
    del content["param_encodings"]["backbone_model.conv0.weight"][0]


def at_relu(encoding):
    return lambda content: content["activation_encodings"]["backbone_model.relu"]["output"].update({"0": encoding})


def rename_all(content):
    content["activation_encodings"] = {}
    content["param_encodings"] = {"fc.weight": [PLAIN]}


PLAIN = {
    "bitwidth": 8,
    "dtype": "int",
    "is_symmetric": "False",
    "min": -1.0,
    "max": 1.55,
    "offset": -100,
    "scale": 0.01,
}


MISFITS = (
    ("tensors_2.0.0.encodings", numbered, "ends in _torch.encodings"),
    ("tensors_2.0.0.encodings", contradict, "'image' and 'input' .* contradict"),
    ("layers.json", drop_a_channel, "conv0.param_quantizers.weight needs 16 scales and the file has 15"),
    ("layers.json", at_relu([PLAIN] * 2), "relu.output_quantizers.0 needs 1 scales and the file has 2"),
    ("layers.json", at_relu(PLAIN | {"bitwidth": 32, "max": 42949671.95}), "at most 31"),
    ("layers.json", at_relu(PLAIN | {"scale": 1e-20, "min": -100e-20, "max": 155e-20}), "none so small"),
    ("layers.json", rename_all, "no entry fits this network, fc.weight"),
)


@pytest.mark.parametrize("name, change, message", MISFITS)
def test_entries_that_do_not_fit_are_refused_even_in_part(demo, name, change, message):
    content = demo.content(name)
    change(content)
    with pytest.raises(UserError, match=f"--encodings {re.escape(str(demo.folder / 'written.json'))}: .*{message}"):
        load(demo, content, partial=True)


@pytest.mark.parametrize("bits", (4, 8, 16))
def test_every_scale_that_aimet_derives_comes_back_exactly(bits):
    from aimet_torch.quantization.affine import QuantizeDequantize

    low, high = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(bits)).unbind()
    one, other = (QuantizeDequantize(low.shape, 0, 2**bits - 1, False) for _ in range(2))
    one.set_range(-5 * low, 3 * high + 0.01)
    scale, offset = one.get_scale().detach(), one.get_offset().detach()
    other.set_range(*_range(scale.double(), offset.double(), Encoding(one.qmin, one.qmax, (), ())))
    assert torch.equal(other.get_scale(), scale) and torch.equal(other.get_offset(), offset)


def legacy(**fields):
    entry = {key: value for key, value in (PLAIN | fields).items() if value is not None}
    return {"activation_encodings": {"relu": {"output": {"0": entry}}}, "param_encodings": {}}


def listed(**fields):
    entry = {"name": "x", "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "bw": 8, "scale": [0.1]}
    entry |= {"offset": [-3]} | fields
    return {"version": "1.0.0", "activation_encodings": [entry], "param_encodings": []}


def newest(**fields):
    return {"version": "2.0.0", "encodings": [{"name": "x", "output_dtype": "uint8", "y_scale": 0.1} | fields]}


MALFORMED = (
    ("", "is not JSON"),
    ("\xff\xfe", "is not JSON|holds"),
    ('{"encodings": [', "is not JSON"),
    ("[" * 100_000, "nested too deeply"),
    (json.dumps(legacy()).replace("0.01", "9" * 5000), "digits"),
    (json.dumps(legacy()).replace("0.01", "NaN"), "holds NaN"),
    (json.dumps(legacy()).replace("0.01", "-Infinity"), "holds -Infinity"),
    (json.dumps(legacy()).replace("0.01", "1e999"), "beyond float32"),
    ('{"encodings": [], "encodings": []}', "'encodings' twice"),
    ([], "holds no encodings"),
    ({}, "has neither"),
    ({"conv.weight": [PLAIN]}, "has neither"),
    ({"activation_encodings": {}, "param_encodings": {}}, "holds no encodings"),
    ({"activation_encodings": {}, "param_encodings": []}, "neither two objects nor two lists"),
    ({"version": "3.0.0", "encodings": []}, "version '3.0.0'"),
    ({"version": "2.0.0", "encodings": {}}, "holds no encodings"),
    ({"version": "2.0.0", "encodings": [{"y_scale": 1}]}, "without a name"),
    ({"version": "2.0.0", "encodings": newest()["encodings"] * 2}, "'x' twice"),
    ({"activation_encodings": {"a": {"output": 3}}, "param_encodings": {}}, "'a' has an 'output'"),
    ({"activation_encodings": {"a": {"output": {"x": PLAIN}}}, "param_encodings": {}}, "'a' has an 'output'"),
    ({"activation_encodings": {"a": {"output": {}, "b": 1}}, "param_encodings": {}}, "'a' is not made of"),
    ({"activation_encodings": {"a": [], "b": [PLAIN]}, "param_encodings": {}}, "'a' is neither an object"),
    ({"activation_encodings": {"a": ["b"]}, "param_encodings": {}}, "'a' is neither an object"),
    ({"activation_encodings": {}, "param_encodings": {"a": [PLAIN, PLAIN | {"bitwidth": 4}]}}, "'a' has channels"),
    (legacy(scale=None), "'relu output 0' has 'scale' 'None', which is no number"),
    (legacy(scale=0.0), "a scale of 0"),
    (legacy(scale=-0.01), "a scale of -0.01"),
    (legacy(scale=True), "no number"),
    (legacy(offset=-1.5), "'offset' -1.5, which is no whole number"),
    (legacy(offset=1, min=0.01, max=2.56), "leaves 0 outside"),
    (legacy(offset=-300, min=-3.0, max=-0.45), "leaves 0 outside"),
    (legacy(min=-2.0), "a min of -2.0, but scale and offset give -1"),
    (legacy(bitwidth=1), "bit width of 1"),
    (legacy(bitwidth=33), "bit width of 33"),
    (legacy(bitwidth=8.5), "no whole number"),
    (legacy(bitwidth=None), "'bitwidth' 'None'"),
    (legacy(dtype="float", bitwidth=16), "dtype 'float'"),
    (legacy(is_symmetric="perhaps"), "neither true nor false"),
    (listed(enc_type="PER_BLOCK"), "neither PER_TENSOR"),
    (listed(dtype="FLOAT"), "dtype 'FLOAT'"),
    (listed(scale=[0.1, 0.2]), "2 scales and 1 offsets"),
    (listed(scale=[], offset=[]), "0 scales"),
    (newest(output_dtype="float8e4m3"), "output_dtype 'float8e4m3'"),
    (newest(output_dtype="uint64"), "bit width of 64"),
    (newest(block_size=16), "in blocks"),
    (newest(y_scale={"x": [1]}), "no number"),
    (newest(y_zero_point=[1, 2]), "1 scales and 2 offsets"),
    (newest(y_zero_point=300), "leaves 0 outside"),
)


@pytest.mark.parametrize("content, message", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_files_are_refused_with_the_reason(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=f"--encodings {re.escape(str(path))}: .*{message}"):
        read_encodings(path)


def test_the_well_formed_ones_that_those_are_made_of(tmp_path):
    for content in (legacy(), listed(), newest(), legacy(min=None, max=None), legacy(offset=-100.0)):
        (entry,) = read_encodings(write(tmp_path, content)).entries.values()
        assert (entry.qmin, entry.qmax) == (0, 255)


def test_files_that_are_too_large_or_not_there_are_refused(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    for wrong in (path, tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match=f"--encodings {re.escape(str(wrong))}"):
            read_encodings(wrong)
