"""The demo as a stranger runs it, and the case in which equalization matters."""

from pathlib import Path

import pytest
import torch

import ffnet_quanteval
from datasets.cityscapes import CityscapesSplit
from datasets.streetscenes import ensure_scenes
from demo.ill_conditioned import ill_conditioned
from ffnet import build_model, quantize
from ffnet.evaluate import loader, normalize, sweep
from ffnet.fast import make_fast
from ffnet.lower import lower
from ffnet.metrics import mean_iou
from ffnet.variants import DEMO_VARIANTS
from tests.browser import browser
from tests.test_quantize import inputs

CPU = torch.device("cpu")
DEMO = Path(ffnet_quanteval.__file__).parent / "demo"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder, so that the scenes are rendered once."""
    return tmp_path_factory.mktemp("cache")


def run(cache, *more):
    return ffnet_quanteval.main(["--demo", "--use-cuda", "false", "--cache-dir", str(cache), *more])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_VARIANTS)
def test_demo_models_are_good_and_quantize_well(cache, name, capsys):
    result = run(cache, "--model-name", name)
    fp32, int8, executed = (result["passes"][key] for key in ("FP32", "INT8", "INT8 executed"))
    assert fp32["miou"] >= 80 and min(fp32["iou"].values()) > 40
    assert len(fp32["iou"]) == 19 and None not in fp32["iou"].values()
    assert abs(fp32["miou"] - int8["miou"]) < 1
    assert abs(int8["miou"] - executed["miou"]) <= 0.1
    assert result["agreement"]["INT8|INT8 executed"] >= 99.5
    assert "drawn by this project" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demos_report_opens_in_a_browser(cache, tmp_path):
    run(cache, "--limit", "4", "--output-dir", str(tmp_path / "out"))
    with browser(tmp_path / "profile") as tab:
        for width, height, phone in ((1280, 900, False), (390, 844, True)):
            assert tab.faults(tmp_path / "out" / "report.html", width, height, False, phone) == []


def test_ill_conditioning_changes_no_output():
    model = build_model(DEMO_VARIANTS[0])
    model.load_state_dict(torch.load(DEMO / f"{DEMO_VARIANTS[0]}.pth", weights_only=True))
    harder = ill_conditioned(model)
    x = inputs(1)[0]
    with torch.no_grad():
        assert torch.equal(harder(x), model(x))
    assert not torch.equal(harder.backbone_model.layer1[0].bn1.weight, model.backbone_model.layer1[0].bn1.weight)


@pytest.mark.slow
def test_compiled_passes_agree_with_eager_ones(cache):
    images = CityscapesSplit(ensure_scenes(cache), "val", limit=6)
    batches = [normalize(torch.stack([images[i][0] for i in range(6)]))]
    model = build_model(DEMO_VARIANTS[0])
    model.load_state_dict(torch.load(DEMO / f"{DEMO_VARIANTS[0]}.pth", weights_only=True))
    eager = {"FP32": model, "INT8": lower(quantize.quantize(model, quantize.Recipe(), batches))}
    quick = make_fast(dict(eager), images.pixels(), 2, CPU, compile=True)
    passes = eager | {f"{name} compiled": run for name, run in quick.passes.items()}
    scores = sweep(passes, loader(images, 2, 0, CPU), CPU, quick.top_two)
    for name in eager:
        mious = [100 * mean_iou(scores.total(key)) for key in (name, f"{name} compiled")]
        assert abs(mious[0] - mious[1]) <= 0.01
        assert scores.agreements[name, f"{name} compiled"].sum() >= 0.999 * images.pixels()


@pytest.mark.slow
def test_equalization_saves_the_ill_conditioned_network(cache, tmp_path):
    """W8A8 loses points that cross-layer equalization brings back."""
    model = build_model(DEMO_VARIANTS[0])
    model.load_state_dict(torch.load(DEMO / f"{DEMO_VARIANTS[0]}.pth", weights_only=True))
    path = tmp_path / "ill_conditioned.pth"
    torch.save(ill_conditioned(model).state_dict(), path)

    drops = {}
    for option in ("--cle", "--no-cle"):
        passes = run(cache, "--checkpoint", str(path), option)["passes"]
        drops[option] = passes["FP32"]["miou"] - passes["INT8"]["miou"]
    assert drops["--no-cle"] >= 3
    assert abs(drops["--cle"]) <= 0.3
