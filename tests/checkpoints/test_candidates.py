"""A folder's files are matched with models by their contents, and wrong weights are never used in silence.

The reference is the file that a test wrote for a model: what `load_checkpoint` reads from the path that was found.
"""

import pytest
import safetensors.torch
import torch

from ffnet.checkpoints.folder import find_checkpoints
from ffnet.checkpoints.matching import shapes_of, without_details
from ffnet.model import remove_batch_norms
from ffnet.variants import VARIANTS
from tests.helpers import checkpoint_forms as forms
from tests.helpers.checkpoint_folders import (
    GPU,
    GPU_MEMBER,
    LARGE,
    MEMBER,
    MOBILE,
    PAIR,
    PLAIN,
    SMALL,
    SMOOTHED,
    found,
    model_of,
    refusal,
    save,
    save_prepared,
    save_release,
    state_of,
)
from tests.helpers.networks import DEMO, PRE_DOWN, demo_checkpoint

pytestmark = pytest.mark.usefixtures("few_variants")


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
