"""The network against outputs of the original implementation, and the table against the published list of variants."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ffnet import VARIANTS, build_model
from ffnet.variants import closest_names

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text())


def golden_state(model):
    """The weights that the golden outputs were measured with: from each key's crc32 alone."""
    return {key: golden_tensor(key, tensor) for key, tensor in model.state_dict().items()}


def golden_tensor(key, tensor):
    if key == "smoothing.weight":
        return tensor
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(tensor)
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(tensor.shape))
    if n.ndim == 4:
        value = n * np.sqrt(2 / np.prod(n.shape[1:]))
    elif key.endswith("running_mean"):
        value = 0.1 * n
    elif key.endswith("running_var"):
        value = 1 + 0.5 * abs(n)
    elif key.endswith("weight"):
        value = (1.0 if key.startswith("head.") else 0.3) * (1 + 0.1 * n)
    else:
        value = 0.02 * n
    return torch.from_numpy(value.astype(np.float32))


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_equal_the_originals(name):
    golden = GOLDEN[name]
    model = build_model(name)
    model.load_state_dict(golden_state(model))
    image = np.random.RandomState(0).standard_normal((1, 3, 128, 256)).astype(np.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image))
    flat = logits.flatten().double().numpy()

    assert list(logits.shape) == golden["shape"]
    bound = 1e-4 * golden["std"]
    assert np.abs(flat[np.linspace(0, len(flat) - 1, 48).astype(int)] - golden["samples"]).max() < bound
    assert abs(flat.mean() - golden["mean"]) < bound and abs(flat.std() - golden["std"]) < bound


@pytest.mark.parametrize("name", GOLDEN)
def test_keys_are_the_published_ones(name):
    state = build_model(name).state_dict()
    entries = sorted((key, list(t.shape)) for key, t in state.items() if not key.endswith("num_batches_tracked"))
    assert hashlib.sha256(json.dumps(entries).encode()).hexdigest() == GOLDEN[name]["keys_sha256"]


@pytest.mark.slow
def test_table_holds_every_published_variant():
    published = {row["name"]: row for row in json.loads((DATA / "variants.json").read_text())}
    assert set(published) == {name for name, variant in VARIANTS.items() if not variant.is_demo}
    for name, row in published.items():
        variant = VARIANTS[name]
        assert list(variant.blocks) == row["blocks_per_stage"]
        assert list(variant.strides) == row["stage_strides"]
        assert list(variant.channels) == row["stage_channels"]
        assert variant.bottleneck == (row["block"] == "Bottleneck")
        assert variant.upsampling == row["upsampling"].split(",")[0]
        assert variant.pre_down == row["pre_down"]
        assert variant.release_file == row["ffnet_release_file"]
        assert variant.published.int8 or variant.published.fp32 == row["published_fp32_miou"]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_model(name).parameters())
        assert parameters == row["parameters"]


def test_build_model_is_in_eval_mode():
    assert not build_model("segmentation_ffnet18_dAAC").training


def test_closest_names_find_a_slip():
    for slip in ("segmentation_ffnet78s_dBBB_mobil", "ffnet78S_dBBB_m"):
        assert closest_names(slip)[0] == "segmentation_ffnet78S_dBBB_mobile"
    assert all("ffnet78S" in name for name in closest_names("ffnet78S"))
