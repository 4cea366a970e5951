"""Several models in one run, one after the other: each gets what a run of its own gives, and errors come first."""

import contextlib
import csv
import io
import json

import pytest
import torch

import ffnet_quanteval
from ffnet.config import COMPARISON_FILES
from ffnet.run import networks, pipeline
from ffnet.variants import MODEL_GROUPS
from tests.helpers.networks import TOY
from tests.helpers.program import run_with_result
from tests.helpers.two_models import NAMES, SMOOTHED, counts, options_for, read

SAME = ("model", "dataset", "images", "notes", "published", "calibration", "agreement", "versions")  # of result.json


def options_with_folders(data, *more):
    folders = [word for name in ("output-dir", "export", "save-predictions") for word in (f"--{name}", data / name)]
    return options_for(data, *folders, *more)


@pytest.fixture(scope="module")
def together(data):
    """The output folder of a run of both models, which also exports and saves predictions, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert ffnet_quanteval.main(options_with_folders(data)) == 0
    return data / "output-dir", printed.getvalue()


@pytest.mark.slow
def test_each_model_has_the_results_of_a_run_of_its_own(data, together, tmp_path):
    out, _ = together
    alone = run_with_result(options_for(data, names=(SMOOTHED.name,)), tmp_path)
    of_both = read(out / SMOOTHED.name)
    assert list(of_both) == list(alone) and all(of_both[key] == alone[key] for key in SAME)
    assert of_both["options"]["model_name"] == SMOOTHED.name
    assert counts(tmp_path, (SMOOTHED.name,))[SMOOTHED.name] == counts(out)[SMOOTHED.name]
    for name in NAMES:
        assert json.loads((data / "export" / name / "manifest.json").read_text())["model"] == name
        assert len(list((data / "save-predictions" / name).glob("*/*.png"))) == 6


@pytest.mark.slow
def test_each_model_of_ai_hub_gets_images_of_its_own_size(data, tmp_path, monkeypatch, capsys):
    sizes = dict(zip(NAMES, ((64, 128), (32, 64)), strict=True))
    monkeypatch.setitem(MODEL_GROUPS, "ai-hub", NAMES)
    monkeypatch.setattr("ffnet.options.AI_HUB_INPUT_SIZES", sizes)
    out = tmp_path / "out"
    assert ffnet_quanteval.main(options_for(data, "--output-dir", str(out), names=("ai-hub",))) == 0
    assert "val, 64x128 and 32x64, " in capsys.readouterr().out
    for name, (height, width) in sizes.items():
        alone = run_with_result(options_for(data, "--input-size", f"{height}x{width}", names=(name,)), tmp_path / name)
        assert read(out / name)["options"]["input_size"] == f"{height}x{width}"
        assert read(out / name)["agreement"] == alone["agreement"]
        assert counts(tmp_path / name, (name,))[name] == counts(out)[name]


@pytest.mark.slow
def test_the_comparison_is_printed_and_written_with_links_to_the_reports(together):
    out, printed = together
    assert printed.startswith("Comparison of 2 models on 6 images of Cityscapes val, 64x128")
    assert "IoU % per class" not in printed and f"Written to {out}" in printed
    assert {path.name for path in out.iterdir()} == {*COMPARISON_FILES, *NAMES}
    page = (out / "report.html").read_text()
    rows = list(csv.DictReader((out / "comparison.csv").open(encoding="utf-8-sig")))
    for name, row in zip(NAMES, rows, strict=True):
        assert row["model"] == name and row["report"] == f"{name}/report.html"
        assert float(row["FP32 mIoU"]) == pytest.approx(read(out / name)["backends"]["FP32"]["miou"], abs=1e-4)
        assert f'href="./{name}/report.html"' in page and (out / name / "report.html").exists()


@pytest.mark.slow
def test_fail_under_covers_all_models(data, together, capsys):
    drops = {name: -read(together[0] / name)["backends"]["INT8 simulated"]["change"] for name in NAMES}
    (_, smaller), (high, larger) = sorted(drops.items(), key=lambda item: item[1])
    assert larger > 0 and larger > smaller
    for limit, failing in ((larger + 0.01, []), ((max(smaller, 0) + larger) / 2, [high])):
        options = options_with_folders(data, "--resume", "--fail-under", f"{limit:.4f}")
        assert ffnet_quanteval.main(options) == len(failing)
        lines = [line for line in capsys.readouterr().err.splitlines() if "--fail-under" in line]
        assert [line.split(": ")[1] for line in lines] == failing


@pytest.fixture
def damaged_weights(data, tmp_path, monkeypatch):
    """A folder in which no file of the models can be used; quantizing a model fails the test."""
    folder = tmp_path / "weights"
    folder.mkdir()
    state = torch.load(data / "weights" / f"{TOY.name}.pth", weights_only=True)
    state["backbone_model.layer1.0.bn1.running_var"].neg_()
    torch.save(state, folder / f"{TOY.name}.pth")
    content = (data / "weights" / f"{SMOOTHED.name}.pth").read_bytes()
    (folder / f"{SMOOTHED.name}.pth").write_bytes(content[:-500])
    monkeypatch.setattr(networks, "quantize", lambda *_: pytest.fail("a model was quantized"))
    return folder


def test_all_unusable_checkpoints_are_named_before_the_first_model_is_quantized(
    data, damaged_weights, capsys, monkeypatch
):
    paths = {name: damaged_weights / f"{name}.pth" for name in NAMES}  # published files are not searched for by content
    monkeypatch.setattr(pipeline, "find_checkpoints", lambda config: (paths, []))
    assert ffnet_quanteval.main(options_for(data)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{TOY.name}: {paths[TOY.name]}: with these weights some logits are infinite" in error
    assert f"{SMOOTHED.name}: {paths[SMOOTHED.name]}: this file is broken" in error


def test_an_unusable_file_of_a_folder_is_named_before_the_first_model_is_quantized(data, damaged_weights, capsys):
    assert ffnet_quanteval.main(options_for(data, weights=damaged_weights)) == 2
    assert SMOOTHED.name in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), ((KeyboardInterrupt(), 130), (None, 2)))
def test_an_end_at_the_second_model_leaves_the_results_and_the_comparison_of_the_first(
    data, tmp_path, capsys, monkeypatch, error, status
):
    """It ends by Ctrl-C, or by an error that names the second model."""
    original = pipeline.prepare

    def prepare(backends, images, run):
        prepared = original(backends, images, run)
        if run.config.model.name == SMOOTHED.name:
            assert read(tmp_path / "out" / TOY.name)
            if error:
                raise error
            prepared.backends["FP32"] = lambda batch: torch.full((1, 19, 8, 16), torch.nan)
        return prepared

    monkeypatch.setattr(pipeline, "prepare", prepare)
    assert ffnet_quanteval.main(options_for(data, "--output-dir", tmp_path / "out", "--limit", "2")) == status
    printed = capsys.readouterr()
    assert "Comparison of 1 model" in printed.out and "there are no results for 1 of 2 models" in printed.out
    assert (tmp_path / "out" / "comparison.csv").exists()
    if status == 2:
        assert f"error: {SMOOTHED.name}: FP32: the logits of this backend are not finite" in printed.err
