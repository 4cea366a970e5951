"""Rounded weights that are read back from an export, against the simulation that was exported."""

import contextlib
import copy
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from ffnet.config import ENCODINGS_FILE, FLOAT_MODEL_FILE, MANIFEST_FILE, ROUNDED_LAYERS, QuantizationConfig
from ffnet.onnx.export import export
from ffnet.quantization.encodings import load_encodings, rounded_layers
from ffnet.quantization.encodings_file import read_encodings
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.quantization.recovery.weights import apply_adaround
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.system.errors import UserError
from tests.helpers.networks import random_batches, three_layer_network
from tests.helpers.simulations import compute_weight_encodings, encodings, logits

SIZE = (32, 64)
IMAGES = [image[None] for batch in random_batches(2, SIZE) for image in batch]
LAYERS = ("0", "2", "4")


@dataclass(frozen=True)
class Rounded:
    prepared: Any
    sim: Any  # after AdaRound
    folder: Path  # with its export

    def load(self, folder=None, prepared=None):
        """(sim, LoadedEncodings) of a new simulation with the encodings in a folder."""
        sim = build_quantsim(prepared or self.prepared, QuantizationConfig(param_bw=8))
        file = read_encodings((folder or self.folder) / ENCODINGS_FILE)
        return sim, load_encodings(sim, file)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    model = three_layer_network()
    with torch.no_grad():  # a channel whose scale is raised for its bias after AdaRound
        model[2].weight[3], model[2].bias[3] = 1e-12, 40
    prepared = equalize(model, cle=False)
    sim = build_quantsim(prepared, QuantizationConfig(param_bw=4))
    compute_weight_encodings(sim)
    apply_adaround(sim, prepared, IMAGES, 100, progress=False)
    calibrate(sim, IMAGES)
    assert raise_weight_scales(sim) == {"2": 1}
    folder = tmp_path_factory.mktemp("rounded") / "export"
    export(sim, SIZE, folder, {ROUNDED_LAYERS: rounded_layers(sim, prepared)})
    return Rounded(prepared, sim, folder)


@pytest.fixture
def copied(rounded, tmp_path):
    """A copy of the export, to be changed."""
    return Path(shutil.copytree(rounded.folder, tmp_path / "copy"))


def edit_manifest(folder, change):
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.slow
def test_the_layers_whose_weights_changed_are_named(rounded):
    assert json.loads((rounded.folder / MANIFEST_FILE).read_text())[ROUNDED_LAYERS] == list(LAYERS)
    sim = build_quantsim(rounded.prepared, QuantizationConfig())
    assert rounded_layers(sim, rounded.prepared) == []
    with torch.no_grad():
        sim.model.get_submodule("2").weight[0, 0, 0, 0] += 1e-3
    assert rounded_layers(sim, rounded.prepared) == ["2"]


@pytest.mark.slow
def test_the_weights_of_an_export_are_loaded_with_its_encodings(rounded):
    sim, loaded = rounded.load()
    assert loaded.rounded == LAYERS and not loaded.missing and not loaded.unexpected
    assert encodings(sim) == encodings(rounded.sim)
    for layer in LAYERS:
        weights = [each.model.get_submodule(layer).weight for each in (sim, rounded.sim)]
        assert torch.equal(*weights) and not torch.equal(weights[0], rounded.prepared.get_submodule(layer).weight)
    lowered, expected = lower(sim), lower(rounded.sim)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in lowered.state_dict().items())
    for image in IMAGES:
        assert torch.equal(logits(lowered, image), logits(expected, image))
        assert torch.equal(logits(sim.model, image), logits(rounded.sim.model, image))


def test_only_the_layers_that_the_manifest_names_are_loaded(rounded, copied):
    edit_manifest(copied, lambda manifest: manifest.update({ROUNDED_LAYERS: ["2"]}))
    sim, loaded = rounded.load(copied)
    assert loaded.rounded == ("2",)
    for layer, source in (("0", rounded.prepared), ("2", rounded.sim.model), ("4", rounded.prepared)):
        assert torch.equal(sim.model.get_submodule(layer).weight, source.get_submodule(layer).weight)


def without_manifest(folder):
    (folder / MANIFEST_FILE).unlink()


def other_encodings(folder):
    """As after another tool changed them: the manifest does not describe the file."""
    path = folder / ENCODINGS_FILE
    path.write_text(path.read_text() + "\n")


def manifest_text(text):
    return lambda folder: (folder / MANIFEST_FILE).write_bytes(text)


def manifest_entry(key, value):
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.update({key: value}))


IGNORED = (
    without_manifest,
    other_encodings,
    *map(manifest_text, (b"[]", b"{}", b'{"files": []}')),
    manifest_entry("files", {ENCODINGS_FILE: None}),
    manifest_entry(ROUNDED_LAYERS, None),
)


@pytest.mark.parametrize("change", IGNORED)
def test_without_a_manifest_of_this_file_the_float_weights_stay(rounded, copied, change):
    change(copied)
    sim, loaded = rounded.load(copied)
    assert loaded.rounded == () and encodings(sim) == encodings(rounded.sim)
    assert torch.equal(sim.model.get_submodule("2").weight, rounded.prepared.get_submodule("2").weight)


def rehash(folder):
    """Let the manifest describe a float network that was changed."""
    digest = hashlib.sha256((folder / FLOAT_MODEL_FILE).read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: manifest["files"][FLOAT_MODEL_FILE].update(sha256=digest))


def without_float_network(folder):
    (folder / FLOAT_MODEL_FILE).unlink()


def changed_float_network(folder):
    with (folder / FLOAT_MODEL_FILE).open("ab") as file:
        file.write(b"\0")


def no_onnx_file(folder):
    (folder / FLOAT_MODEL_FILE).write_bytes(b"no ONNX")
    rehash(folder)


@pytest.mark.parametrize("change", (without_float_network, changed_float_network, no_onnx_file))
def test_a_missing_or_changed_float_network_is_an_error(rounded, copied, change):
    change(copied)
    path = copied / ENCODINGS_FILE
    with pytest.raises(UserError, match=f"--encodings {path}: AdaRound rounded .*{FLOAT_MODEL_FILE}, .*Keep the files"):
        rounded.load(copied)


@pytest.mark.parametrize("content", (b"\xff\xfe", b"{", b"[" * 10**5))
def test_a_damaged_manifest_is_an_error(rounded, copied, content):
    manifest_text(content)(copied)
    with pytest.raises(UserError, match=f"{MANIFEST_FILE}, which says .*, is damaged .* Restore it or"):
        rounded.load(copied)


@pytest.mark.parametrize("layers", (7, True, {"2": 1}, [["2"]], ["2", None], ["unknown"], ["relu"]))
def test_a_manifest_that_lists_no_layers_of_the_network_is_an_error(rounded, copied, layers):
    edit_manifest(copied, lambda manifest: manifest.update({ROUNDED_LAYERS: layers}))
    with pytest.raises(UserError, match=f"--encodings {copied / ENCODINGS_FILE}: "):
        rounded.load(copied)


@pytest.mark.parametrize(
    "change",
    (
        lambda tensor: setattr(tensor, "name", "other"),
        lambda tensor: setattr(tensor, "raw_data", tensor.raw_data[:-3]),
        lambda tensor: setattr(tensor, "raw_data", b"\xff" * len(tensor.raw_data)),  # NaN
        lambda tensor: setattr(tensor, "data_type", onnx.TensorProto.INT32),
    ),
)
def test_a_float_network_with_a_damaged_weight_is_an_error(rounded, copied, change):
    network = onnx.load(copied / FLOAT_MODEL_FILE)
    (tensor,) = (tensor for tensor in network.graph.initializer if tensor.name == "2.weight")
    change(tensor)
    (copied / FLOAT_MODEL_FILE).write_bytes(network.SerializeToString())
    rehash(copied)
    with pytest.raises(UserError, match=f"--encodings {copied / ENCODINGS_FILE}: "):
        rounded.load(copied)


def other_kernel():
    model = three_layer_network()
    model[0] = nn.Conv2d(3, 8, 5, 2, padding=2)
    return model


@pytest.mark.parametrize("network", (lambda: three_layer_network(seed=1), other_kernel))
def test_weights_of_another_network_are_an_error(rounded, network):
    error = f"rounded weights of 0 in {FLOAT_MODEL_FILE} are not those of this network. Give the checkpoint"
    with pytest.raises(UserError, match=error):
        rounded.load(prepared=equalize(network(), cle=False))


@pytest.mark.parametrize(("steps", "accepted"), ((0.99, True), (1.01, False)))
def test_each_weight_may_be_one_step_from_the_networks(rounded, steps, accepted):
    layer, prepared = rounded.sim.model.get_submodule("4"), copy.deepcopy(rounded.prepared)
    value, step = layer.weight[0, 0].item(), layer.param_quantizers["weight"].get_scale()[0].item()
    with torch.no_grad():  # towards 0, so that it stays in the range
        prepared.get_submodule("4").weight[0, 0] = value - math.copysign(steps * step, value)
    with contextlib.nullcontext() if accepted else pytest.raises(UserError, match="rounded weights of 4 in"):
        assert rounded.load(prepared=prepared)[1].rounded == LAYERS


def test_weights_beyond_the_range_may_be_farther_away(rounded):
    layer, prepared = rounded.sim.model.get_submodule("4"), copy.deepcopy(rounded.prepared)
    integers = (layer.weight / layer.param_quantizers["weight"].get_scale()).round()
    row, column = (integers == -8).nonzero()[0, :2].tolist()
    with torch.no_grad():
        prepared.get_submodule("4").weight[row, column] = -100
    assert rounded.load(prepared=prepared)[1].rounded == LAYERS
