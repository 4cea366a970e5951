"""The network against outputs of the original implementation, and the table against the published list of variants."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ffnet.model import build_without_weights, count_parameters
from ffnet.variants import VARIANTS
from tests.helpers.networks import golden_model

DATA = Path(__file__).parent / "data"
QUICK = ("segmentation_ffnet40S_dBBB_mobile", "segmentation_ffnet18_dAAC")
GOLDEN = json.loads((DATA / "golden.json").read_text())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GOLDEN]
)
def test_outputs_equal_those_of_the_original_implementation(name):
    golden = GOLDEN[name]
    model = golden_model(name)
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
    state = build_without_weights(name).state_dict()
    entries = sorted((key, list(t.shape)) for key, t in state.items() if not key.endswith("num_batches_tracked"))
    assert hashlib.sha256(json.dumps(entries).encode()).hexdigest() == GOLDEN[name]["keys_sha256"]


@pytest.mark.slow
def test_table_has_every_published_variant_and_its_number_of_parameters():
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
        if variant.published.int8 is None:  # the model zoo measured the others itself, in FP32 too
            assert variant.published.fp32 == row["published_fp32_miou"]
        assert count_parameters(build_without_weights(name)) == row["parameters"]
