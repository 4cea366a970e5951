"""The device of a run, and which images are scored, calibrated on and selected on, against cases worked by hand."""

import pytest
import torch

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Config, DataConfig, Runtime
from ffnet.run.inputs import calibration_indices, images_digest, select_device, selection_indices
from ffnet.system.errors import UserError


@pytest.mark.parametrize(("allowed", "precision"), ((True, "high"), (False, "highest")))
def test_tf32_is_set_where_torch_compile_reads_it(monkeypatch, allowed, precision):
    """torch has two interfaces for it. The one that torch.compile reads fails once the other was used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert select_device(Config(runtime=Runtime(allow_tf32=allowed), use_cuda=True)) == "cuda"
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
        assert torch.get_float32_matmul_precision() == precision
    finally:
        assert select_device(Config(use_cuda=False)) == "cpu"


def test_a_missing_gpu_is_an_error_if_an_option_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device(Config()) == "cpu"
    with pytest.raises(UserError, match="--use-cuda: torch finds no CUDA device"):
        select_device(Config(use_cuda=True))
    with pytest.raises(UserError, match="--allow-tf32 has an effect on GPUs only"):
        select_device(Config(runtime=Runtime(allow_tf32=True)))


def test_selection_images_are_spread_evenly_and_not_calibrated_on():
    chosen = selection_indices(10, DataConfig(selection_images=3))
    assert chosen == [0, 4, 9]
    assert len(selection_indices(10, DataConfig())) == 3 and len(selection_indices(500, DataConfig())) == 64
    assert calibration_indices(10, chosen, DataConfig()) == [1, 2, 3, 5, 6, 7, 8]
    some = calibration_indices(10, chosen, DataConfig(calibration_images=4, seed=1))
    assert some == sorted(set(some)) and len(some) == 4 and not set(some) & set(chosen)
    assert some != calibration_indices(10, chosen, DataConfig(calibration_images=4, seed=2))


def test_too_few_images_are_an_error():
    with pytest.raises(UserError, match="--selection-images: 4 of the 4 images of the val split"):
        selection_indices(4, DataConfig(selection_images=4))
    with pytest.raises(UserError, match="--selection-images: 1 of the 1 image of the val split"):
        selection_indices(1, DataConfig())
    with pytest.raises(UserError, match="--calibration-images 99: the val split has only 4 images. Give"):
        calibration_indices(4, [], DataConfig(calibration_images=99))
    with pytest.raises(UserError, match="has only 2 images, apart from 2 for the choice of recovery steps"):
        calibration_indices(4, [0, 3], DataConfig(calibration_images=3))


def test_the_digest_of_images_depends_on_names_and_contents_but_not_on_the_folder(tree, tmp_path_factory):
    digest = images_digest(CityscapesSplit(tree, "val"), 2)
    moved = tmp_path_factory.mktemp("x") / "moved"
    tree.rename(moved)
    assert images_digest(CityscapesSplit(moved, "val"), 0) == digest
    assert images_digest(CityscapesSplit(moved, "val", 3), 2) != digest
    first, second = (moved / path for path in CityscapesSplit(moved, "val").targets[:2])
    first.write_bytes(second.read_bytes())
    assert images_digest(CityscapesSplit(moved, "val"), 2) != digest
