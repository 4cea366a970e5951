"""The demo as users run it, and a network that needs cross-layer equalization."""

import pytest
import torch

from demo.ill_conditioned import ill_conditioned
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.evaluation.scores import FP32
from ffnet.variants import DEMO_VARIANTS
from tests.helpers.browser import browser
from tests.helpers.names import INT8_ONNX_RUNTIME, INT8_SIMULATED
from tests.helpers.networks import DEMO, demo_checkpoint, random_batches
from tests.helpers.program import run_with_result


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """One folder for all tests, so that the scenes are rendered once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=DEMO_VARIANTS)
def demo_run(request, cache_dir, tmp_path_factory):
    """The output folder and the result of half the demo with each of its models."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_demo(cache_dir, folder, "--model-name", request.param, "--limit", "12")


def run_demo(cache_dir, folder, *options):
    return run_with_result(["--demo", "--use-cuda", "false", "--cache-dir", cache_dir, *options], folder)


def demo_model():
    return load_checkpoint(DEMO, demo_checkpoint(DEMO)).model


@pytest.mark.slow
def test_demo_models_score_well_in_fp32_and_in_int8(demo_run):
    _, result = demo_run
    fp32, simulated, executed = (result["backends"][name] for name in (FP32, INT8_SIMULATED, INT8_ONNX_RUNTIME))
    assert fp32["miou"] >= 80 and min(fp32["iou"].values()) > 40
    assert len(fp32["iou"]) == 19 and None not in fp32["iou"].values()
    assert abs(fp32["miou"] - simulated["miou"]) < 1
    assert abs(simulated["miou"] - executed["miou"]) <= 0.1
    assert result["agreement"][f"{INT8_SIMULATED}|{INT8_ONNX_RUNTIME}"] >= 99.5
    assert "nothing about Cityscapes" in result["notes"][0]


@pytest.mark.slow
def test_the_demo_report_opens_without_faults_in_a_browser(demo_run, tmp_path):
    folder, _ = demo_run
    assert (folder / "report.html").stat().st_size < 3e6
    with browser(tmp_path / "profile") as tab:
        for width, height, phone in ((1280, 900, False), (390, 844, True)):
            assert tab.faults(folder / "report.html", width, height, False, phone) == []


def test_ill_conditioning_changes_weights_but_no_output():
    model = demo_model()
    harder = ill_conditioned(model)
    (x,) = random_batches(1)
    with torch.no_grad():
        assert torch.equal(harder(x), model(x))
    assert not torch.equal(harder.backbone_model.layer1[0].bn1.weight, model.backbone_model.layer1[0].bn1.weight)


@pytest.mark.slow
def test_equalization_restores_the_miou_of_an_ill_conditioned_network(cache_dir, tmp_path):
    """Without equalization the network loses at least 3 percentage points in INT8."""
    checkpoint = tmp_path / "ill_conditioned.pth"
    torch.save(ill_conditioned(demo_model()).state_dict(), checkpoint)
    drops = {}
    for option in ("--cle", "--no-cle"):
        options = ("--checkpoint", checkpoint, "--limit", "8", "--worst", "0", "--no-execute", option)
        result = run_demo(cache_dir, tmp_path / option, *options)
        drops[option] = result["backends"][FP32]["miou"] - result["backends"][INT8_SIMULATED]["miou"]
    assert drops["--no-cle"] >= 3
    assert abs(drops["--cle"]) <= 0.3
