"""Folders of checkpoints: small models with the relations of the published ones, and what is found in a folder."""

import zipfile
from dataclasses import replace

import pytest
import torch

from ffnet.checkpoints.folder import find_checkpoints
from ffnet.checkpoints.loading import InvalidCheckpointError, load_checkpoint
from ffnet.model import build_model
from tests.helpers import checkpoint_forms as forms
from tests.helpers.networks import TOY

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
