"""Several models in one run: each gets what a run of its own gives, images are decoded once, errors come first."""

import csv
import json

import pytest
import torch

import ffnet_quanteval
from datasets.cityscapes import CityscapesSplit
from ffnet.file_names import COMPARISON_FILES
from tests.helpers.networks import TOY
from tests.helpers.program import run_with_result
from tests.helpers.two_models import IMAGES, NAMES, SMOOTHED, counts, options_for

SAME = ("model", "dataset", "images", "notes", "published", "calibration", "agreement", "versions")  # of result.json


@pytest.fixture(scope="module")
def together(data):
    """The output folder of a run of both models."""
    assert ffnet_quanteval.main(options_for(data, "--output-dir", data / "together")) == 0
    return data / "together"


def read(folder):
    return json.loads((folder / "result.json").read_text())


def test_each_model_has_the_results_of_a_run_of_its_own(data, together, tmp_path):
    for name in NAMES:
        alone = run_with_result(options_for(data, names=(name,)), tmp_path / name)
        of_both = read(together / name)
        assert list(of_both) == list(alone) and all(of_both[key] == alone[key] for key in SAME)
        assert of_both["options"]["model_name"] == name and list(of_both["stage_seconds"]) == list(
            alone["stage_seconds"]
        )
        assert counts(tmp_path / name, (name,))[name] == counts(together)[name]


def test_the_comparison_is_printed_and_written_with_links_to_the_reports(data, tmp_path, capsys):
    assert ffnet_quanteval.main(options_for(data, "--output-dir", tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Comparison of 2 models on 6 images of Cityscapes val, 64x128")
    assert "IoU % per class" not in printed and f"Written to {tmp_path / 'out'}" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*COMPARISON_FILES, *NAMES}
    page = (tmp_path / "out" / "report.html").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    for name, row in zip(NAMES, rows, strict=True):
        assert row["model"] == name and row["report"] == f"{name}/report.html"
        assert float(row["FP32 mIoU"]) == pytest.approx(
            read(tmp_path / "out" / name)["backends"]["FP32"]["miou"], abs=1e-4
        )
        assert f'href="./{name}/report.html"' in page and (tmp_path / "out" / name / "report.html").exists()


@pytest.mark.parametrize(("at_once", "times"), ((2, 1), (1, 2)))
def test_models_that_are_in_memory_together_share_the_decoding_of_images(
    data, together, tmp_path, monkeypatch, at_once, times
):
    original, evaluated = CityscapesSplit.__getitem__, []
    monkeypatch.setattr("ffnet.run.scoring.Subset", counted_subset(evaluated))
    options = options_for(data, "--models-at-once", at_once, "--output-dir", tmp_path / "out")
    assert ffnet_quanteval.main(options) == 0 and CityscapesSplit.__getitem__ is original
    assert sorted(evaluated) == sorted(times * list(range(IMAGES)))
    assert counts(tmp_path / "out") == counts(together)


def counted_subset(indices_read):
    """A Subset that notes the indices of the images that are read."""

    class Counted(torch.utils.data.Subset):
        def __getitem__(self, position):
            indices_read.append(self.indices[position])
            return super().__getitem__(position)

        def __getitems__(self, positions):
            return [self[position] for position in positions]

    return Counted


@pytest.mark.parametrize("at_once", (1, 2))
def test_an_unfit_checkpoint_is_named_before_the_first_model_is_quantized(data, tmp_path, capsys, monkeypatch, at_once):
    (tmp_path / "weights").mkdir()
    for variant in (TOY, SMOOTHED):
        content = (data / "weights" / f"{variant.name}.pth").read_bytes()
        damaged = variant is SMOOTHED
        (tmp_path / "weights" / f"{variant.name}.pth").write_bytes(content[:-500] if damaged else content)
    monkeypatch.setattr("ffnet.run.pipeline.quantize", lambda *_: pytest.fail("a model was quantized"))
    options = options_for(data, "--models-at-once", at_once)
    options[options.index("--checkpoint") + 1] = str(tmp_path / "weights")
    assert ffnet_quanteval.main(options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert SMOOTHED.name in error and "--checkpoint" in error


@pytest.mark.parametrize("at_once", (1, 2))
def test_weights_without_finite_logits_are_named_before_the_first_model_is_quantized(
    data, tmp_path, capsys, monkeypatch, at_once
):
    (tmp_path / "weights").mkdir()
    for variant in (TOY, SMOOTHED):
        state = torch.load(data / "weights" / f"{variant.name}.pth", weights_only=True)
        if variant is SMOOTHED:
            state["backbone_model.layer1.0.bn1.running_var"].neg_()
        torch.save(state, tmp_path / "weights" / f"{variant.name}.pth")
    monkeypatch.setattr("ffnet.run.pipeline.quantize", lambda *_: pytest.fail("a model was quantized"))
    options = options_for(data, "--models-at-once", at_once)
    options[options.index("--checkpoint") + 1] = str(tmp_path / "weights")
    assert ffnet_quanteval.main(options) == 2
    assert f"{SMOOTHED.name}.pth: with these weights some logits are infinite" in capsys.readouterr().err


def test_all_unfit_checkpoints_of_published_files_are_named(data, tmp_path, capsys, monkeypatch):
    """Published files are not searched for by content, so they are loaded once before the work."""
    (tmp_path / "bad.pth").write_bytes(b"PK\3\4")
    paths = dict.fromkeys(NAMES, tmp_path / "bad.pth")
    monkeypatch.setattr("ffnet.run.pipeline.find_checkpoints", lambda config: (paths, []))
    monkeypatch.setattr("ffnet.run.pipeline.quantize", lambda *_: pytest.fail("a model was quantized"))
    assert ffnet_quanteval.main(options_for(data, "--models-at-once", "1")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(f"{name}: {tmp_path / 'bad.pth'}: this file is broken" in error for name in NAMES)


def test_fail_under_covers_all_models(data, together, tmp_path, capsys):
    drops = {}
    for name in NAMES:
        mious = {backend: entry["miou"] for backend, entry in read(together / name)["backends"].items()}
        drops[name] = mious["FP32"] - mious["INT8 simulated"]
    (low, smaller), (high, larger) = sorted(drops.items(), key=lambda item: item[1])
    assert larger > 0 and larger > smaller
    allowed = (max(smaller, 0) + larger) / 2
    for limit, failing in ((larger + 0.01, ()), (allowed, (high,))):
        assert ffnet_quanteval.main(options_for(data, "--fail-under", f"{limit:.4f}")) == int(bool(failing))
        lines = [line for line in capsys.readouterr().err.splitlines() if "--fail-under" in line]
        assert [line.split(": ")[1] for line in lines] == list(failing) and low not in failing


def test_what_is_there_is_compared_if_the_run_ends_early(data, tmp_path, capsys, monkeypatch):
    from ffnet.run import pipeline

    original = pipeline.quantize

    def quantize(run, *rest):
        if run.config.model.name == SMOOTHED.name:
            raise KeyboardInterrupt
        return original(run, *rest)

    monkeypatch.setattr(pipeline, "quantize", quantize)
    options = options_for(data, "--models-at-once", "1", "--output-dir", tmp_path / "out")
    assert ffnet_quanteval.main(options) == 130
    printed = capsys.readouterr().out
    assert "Comparison of 1 model" in printed and "there are no results of 1 of 2 models" in printed
    assert read(tmp_path / "out" / TOY.name) and (tmp_path / "out" / "comparison.csv").exists()


@pytest.mark.slow
def test_each_model_is_exported_to_a_folder_of_its_own(data, tmp_path):
    export, saved = tmp_path / "export", tmp_path / "saved"
    assert ffnet_quanteval.main(options_for(data, "--export", export, "--save-predictions", saved, "--limit", "1")) == 0
    for name in NAMES:
        assert json.loads((export / name / "manifest.json").read_text())["model"] == name
        assert len(list((saved / name).glob("*/*.png"))) == 1


def test_logits_that_are_not_finite_are_an_error_that_names_the_model(data, capsys, monkeypatch):
    from ffnet.run import scoring as scoring_stage

    original = scoring_stage.prepare

    def prepare(backends, images, run):
        prepared = original(backends, images, run)
        if run.config.model.name == SMOOTHED.name:
            prepared.backends["FP32"] = lambda batch: torch.full((1, 19, 8, 16), torch.nan)
        return prepared

    monkeypatch.setattr("ffnet.run.pipeline.prepare", prepare)
    assert ffnet_quanteval.main(options_for(data)) == 2
    assert f"error: {SMOOTHED.name}, FP32: this backend's logits are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), ((KeyboardInterrupt, 130), (OSError, 2)))
def test_an_end_before_the_first_result_is_written_is_no_crash(data, tmp_path, capsys, monkeypatch, error, status):
    def stop(*_):
        raise error

    monkeypatch.setattr("ffnet.report.delivery.deliver_result", stop)
    assert ffnet_quanteval.main(options_for(data, "--output-dir", tmp_path / "out")) == status
    assert "Comparison" not in capsys.readouterr().out


def test_a_note_on_the_end_that_cannot_be_written_is_an_error_of_its_model(data, tmp_path, capsys, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("ffnet.report.delivery.mark_finished", full)
    assert ffnet_quanteval.main(options_for(data, "--output-dir", tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert all(f"error: {name}: --output-dir {tmp_path / 'out' / name}: the results" in captured.err for name in NAMES)
    assert "Comparison of 2 models" in captured.out
