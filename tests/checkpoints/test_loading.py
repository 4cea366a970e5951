"""Every published form gives its exact tensors, and what does not match the model is refused with a reason."""

import hashlib
import math
import os
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffnet.checkpoints import matching
from ffnet.checkpoints.__main__ import main
from ffnet.checkpoints.loading import InvalidCheckpointError, find_in_folder, load_checkpoint, read_checkpoint
from ffnet.model import build_model, remove_batch_norms
from ffnet.variants import VARIANTS
from tests.helpers import checkpoint_forms as forms
from tests.helpers.networks import DEMO
from tests.helpers.networks import PRE_DOWN as DEMO_PRE_DOWN

PICKLED = Path(__file__).parents[1] / "data" / "pickled"
ZOO = [name for name, variant in VARIANTS.items() if variant.published.int8]
MODELS = [DEMO_PRE_DOWN, *(pytest.param(name, marks=pytest.mark.slow) for name in (ZOO[2], ZOO[4]))]
SHARED = ["segmentation_ffnet86S_dBBB_mobile", "segmentation_ffnet86S_dBBB"]  # the same tensors
FEW = [DEMO, DEMO_PRE_DOWN, *SHARED]
REAL = [("tiny", "tiny"), ("tiny_cuda", "tiny"), ("tiny_unprepared", "tiny"), ("odd", "odd")]


def save(obj, path, **options):
    torch.save(obj, path, **options)
    return path


def save_prepared(model, path, change=None):
    """A prepared file of `model`; `change` may alter the traced network first."""
    traced = forms.prepared(model)
    if change:
        change(traced)
    forms.save_pickled(traced, path)
    return path


def refusal(variant, path):
    with pytest.raises(InvalidCheckpointError) as caught:
        load_checkpoint(variant, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.fixture(autouse=True)
def few_variants(monkeypatch):
    """A file can match only a few variants, because building all takes seconds."""
    monkeypatch.setattr(matching, "VARIANTS", {name: VARIANTS[name] for name in FEW})


@pytest.fixture
def demo():
    return forms.randomize(build_model(DEMO))


@pytest.fixture
def demo_pre_down():
    return forms.randomize(build_model(DEMO_PRE_DOWN))


@pytest.mark.parametrize(("name", "expected"), REAL)
def test_modules_that_torch_1_9_pickled_give_their_exact_tensors(name, expected):
    expected = torch.load(PICKLED / f"{expected}_expected.pt", weights_only=True)
    assert forms.same(read_checkpoint(PICKLED / f"{name}.pth")[0].state_dict, expected)


def test_tensors_that_shared_storage_are_independent():
    state = read_checkpoint(PICKLED / "odd.pth")[0].state_dict
    before = state["tied.weight"].clone()
    state["lin.weight"].zero_()
    assert torch.equal(state["tied.weight"], before)


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_prepared_and_equalized_files_of_zoo_models_load_exactly(name, equalized, tmp_path):
    model = build_model(name)
    model = forms.randomize(remove_batch_norms(model) if equalized else model)
    loaded = load_checkpoint(name, save_prepared(model, tmp_path / "x"))
    assert (loaded.form, loaded.equalized) == ("equalized" if equalized else "prepared", equalized)
    assert loaded.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert forms.same(loaded.model.state_dict(), model.state_dict()) and not loaded.model.training
    assert torch.equal(forms.logits(loaded.model), forms.logits(model))


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("name", [DEMO, DEMO_PRE_DOWN])
def test_the_number_of_classes_is_that_of_the_files_head(name, equalized, tmp_path, capsys):
    model = build_model(name, classes=7)
    model = forms.randomize(remove_batch_norms(model) if equalized else model)
    path = save_prepared(model, tmp_path / "x.pth")
    loaded = load_checkpoint(name, path)
    assert loaded.classes == 7 and forms.same(loaded.model.state_dict(), model.state_dict())
    assert torch.equal(forms.logits(loaded.model), forms.logits(model)) and forms.logits(model).shape[1] == 7
    assert find_in_folder(tmp_path, [name]) == ({name: path}, [])
    assert main([str(path)]) == 0 and "\npredicts 7 classes\n" in capsys.readouterr().out


def test_a_head_that_contradicts_itself_is_refused(demo, tmp_path):
    state, key = demo.state_dict(), "head.layers.3.last_layer.3.weight"
    message = refusal(DEMO, save(state | {key: state[key][:7]}, tmp_path / "x"))
    assert "Other shapes: head.layers.3.last_layer.3.bias [19] instead of [7]. Name another" in message


def test_network_with_folded_batch_norms_computes_what_the_original_does(demo, tmp_path):
    loaded = load_checkpoint(DEMO, save(forms.folded(demo), tmp_path / "x"))
    expected = forms.logits(demo)
    assert (loaded.form, loaded.equalized) == ("state_dict", True)
    assert (forms.logits(loaded.model) - expected).abs().max() < 1e-3 * expected.std()


def test_release_zip_is_read_without_unpacking_it(tmp_path):
    variant = replace(VARIANTS[DEMO], release_file="ffnet14T/weights.pth")
    model = forms.randomize(build_model(DEMO))
    member = save(model.state_dict(), tmp_path / "member")
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ffnet14T/other.pth", b"never looked at")
        archive.write(member, variant.release_file)
    loaded = load_checkpoint(variant, tmp_path / "x")
    assert loaded.form == "release" and forms.same(loaded.model.state_dict(), model.state_dict())
    assert loaded.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert "holds no ffnet46N/" in refusal("segmentation_ffnet46N_CBB", tmp_path / "x")
    with pytest.raises(InvalidCheckpointError, match="several checkpoints"):
        read_checkpoint(tmp_path / "x")


def test_only_a_sibling_without_pre_down_ignores_the_smoothing_kernel(demo_pre_down, monkeypatch, tmp_path):
    sibling = replace(VARIANTS[DEMO_PRE_DOWN], name=DEMO, pre_down=False)
    monkeypatch.setattr(matching, "VARIANTS", {DEMO_PRE_DOWN: VARIANTS[DEMO_PRE_DOWN], DEMO: sibling})
    path = save_prepared(demo_pre_down, tmp_path / "x")
    assert "smoothing.weight" not in load_checkpoint(sibling, path).model.state_dict()

    save(demo_pre_down.state_dict() | {"smoothing.bias": torch.zeros(3)}, path)
    assert "Unexpected keys: smoothing.bias." in refusal(sibling, path)
    save({k: t for k, t in demo_pre_down.state_dict().items() if k != "smoothing.weight"}, path)
    assert f"it matches {DEMO}. Missing keys: smoothing.weight." in refusal(DEMO_PRE_DOWN, path)
    save_prepared(forms.randomize(remove_batch_norms(demo_pre_down)), path)
    assert f"it matches {DEMO_PRE_DOWN}." in refusal(sibling, path)  # its kernel may be rescaled: not to be ignored


def test_smoothing_may_be_a_convolution_with_bias_in_the_file(demo_pre_down, tmp_path):
    model = forms.randomize(remove_batch_norms(demo_pre_down))
    traced = forms.prepared(model)
    traced.smoothing = model.smoothing = torch.nn.Conv2d(3, 3, 5, stride=2, groups=3)
    forms.save_pickled(traced, tmp_path / "x")
    loaded = load_checkpoint(DEMO_PRE_DOWN, tmp_path / "x").model
    assert torch.equal(loaded.smoothing.bias, model.smoothing.bias)
    assert torch.equal(forms.logits(loaded), forms.logits(model))


def test_smoothing_kernel_may_be_a_plain_attribute(demo_pre_down, tmp_path):
    def as_attribute(traced):
        weight = traced.smoothing._buffers.pop("weight")
        traced.smoothing.__dict__["weight"] = weight

    expected = demo_pre_down.state_dict()
    path = save_prepared(demo_pre_down, tmp_path / "x", as_attribute)
    assert forms.same(load_checkpoint(DEMO_PRE_DOWN, path).model.state_dict(), expected)


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        ("backbone_model.conv1", "stride", (1, 1)),
        ("backbone_model.bn1", "eps", 1e-3),
        ("backbone_model.conv0", "padding_mode", "reflect"),
    ],
)
def test_other_hyperparameters_are_refused(demo, layer, name, value, tmp_path):
    held = getattr(demo.get_submodule(layer), name)
    path = save_prepared(demo, tmp_path / "x", lambda traced: vars(traced.get_submodule(layer)).update({name: value}))
    assert f"{layer} has {name} {value!r}, but the model's is {held!r}" in refusal(DEMO, path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_nan_infinity_and_what_exceeds_float32_are_refused(demo, value, tmp_path):
    state = {key: tensor.double() for key, tensor in demo.state_dict().items()}
    state["backbone_model.conv0.weight"][0, 0, 0, 0] = value
    assert "backbone_model.conv0.weight holds NaN, infinity" in refusal(DEMO, save(state, tmp_path / "x"))


def test_another_shape_is_refused(demo, tmp_path):
    state = demo.state_dict() | {"backbone_model.bn0.bias": torch.zeros(17)}
    message = refusal(DEMO, save(state, tmp_path / "x"))
    assert "matches no FFNet variant" in message and "backbone_model.bn0.bias [17] instead of [16]" in message


def test_variants_that_a_file_matches_are_all_named(tmp_path):
    path = save(build_model(SHARED[0]).state_dict(), tmp_path / "x")
    assert f"it matches {SHARED[0]} and {SHARED[1]}. " in refusal(DEMO, path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_whole_modules_of_every_format_and_protocol_load_exactly(zipped, protocol, demo, tmp_path):
    path = save(demo, tmp_path / "x", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    loaded = load_checkpoint(DEMO, path)
    assert loaded.form == "module" and forms.same(loaded.model.state_dict(), demo.state_dict())


def test_layers_that_no_ffnet_has_are_refused_with_a_remedy(demo, tmp_path):
    demo.head.layers[3].last_layer[2] = torch.nn.Dropout2d()
    assert load_checkpoint(DEMO, save(demo, tmp_path / "x")).form == "module"
    demo.head.layers[3].last_layer[2] = torch.nn.SiLU()  # the keys stay the same
    message = refusal(DEMO, save(demo, tmp_path / "x"))
    assert "'head.layers.3.last_layer.2' is a torch.nn.modules.activation.SiLU, which no FFNet has." in message
    assert "torch.save(model.state_dict(), 'weights.pth')" in message


@pytest.mark.parametrize("head", [b"", b"PK\3\4", (2**62).to_bytes(8, "little") + b"{"])
def test_a_file_of_sixty_gigabytes_is_refused_by_its_size(head, tmp_path):
    (tmp_path / "x.pth").write_bytes(head)
    os.truncate(tmp_path / "x.pth", 60 * 2**30)
    start = time.monotonic()
    assert "this file has 60.0 GiB, more than any FFNet's." in refusal(DEMO, tmp_path / "x.pth")
    with pytest.raises(InvalidCheckpointError, match="60.0 GiB"):
        find_in_folder(tmp_path, [DEMO])
    assert time.monotonic() - start < 5


def test_what_is_often_given_by_mistake_is_refused_with_its_remedy(tmp_path):
    assert "it is a folder, not a file" in refusal(DEMO, tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "it is a pipe, not a file" in refusal(DEMO, tmp_path / "fifo")
    assert "No such file" in refusal(DEMO, tmp_path / "none")
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Fetch it with `git lfs pull`" in refusal(DEMO, tmp_path / "x")
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 2, 2)), tmp_path / "x")
    assert "TorchScript file. Save its weights alone: torch.save(torch.jit.load(" in refusal(DEMO, tmp_path / "x")


def test_command_says_what_a_file_is_and_saves_it(demo_pre_down, tmp_path, capsys):
    path, saved = save_prepared(demo_pre_down, tmp_path / "x"), tmp_path / "x.safetensors"
    assert main([str(path), "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: prepared" in out
    assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in out
    assert f"matches {DEMO_PRE_DOWN}\n" in out
    assert "would import torch.fx.graph_module.reduce_graph_module" in out
    assert f"{len(demo_pre_down.state_dict())} keys" in out
    assert "    smoothing.weight [3, 1, 5, 5] float32" in out

    loaded = load_checkpoint(DEMO_PRE_DOWN, saved)
    assert loaded.form == "safetensors" and forms.same(loaded.model.state_dict(), demo_pre_down.state_dict())


def test_command_answers_bad_input_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    error = "this file cannot be read (No such file or directory). Name another one.\n"
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: {error}"
    assert main([str(PICKLED / "tiny.pth"), "--save", str(tmp_path / "x.pth")]) == 2
    assert "End the name in .safetensors" in capsys.readouterr().err
    assert main([str(PICKLED / "tiny.pth"), "--member", "x.pth"]) == 2
    assert "is not a release zip. Remove --member" in capsys.readouterr().err
    assert main([str(PICKLED / "tiny.pth"), "--save", str(tmp_path / "no" / "x.safetensors")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_lack_of_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    path = save({}, tmp_path / "weights.pth")
    monkeypatch.setattr("ffnet.checkpoints.loading.read_torch_zip", fail)
    with pytest.raises(InvalidCheckpointError, match=r"weights\.pth: The memory does not suffice to read this file"):
        read_checkpoint(path)


def test_the_command_shows_no_control_characters(tmp_path, capsys):
    path = save({"conv\x1b[2J\n.weight": torch.zeros(1)}, tmp_path / "\x1b[31m.pth")
    assert main([str(path)]) == 0 and main([f"{path}\n"]) == 2
    printed = capsys.readouterr()
    assert r"    conv\x1b[2J\n.weight [1] float32" in printed.out.splitlines()
    assert r"\x1b[31m.pth: " in printed.out and printed.err.count("\n") == 1 and r".pth\n: " in printed.err
    assert "\x1b" not in printed.out + printed.err
