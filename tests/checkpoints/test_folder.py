"""A folder's files are matched with models by their contents, and wrong weights are never used in silence.

The reference is the file that a test wrote for a model: what `load_checkpoint` reads from the path that was found.
"""

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ffnet.checkpoints import folder as module
from ffnet.checkpoints.folder import find_checkpoints
from ffnet.checkpoints.loading import InvalidCheckpointError, load_checkpoint
from ffnet.checkpoints.matching import shapes_of, without_details
from ffnet.model import build_model, remove_batch_norms
from ffnet.variants import VARIANTS
from tests.helpers import checkpoint_forms as forms
from tests.helpers.networks import DEMO, PRE_DOWN, TOY, demo_checkpoint

PICKLED = Path(__file__).parents[1] / "data" / "pickled"
# As ffnet86S_BBB: a pair that shares weights, and a third model with weights of its own.
MOBILE, PAIR, GPU = (
    "segmentation_ffnet1NS_CCC_mobile",
    "segmentation_ffnet1NS_CCC_mobile_pre_down",
    "segmentation_ffnet1NS_CCC",
)
# As ffnet40S_BBB: a pair alone.
PLAIN, SMOOTHED = "segmentation_ffnet3NS_CCC_mobile", "segmentation_ffnet3NS_CCC_mobile_pre_down"
# As ffnet50: two models that differ in a stride.
SMALL, LARGE = "segmentation_ffnet2NS_dCCC", "segmentation_ffnet2NS_CCC"
MEMBER = "ffnet1NS/ffnet1NS_CCC_cityscapes_state_dict_quarts.pth"
GPU_MEMBER = "ffnet1NS/ffnet1NS_CCC_gpu_cityscapes_state_dict_quarts.pth"
SMALL_MEMBER = "ffnet2NS/ffnet2NS_dCCC_cityscapes_state_dict_quarts.pth"
WIDER = (8, 8, 8, 16)
TOYS = {
    variant.name: variant
    for variant in (
        replace(TOY, name=MOBILE, release_file=MEMBER),
        replace(TOY, name=PAIR, release_file=MEMBER, pre_down=True),
        replace(TOY, name=GPU, release_file=GPU_MEMBER, upsampling="bilinear"),
        replace(TOY, name=PLAIN, release_file=MEMBER.replace("1NS", "3NS"), channels=(8, 8, 16, 8)),
        replace(
            TOY, name=SMOOTHED, release_file=MEMBER.replace("1NS", "3NS"), channels=(8, 8, 16, 8), pre_down=True
        ),
        replace(TOY, name=SMALL, release_file=SMALL_MEMBER, channels=WIDER, strides=(2, 2, 2)),
        replace(
            TOY, name=LARGE, release_file=SMALL_MEMBER.replace("_d", "_", 1), channels=WIDER, strides=(2, 2, 1)
        ),
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_variants(monkeypatch):
    """The toys and the demo's two are all variants, because building 66 takes seconds."""
    kept = {name: VARIANTS[name] for name in (DEMO, PRE_DOWN)} | TOYS
    monkeypatch.setattr("ffnet.variants.VARIANTS", kept)
    for user in ("model", "checkpoints.matching", "checkpoints.loading", "checkpoints.folder"):
        monkeypatch.setattr(f"ffnet.{user}.VARIANTS", kept)


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return forms.randomize(build_model(name), seed)


def state_of(name, seed=0):
    return model_of(name, seed).state_dict()


def save(obj, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(obj, path)
    return path


def save_prepared(model, path):
    forms.save_pickled(forms.prepared(model), path)
    return path


def save_release(members, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            state = path.with_suffix(".member")
            state.write_bytes(content) if isinstance(content, bytes) else torch.save(content, state)
            archive.write(state, member)
            state.unlink()
    return path


def found(folder, *names):
    """The paths by model; each loads, and nothing has to be said."""
    result = find_checkpoints(folder, names)
    assert list(result.paths) == list(names) and result.notes == ()
    for name, path in result.paths.items():
        load_checkpoint(name, path)
    return result.paths


def refusal(folder, *names):
    with pytest.raises(InvalidCheckpointError) as caught:
        find_checkpoints(folder, names)
    message = str(caught.value)
    assert message.startswith(f"--checkpoint {folder}: ") and "\n" not in message
    return message


def test_content_decides_although_every_name_is_another_models(tmp_path):
    demo, pre_down = tmp_path / f"{PRE_DOWN}.pth", tmp_path / f"prepared_{DEMO}.pth"
    demo.write_bytes(demo_checkpoint(DEMO).read_bytes())
    pre_down.write_bytes(demo_checkpoint(PRE_DOWN).read_bytes())
    assert found(tmp_path, PRE_DOWN, DEMO) == {PRE_DOWN: pre_down, DEMO: demo}
    assert found(tmp_path, DEMO) == {DEMO: demo}  # a model that is not requested is no reason for a note


FORMS = {
    "state_dict": lambda model, path: save(model.state_dict(), path),
    "old state_dict": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "training checkpoint": lambda model, path: save({"state_dict": model.state_dict(), "epoch": 3}, path),
    "wrapped": lambda model, path: save({f"module.{key}": t for key, t in model.state_dict().items()}, path),
    "safetensors": lambda model, path: safetensors.torch.save_file(model.state_dict(), path),
    "prepared": save_prepared,
    "module": forms.save_pickled,
    "equalized": lambda model, path: save_prepared(remove_batch_norms(model), path),
    "release": lambda model, path: save_release({"a/b.pth": model.state_dict()}, path),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_each_form_are_found(form, tmp_path):
    FORMS[form](model_of(DEMO), tmp_path / "a")
    FORMS[form](model_of(PRE_DOWN), tmp_path / "b")
    assert found(tmp_path, PRE_DOWN, DEMO) == {PRE_DOWN: tmp_path / "b", DEMO: tmp_path / "a"}


def test_one_error_names_all_missing_and_ambiguous_models(tmp_path):
    save(state_of(DEMO, 1), tmp_path / "x" / "one.pth")
    save(state_of(DEMO, 2), tmp_path / "two.pth")
    (tmp_path / "notes.txt").write_text("best: two")
    message = refusal(tmp_path, DEMO, PRE_DOWN, SMALL)
    assert f"it holds no checkpoint for {PRE_DOWN}, {SMALL}. Add their checkpoints" in message
    assert f"{DEMO} matches several files: two.pth, x/one.pth. Keep only one" in message
    assert "Ignored 1 file that no FFNet variant matches: notes.txt." in message


@pytest.mark.parametrize("name", [f"{DEMO}.pth", f"{DEMO}.safetensors"])
def test_the_models_name_decides_between_files_that_match_equally_well(name, tmp_path):
    save(state_of(DEMO, 1), tmp_path / "a.pth")
    if name.endswith(".pth"):
        save(state_of(DEMO, 2), tmp_path / name)
    else:
        safetensors.torch.save_file(state_of(DEMO, 2), tmp_path / name)
    result = find_checkpoints(tmp_path, [DEMO])
    assert result.paths == {DEMO: tmp_path / name}
    assert result.notes == (f"{name} was used for {DEMO}, which it matches best; not used: a.pth.",)


def test_published_name_decides_between_files_that_match_equally_well(tmp_path):
    save(state_of(MOBILE, 1), tmp_path / "a.pth")
    path = save(state_of(MOBILE, 2), tmp_path / MEMBER)
    assert find_checkpoints(tmp_path, [MOBILE]).paths == {MOBILE: path}


def test_files_with_the_same_tensors_are_one(tmp_path):
    model = model_of(DEMO)
    save(model.state_dict(), tmp_path / "b.pth")
    state = {key: t for key, t in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save(dict(reversed(state.items())), tmp_path / "c.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "b.pth")
    save_prepared(model, tmp_path / "a.pth")
    assert found(tmp_path, DEMO) == {DEMO: tmp_path / "a.pth"}


def test_file_with_batch_norms_is_preferred_to_an_equalized_one(tmp_path):
    save_prepared(remove_batch_norms(model_of(DEMO)), tmp_path / f"{DEMO}.pth")
    save_prepared(model_of(DEMO), tmp_path / "z.pth")
    result = find_checkpoints(tmp_path, [DEMO])
    assert result.paths == {DEMO: tmp_path / "z.pth"}
    assert result.notes == (f"z.pth was used for {DEMO}, which it matches best; not used: {DEMO}.pth.",)


def test_one_file_serves_a_pre_down_model_and_its_sibling(tmp_path):
    path = save(state_of(PAIR), tmp_path / "x.pth")
    assert found(tmp_path, MOBILE, PAIR) == {MOBILE: path, PAIR: path}


def test_smoothing_kernel_decides_between_files_of_a_pre_down_model_and_its_sibling(tmp_path):
    pair = save(state_of(SMOOTHED, 1), tmp_path / f"{PLAIN}.pth")
    alone = save(state_of(PLAIN, 2), tmp_path / f"{SMOOTHED}.pth")
    assert found(tmp_path, PLAIN, SMOOTHED) == {PLAIN: alone, SMOOTHED: pair}


def test_pre_down_model_needs_a_smoothing_kernel(tmp_path):
    save(state_of(PLAIN), tmp_path / "x.pth")
    assert f"no checkpoint for {SMOOTHED}." in refusal(tmp_path, PLAIN, SMOOTHED)


def test_known_weights_are_preferred_to_unknown_ones(tmp_path):
    known = save(state_of(PAIR, 1), tmp_path / "y.pth")
    save(state_of(MOBILE, 2), tmp_path / "x.pth")
    assert find_checkpoints(tmp_path, [MOBILE]).paths == {MOBILE: known}


def test_published_models_that_share_tensors_but_not_weights_are_those_that_the_module_names():
    models = {}
    for name, variant in VARIANTS.items():
        if not variant.is_demo:
            shapes = frozenset(shapes_of(without_details(variant), False).items())
            models.setdefault(shapes, {}).setdefault(variant.release_file, []).append(name.split("ffnet")[1])
    pairs = [names for group in models.values() for names in group.values() if len(names) > 1]
    rivals = [sorted(min(names, key=len) for names in group.values()) for group in models.values() if len(group) > 1]
    assert len(models) == 45 and len(pairs) == 16
    assert all(sorted(names) == [min(names), f"{min(names)}_pre_down"] for names in pairs)
    mobile = ["150S_BBB", "86S_BBB", "86S_dBBB"]
    assert sorted(rivals) == sorted(
        [[name, f"{name}_mobile"] for name in mobile] + [[f"{depth}_AAA", f"{depth}_dAAA"] for depth in (50, 101)]
    )


def test_file_of_unknown_weights_is_never_used_for_two_models(tmp_path):
    save(state_of(MOBILE), tmp_path / "x.pth")
    message = refusal(tmp_path, MOBILE, GPU)
    assert f"x.pth matches {MOBILE} and {GPU}, whose published weights differ" in message


@pytest.mark.parametrize("name", [MOBILE, GPU])
def test_file_of_unknown_weights_is_used_for_one_model_with_a_note(name, tmp_path):
    path = save(state_of(MOBILE), tmp_path / "x.pth")
    result = find_checkpoints(tmp_path, [name])
    assert result.paths == {name: path}
    (note,) = result.notes
    assert note.startswith(f"x.pth was used for {name}, but it matches ") and (MOBILE if name == GPU else GPU) in note


def test_two_files_of_unknown_weights_are_ambiguous_for_both_models(tmp_path):
    save(state_of(MOBILE, 1), tmp_path / "x.pth")
    save(state_of(MOBILE, 2), tmp_path / "y.pth")
    message = refusal(tmp_path, MOBILE, GPU)
    assert all(f"{name} matches several files: x.pth, y.pth." in message for name in (MOBILE, GPU))


def test_unpacked_releases_are_told_apart_by_their_names(tmp_path):
    mobile = save(state_of(MOBILE, 1), tmp_path / MEMBER)
    gpu = save(state_of(GPU, 2), tmp_path / GPU_MEMBER)
    assert found(tmp_path, GPU, MOBILE) == {GPU: gpu, MOBILE: mobile}


@pytest.mark.parametrize("name", [GPU_MEMBER, f"{GPU}.pth", f"{GPU}.ckpt"])
def test_file_named_as_another_model_is_not_used(name, tmp_path):
    path = save(state_of(MOBILE), tmp_path / name)
    message = refusal(tmp_path, MOBILE)
    assert f"no checkpoint for {MOBILE}." in message
    assert f"{name} would fit {MOBILE}, but is known to hold the weights of another model." in message
    assert found(tmp_path, GPU) == {GPU: path}


def test_copy_of_another_models_file_is_not_used(tmp_path):
    save(state_of(GPU), tmp_path / "best.pth")
    save(state_of(GPU), tmp_path / GPU_MEMBER)
    assert "best.pth, " in refusal(tmp_path, MOBILE)


def test_the_same_tensors_under_the_names_of_two_models_are_refused(tmp_path):
    save(state_of(GPU), tmp_path / MEMBER)
    save(state_of(GPU), tmp_path / GPU_MEMBER)
    assert "whose published weights differ" in refusal(tmp_path, MOBILE, GPU)
    assert "does not say which" in find_checkpoints(tmp_path, [MOBILE]).notes[0]


def test_smoothing_kernel_tells_that_the_weights_are_not_the_third_models(tmp_path):
    save(state_of(PAIR), tmp_path / "x.pth")
    assert f"x.pth would fit {GPU}, but" in refusal(tmp_path, MOBILE, GPU)


def test_python_text_of_prepared_files_tells_the_upsampling(tmp_path):
    gpu = save_prepared(model_of(GPU, 1), tmp_path / "a.pth")
    mobile = save_prepared(model_of(MOBILE, 2), tmp_path / "b.pth")
    assert found(tmp_path, MOBILE, GPU) == {MOBILE: mobile, GPU: gpu}


def test_hyperparameters_tell_models_that_differ_in_a_stride(tmp_path):
    large = save_prepared(model_of(LARGE, 1), tmp_path / "a.pth")
    small = save_prepared(model_of(SMALL, 2), tmp_path / "b.pth")
    assert found(tmp_path, SMALL, LARGE) == {SMALL: small, LARGE: large}
    large.unlink()
    assert f"no checkpoint for {LARGE}." in refusal(tmp_path, SMALL, LARGE)


def test_release_zip_serves_every_model_that_it_holds(tmp_path):
    states = {MEMBER: state_of(PAIR, 1), GPU_MEMBER: state_of(GPU, 2), "ffnet1NS/x.pth": b"never read"}
    path = save_release(states, tmp_path / "renamed")
    names = (GPU, MOBILE, PAIR)
    assert found(tmp_path, *names) == dict.fromkeys(names, path)
    weight = "head.layers.3.last_layer.0.weight"
    assert torch.equal(load_checkpoint(GPU, path).model.state_dict()[weight], states[GPU_MEMBER][weight])
    assert torch.equal(load_checkpoint(MOBILE, path).model.state_dict()[weight], states[MEMBER][weight])

    save(states[MEMBER], tmp_path / MEMBER)  # unpacked beside the zip: the same tensors
    assert find_checkpoints(tmp_path, names).notes == ()


def test_member_of_a_release_zip_must_match_its_name(tmp_path):
    save_release({MEMBER: state_of(DEMO), GPU_MEMBER: b"broken", SMALL_MEMBER: state_of(SMALL)}, tmp_path / "x.zip")
    message = refusal(tmp_path, MOBILE, GPU, SMALL)
    assert f"it holds no checkpoint for {MOBILE}, {GPU}. " in message and "Ignored 2 files" in message
    assert f"{MEMBER} does not match {MOBILE} or {PAIR}, whose name it has." in message
    assert found(tmp_path, SMALL) == {SMALL: tmp_path / "x.zip"}


def test_release_zip_without_published_names_is_to_be_unpacked(tmp_path):
    save_release({"a.pth": state_of(MOBILE), "b.pth": state_of(DEMO)}, tmp_path / "x.zip")
    assert "x.zip: no checkpoint in it is named as in an FFNet release. Unpack it." in refusal(tmp_path, MOBILE)


def test_other_files_are_ignored_with_a_note(tmp_path):
    path = save(state_of(DEMO), tmp_path / "model.bin")
    for name in ("README.md", "empty", "page.html", ".hidden.pth", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"<html>")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nothing")
    save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    (tmp_path / "odd.pth").write_bytes((PICKLED / "odd.pth").read_bytes())
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:5000])
    result = find_checkpoints(tmp_path, [DEMO])
    assert result.paths == {DEMO: path}
    names = "README.md, dangling.pth, empty, odd.pth, other.pth, page.html, pipe"
    others, refused = result.notes
    assert others == f"Ignored 7 files that no FFNet variant matches: {names}."
    assert refused.startswith(f"Ignored 1 file that cannot be loaded: cut.pth. The first error: {tmp_path}/cut.pth: ")


def test_file_that_would_not_load_is_not_found(tmp_path):
    state = state_of(DEMO)
    state["backbone_model.conv0.weight"][0, 0, 0, 0] = torch.nan
    save(state, tmp_path / "x.pth")
    message = refusal(tmp_path, DEMO)
    assert f"no checkpoint for {DEMO}." in message and "conv0.weight holds NaN or infinity" in message


def test_large_files_are_not_read(tmp_path, monkeypatch):
    for name, size in (("a.pth", 2**40), ("b.safetensors", 2**29)):
        with (tmp_path / name).open("wb") as file:  # sparse
            file.write(b"PK\3\4" if name == "a.pth" else b"\2\0\0\0\0\0\0\0{}")
            file.truncate(size)
    monkeypatch.setattr(module, "read_checkpoint", None)
    assert "Ignored 2 files that cannot be loaded: a.pth, b.safetensors." in refusal(tmp_path, DEMO)


def test_folders_are_searched_once_although_links_form_a_loop(tmp_path):
    path = save(state_of(DEMO), tmp_path / "a" / "b" / "x.pth")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path)
    assert found(tmp_path, DEMO) == {DEMO: path}


def test_too_many_files_or_folders_are_refused(tmp_path, monkeypatch):
    for number in range(4):
        save(state_of(MOBILE), tmp_path / str(number) / "x.pth")
    monkeypatch.setattr(module, "MAX_FILES", 3)
    assert "more than 3 files or" in refusal(tmp_path, MOBILE)
    monkeypatch.setattr(module, "MAX_FILES", 4)
    monkeypatch.setattr(module, "MAX_FOLDERS", 4)
    assert "or 4 folders" in refusal(tmp_path, MOBILE)
    monkeypatch.setattr(module, "MAX_FOLDERS", 5)
    assert find_checkpoints(tmp_path, [MOBILE]).paths


def test_folders_without_checkpoints_are_refused(tmp_path):
    assert "there is no such file or folder" in refusal(tmp_path / "none", DEMO)
    assert "the folder holds no files" in refusal(tmp_path, DEMO)
    (tmp_path / "x.txt").write_text("x")
    assert "is not a folder" in refusal(tmp_path / "x.txt", DEMO)
    message = refusal(tmp_path, DEMO, PRE_DOWN)
    assert "it holds no FFNet checkpoint" in message and "x.txt" in message and DEMO not in message


def test_each_file_is_read_once_and_tensors_of_one_at_a_time_are_held(tmp_path, monkeypatch):
    for number, name in enumerate((DEMO, PRE_DOWN, SMALL)):
        save(state_of(name), tmp_path / f"{number}.pth")
    read, alive = [], []

    class Watched(dict):
        """A state_dict that says when it is gone."""

        def __del__(self):
            alive.pop()

    def watched(path, *member):
        assert not alive
        contents, sha256 = original(path, *member)
        alive.append(path)
        read.append(path.name)
        return replace(contents, state_dict=Watched(contents.state_dict)), sha256

    original = module.read_checkpoint
    monkeypatch.setattr(module, "read_checkpoint", watched)
    find_checkpoints(tmp_path, [DEMO, PRE_DOWN, SMALL])
    assert read == ["0.pth", "1.pth", "2.pth"]
