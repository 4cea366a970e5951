"""Each model gets the file of its name in a folder, else the only one that fits, and never another model's in silence.

The reference is the file that a test wrote for a model: what `load_checkpoint` reads from the path that was found.
"""

import zipfile
from dataclasses import replace

import pytest
import torch

from ffnet.checkpoints.loading import InvalidCheckpointError, find_in_folder, load_checkpoint
from ffnet.model import build_model
from ffnet.variants import VARIANTS
from tests.helpers import checkpoint_forms as forms
from tests.helpers.networks import DEMO, PRE_DOWN, TOY

# As ffnet86S_BBB: a pair that shares weights, and a third model with the same shapes and weights of its own.
MOBILE, PAIR, GPU = "segmentation_ffnet1_mobile", "segmentation_ffnet1_mobile_pre_down", "segmentation_ffnet1"
SMALL, LARGE = "segmentation_ffnet2_d", "segmentation_ffnet2"  # as ffnet50: two models that differ in a stride
MEMBER, GPU_MEMBER = "ffnet1/ffnet1_state_dict_quarts.pth", "ffnet1/ffnet1_gpu_state_dict_quarts.pth"
TOYS = [
    replace(TOY, name=MOBILE, release_file=MEMBER),
    replace(TOY, name=PAIR, release_file=MEMBER, pre_down=True),
    replace(TOY, name=GPU, release_file=GPU_MEMBER, upsampling="bilinear"),
    replace(TOY, name=SMALL, release_file="ffnet2/ffnet2_d.pth", channels=(8, 8, 8, 16), strides=(2, 2, 2)),
    replace(TOY, name=LARGE, release_file="ffnet2/ffnet2_a.pth", channels=(8, 8, 8, 16), strides=(2, 2, 1)),
]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The demo's variants and the toys are all variants."""
    few = {name: VARIANTS[name] for name in (DEMO, PRE_DOWN)} | {toy.name: toy for toy in TOYS}
    for user in ("variants", "checkpoints.loading", "checkpoints.matching"):
        monkeypatch.setattr(f"ffnet.{user}.VARIANTS", few)


def state_of(name, seed=0):
    torch.manual_seed(seed)
    return forms.randomize(build_model(name), seed).state_dict()


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def found(folder, *names):
    """The paths by model, each of which loads."""
    paths, notes = find_in_folder(folder, names)
    assert list(paths) == list(names) and notes == []
    for name, path in paths.items():
        load_checkpoint(name, path)
    return paths


def refusal(folder, *names):
    with pytest.raises(InvalidCheckpointError) as caught:
        find_in_folder(folder, names)
    message = str(caught.value)
    assert message.startswith(f"--checkpoint {folder}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", [f"{MOBILE}.pth", f"prepared_{MOBILE}.pth", MEMBER])
def test_published_and_own_names_decide_between_files_that_fit_as_well(name, tmp_path):
    save(state_of(MOBILE, 1), tmp_path / "a.pth")
    path = save(state_of(MOBILE, 2), tmp_path / name)
    (tmp_path / f"{MOBILE}.json").write_text("{}")  # not a checkpoint
    assert found(tmp_path, MOBILE) == {MOBILE: path}


def test_models_of_other_names_get_the_only_file_that_fits(tmp_path):
    demo, pre_down = save(state_of(DEMO), tmp_path / "x" / "a.bin"), save(state_of(PRE_DOWN), tmp_path / "b.pth.tar")
    (tmp_path / "README.md").write_text("none")
    assert found(tmp_path, PRE_DOWN, DEMO) == {PRE_DOWN: pre_down, DEMO: demo}


def test_one_file_serves_a_pre_down_model_and_its_sibling(tmp_path):
    path = save(state_of(PAIR), tmp_path / "x.pth")
    assert found(tmp_path, MOBILE, PAIR) == {MOBILE: path, PAIR: path}


def test_hyperparameters_tell_models_that_differ_in_a_stride(tmp_path):
    for name in (LARGE, SMALL):
        forms.save_pickled(forms.prepared(build_model(name)), tmp_path / f"{'ab'[name == SMALL]}.pth")
    assert found(tmp_path, SMALL, LARGE) == {SMALL: tmp_path / "b.pth", LARGE: tmp_path / "a.pth"}


def test_release_zip_serves_every_model_that_it_holds(tmp_path):
    states = {MEMBER: state_of(PAIR, 1), GPU_MEMBER: state_of(GPU, 2)}
    with zipfile.ZipFile(tmp_path / "ffnet1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, state in states.items():
            archive.write(save(state, tmp_path / "member"), member)
    (tmp_path / "member").unlink()
    paths = found(tmp_path, GPU, MOBILE, PAIR)
    assert set(paths.values()) == {tmp_path / "ffnet1.zip"}
    weight = "head.layers.3.last_layer.0.weight"
    assert torch.equal(load_checkpoint(GPU, paths[GPU]).model.state_dict()[weight], states[GPU_MEMBER][weight])


def test_one_error_names_all_missing_and_ambiguous_models_and_the_files(tmp_path):
    save(state_of(DEMO, 1), tmp_path / "x" / "one.pth")
    save(state_of(DEMO, 2), tmp_path / "two.pth")
    message = refusal(tmp_path, DEMO, PRE_DOWN, SMALL)
    assert f"No file fits {PRE_DOWN}, {SMALL}." in message and "The folder holds two.pth, one.pth." in message
    assert f"{DEMO} has several files: {tmp_path / 'two.pth'}, {tmp_path / 'x' / 'one.pth'}. Keep one" in message
    assert "The folder holds no checkpoints." in refusal(tmp_path / "none", DEMO)


def test_one_file_is_never_used_for_models_whose_published_weights_differ(tmp_path):
    path = save(state_of(MOBILE), tmp_path / "x.pth")
    assert f"x.pth fits {MOBILE} and {GPU}, whose published weights differ." in refusal(tmp_path, MOBILE, GPU)
    assert found(tmp_path, GPU) == {GPU: path}  # alone it is used, as if it was named without its folder


def test_file_with_the_name_of_another_model_is_not_used(tmp_path):
    path = save(state_of(MOBILE), tmp_path / GPU_MEMBER)
    assert f"No file fits {MOBILE}." in refusal(tmp_path, MOBILE)
    assert found(tmp_path, GPU) == {GPU: path}


def test_files_that_can_not_be_loaded_are_ignored_with_a_note(tmp_path):
    path = save(state_of(DEMO), tmp_path / "x.pth")
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:5000])
    (tmp_path / ".hidden.pth").write_bytes(path.read_bytes())
    save(state_of(PRE_DOWN) | {"smoothing.weight": torch.full((3, 1, 5, 5), torch.nan)}, tmp_path / "nan.pth")
    paths, (note,) = find_in_folder(tmp_path, [DEMO])
    assert paths == {DEMO: path}
    assert note.startswith(f"A file in the folder was ignored. {tmp_path / 'cut.pth'}: this file is broken")
    assert f"No file fits {PRE_DOWN}." in refusal(tmp_path, PRE_DOWN)
