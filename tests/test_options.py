"""What the options beyond a plain run do, seen from outside."""

import csv
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from skimage.io import imread

import ffnet_quanteval
from datasets.cityscapes import LABEL_IDS
from ffnet import build_model, quantize
from ffnet.model import fold_batch_norms_away
from ffnet.variants import DEMO_VARIANTS
from tests import forms
from tests.test_main import MODEL, SCRIPT, arguments
from tests.test_model import golden_state


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(golden_state(build_model(MODEL)), path)
    return path


def fails(capsys, *given):
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main(list(given))
    assert status.value.code == 2
    return capsys.readouterr().err


def test_three_passes_files_and_reasons(tree, checkpoint, capsys):
    out, export, saved = tree / "out", tree / "export", tree / "saved"
    options = ["--output-dir", out, "--export", export, "--execute", "--save-predictions", saved, "--sensitivity"]
    result = ffnet_quanteval.main(arguments(tree, checkpoint, "--sensitivity-images", "1", *map(str, options)))
    printed = capsys.readouterr().out

    assert list(result["passes"]) == ["FP32", "INT8", "INT8 executed"]
    assert set(result["agreement"]) == {"FP32|INT8", "FP32|INT8 executed", "INT8|INT8 executed"}
    assert result["agreement"]["INT8|INT8 executed"] > 99
    assert "31 of 31 convolutions" in " ".join(result["notes"]) and "costliest quantizers" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "per_class.csv", "per_image.csv", "report.html", "result.json", "sensitivity.csv",
    ]  # fmt: skip
    manifest = json.loads((export / "manifest.json").read_text())
    assert result["checkpoint_sha256"] in json.dumps(manifest)
    rows = list(csv.DictReader((out / "per_image.csv").open()))
    assert len(rows) == 4

    matrix = np.zeros((19, 19), np.int64)
    for path in saved.glob("INT8/*.png"):
        stem = path.name.removesuffix("_pred_labelIds.png")
        labels = imread(next(tree.glob(f"gtFine/val/*/{stem}_gtFine_labelIds.png")))
        pixels = np.isin(labels, LABEL_IDS)
        lookup = {label_id: train_id for train_id, label_id in enumerate(LABEL_IDS.tolist())}
        pairs = ([lookup[i] for i in labels[pixels].tolist()], [lookup[i] for i in imread(path)[pixels].tolist()])
        np.add.at(matrix, pairs, 1)
    assert matrix.tolist() == result["passes"]["INT8"]["confusion_matrix"]


@pytest.mark.slow
def test_an_exported_file_is_scored_like_the_pass_that_it_came_from(tree, checkpoint, capsys):
    export = tree / "export"
    first = ffnet_quanteval.main(arguments(tree, checkpoint, "--export", str(export), "--execute"))
    for name, expected in (("model.onnx", "INT8 executed"), ("model_fp32.onnx", "FP32")):
        path = export / name
        result = ffnet_quanteval.main(["--onnx", str(path), "--dataset-path", str(tree), "--num-workers", "0"])
        found, of_first = (
            np.array(r["confusion_matrix"]) for r in (result["passes"]["ONNX"], first["passes"][expected])
        )
        assert np.abs(found - of_first).sum() <= 0.001 * of_first.sum()
        assert str(path) in capsys.readouterr().out and "opset 21" in " ".join(result["notes"])


@pytest.mark.slow
def test_execution_needs_no_export_that_is_kept(tree, checkpoint):
    result = ffnet_quanteval.main(arguments(tree, checkpoint, "--execute", "--limit", "1"))
    assert "INT8 executed" in result["passes"] and "of 31 convolutions" in " ".join(result["notes"])


@pytest.mark.slow
def test_encodings_take_the_place_of_calibration(tree, checkpoint, capsys):
    from tests.test_quantize import inputs, network

    sim = quantize.quantize(network(MODEL), quantize.Recipe(), inputs())
    sim.save_encodings_to_json(str(tree), "encodings")
    path = tree / "encodings.json"
    result = ffnet_quanteval.main(arguments(tree, checkpoint, "--encodings", str(path)))
    assert result["calibration_images"] == 0 and str(path) in result["calibration"]

    content = json.loads(path.read_text())
    del content["activation_encodings"]["backbone_model.relu"]
    path.write_text(json.dumps(content))
    assert "backbone_model.relu" in fails(capsys, *arguments(tree, checkpoint, "--encodings", str(path)))
    result = ffnet_quanteval.main(arguments(tree, checkpoint, "--encodings", str(path), "--partial-encodings"))
    assert result["calibration_images"] == 4 and "backbone_model.relu" in result["calibration"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_VARIANTS)
def test_exported_encodings_are_read_back(tree, name):
    path = tree / "net.pth"
    torch.save(golden_state(build_model(name)), path)
    given = [name if word == MODEL else word for word in arguments(tree, path)]
    first = ffnet_quanteval.main([*given, "--export", str(tree / "export")])
    again = ffnet_quanteval.main([*given, "--encodings", str(tree / "export" / "model.encodings")])
    assert again["passes"]["INT8"]["confusion_matrix"] == first["passes"]["INT8"]["confusion_matrix"]


@pytest.mark.parametrize(
    ("int8", "allowed", "status"), ((79.0, "1.5", 0), (79.0, "1", 0), (79.0, "0.9", 1), (81.0, "0", 0), (None, "5", 1))
)
def test_a_drop_beyond_the_allowed_fails_with_status_1(tree, capsys, monkeypatch, int8, allowed, status):
    result = {"passes": {"FP32": {"miou": 80.0}, "INT8": {"miou": int8}}}
    monkeypatch.setattr(ffnet_quanteval, "quantize_and_score", lambda args: result)
    given = ["--dataset-path", str(tree), "--fail-under", allowed]
    if not status:
        assert ffnet_quanteval.main(given) is result
        return
    with pytest.raises(SystemExit) as ended:
        ffnet_quanteval.main(given)
    assert ended.value.code == status and "--fail-under" in capsys.readouterr().err


@pytest.mark.slow
def test_quiet_says_nothing_on_stderr(tree, checkpoint):
    given = arguments(tree, checkpoint, "--quiet", "--limit", "1")
    run = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True, check=True)
    assert run.stderr == "" and "mIoU %" in run.stdout and "\x1b" not in run.stdout


@pytest.mark.slow
def test_folders_with_other_files_are_refused_unless_forced(tree, checkpoint, capsys):
    for option in ("--output-dir", "--save-predictions", "--export"):
        folder = tree / option.strip("-")
        folder.mkdir()
        (folder / "thesis.txt").touch()
        given = arguments(tree, checkpoint, "--limit", "1", option, str(folder))
        error = fails(capsys, *given)
        assert str(folder) in error and "thesis.txt" in error and "--force" in error
        ffnet_quanteval.main([*given, "--force"])
        assert (folder / "thesis.txt").exists() and len(list(folder.iterdir())) > 1


def test_results_are_on_stdout_where_they_cannot_be_written(tree, checkpoint, capsys, monkeypatch):
    from ffnet import report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_all", full)
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main(arguments(tree, checkpoint, "--output-dir", str(tree / "out")))
    printed = capsys.readouterr()
    assert status.value.code == 2 and "No space left" in printed.err
    assert json.loads(printed.out.strip().splitlines()[-1])["passes"]["INT8"]["miou"] >= 0


@pytest.mark.slow
def test_a_disk_that_fills_with_predictions_costs_no_figures(tree, checkpoint, capsys, monkeypatch):
    from ffnet import predictions

    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(predictions, "write_whole", full)
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main(arguments(tree, checkpoint, "--save-predictions", str(tree / "saved")))
    printed = capsys.readouterr()
    assert status.value.code == 2 and "_pred_labelIds.png: No space left on device" in printed.err
    assert "mIoU %" in printed.out


def test_figures_are_reported_even_if_explaining_them_fails(tree, checkpoint, capsys, monkeypatch):
    def broken(*_):
        raise MemoryError("no room for pictures")

    monkeypatch.setattr(ffnet_quanteval, "explain", broken)
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main(arguments(tree, checkpoint, "--output-dir", str(tree / "out")))
    printed = capsys.readouterr()
    assert status.value.code == 2 and "no room for pictures" in printed.err
    assert "mIoU %" in printed.out and (tree / "out" / "result.json").exists()


@pytest.mark.slow
def test_a_reader_who_leaves_loses_no_file(tree, checkpoint):
    given = arguments(tree, checkpoint, "--limit", "1", "--quiet", "--output-dir", str(tree / "out"))
    command = " ".join(map(shlex.quote, [sys.executable, str(SCRIPT), *given]))
    run = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in run.stderr and (tree / "out" / "report.html").exists()


def test_models_are_listed(capsys):
    ffnet_quanteval.main(["--list-models"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 67
    (line,) = [line for line in lines if line.startswith("segmentation_ffnet40S_dBBB_mobile ")]
    assert "13.91 M" in line and "1024x2048" in line and "128x256" in line and "79.2" in line and "78.9" in line


MISTAKES = {
    "--onnx weights.pth --model-name segmentation_ffnet14T_dBBB_mobile": "leave out --model-name",
    "--onnx nothing.onnx": "nothing.onnx: no such file",
    "--encodings nothing.json": "nothing.json: no such file",
    "--partial-encodings": "--encodings",
    "--fail-under -1": "0 to 100",
    "--fail-under x": "0 to 100",
    "--export out --default-param-bw 5": "5 bits",
    "--export out --output-dir out/in": "--output-dir",
    "--output-dir same --save-predictions same": "name one beside it",
    "--onnx weights.pth --fail-under 0": "leave out --fail-under",
    "--onnx weights.pth --no-cle": "leave out --cle",
    "--onnx weights.pth --use-cuda": "leave out --use-cuda",
    "--encodings weights.pth --quant-scheme tf": "--quant-scheme: --encodings say it",
    "--encodings weights.pth --calibration-split train": "--calibration-split: --encodings say it",
    "--encodings weights.pth --default-param-bw 4": "--default-param-bw: --encodings say it",
    "--use-cuda false --allow-tf32": "--allow-tf32 is for GPUs",
    "--worst 3": "--output-dir",
    "--sensitivity-images 2": "--sensitivity",
    "--output-dir=": "is empty",
    "--batch-size 99999999999999999999": "1 to 4096",
    "--num-workers 100000": "0 to 256",
    "--worst -1": "at least 0",
    "--sensitivity-images 0": "at least 1",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_by_name(tree, capsys, mistake):
    (tree / "weights.pth").touch()
    given = [str(tree / word) if word == "weights.pth" else word for word in mistake.split()]
    assert MISTAKES[mistake] in fails(capsys, "--dataset-path", str(tree), *given)


@pytest.mark.slow
def test_an_equalized_file_is_not_equalized_again(tree):
    """With --cle and --no-cle the same comes out, and the report says why."""
    name = "segmentation_ffnet14T_BCC_mobile_pre_down"
    model = build_model(name)
    model.load_state_dict(golden_state(model))
    folded = build_model(name)
    fold_batch_norms_away(folded).load_state_dict(forms.folded(model))
    path = tree / "equalized.pth"
    forms.save_pickled(forms.prepared(folded), path)
    given = ["--model-name", name, "--dataset-path", str(tree), "--checkpoint", str(path), "--use-cuda", "false"]
    results = [ffnet_quanteval.main([*given, "--num-workers", "0", option]) for option in ("--cle", "--no-cle")]
    assert results[0]["checkpoint_form"] == "equalized"
    assert any("CLE was not applied again" in note for note in results[0]["notes"])
    assert results[0]["passes"]["INT8"]["confusion_matrix"] == results[1]["passes"]["INT8"]["confusion_matrix"]
