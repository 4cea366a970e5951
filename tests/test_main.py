"""The program as its users run it, on a tiny Cityscapes folder: the smoke test of CI."""

import copy
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.quantsim import QuantizationSimModel
from skimage.io import imread

import ffnet_quanteval
from datasets import split
from ffnet.evaluation.scores import FP32, ONNX_FILE, ONNX_RUNTIME, SIMULATED, BackendNames
from ffnet.labels import CITYSCAPES
from ffnet.model import FFNet, remove_batch_norms
from ffnet.quantization.quantsim import quiet_aimet
from tests.helpers import checkpoint_forms
from tests.helpers.names import INT8_ONNX_RUNTIME, INT8_SIMULATED
from tests.helpers.networks import DEMO, TOY, demo_checkpoint, golden_state, toy_model
from tests.helpers.official_evaluation import official_evaluation
from tests.helpers.program import SCRIPT, arguments, run_with_result, start_fork
from tests.helpers.two_models import SMOOTHED

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
UNUSUAL = ("--default-param-bw", "4", "--default-output-bw", "16", "--quant-scheme", "tf", "--no-cle")


def matrix(result, backend):
    return np.array(result["backends"][BackendNames(result["precision"]).of(backend)]["confusion_matrix"])


def test_a_whole_run_gives_what_torch_aimet_and_the_official_evaluation_give(tree, toy_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, saved = tree / "out", tree / "saved"
    options = arguments(tree, toy_checkpoint, "--save-predictions", saved, "--default-param-bw", "4")
    position = options.index("--use-cuda")
    del options[position : position + 2]
    result = run_with_result(options, out)
    printed = capsys.readouterr()
    assert "\nDevice: CPU" in printed.err and result["device"].startswith("CPU")
    assert list(result["backends"]) == [FP32, "W4A8 simulated"] and result["calibration"]["images"] == 4
    check_matrices(result, tree, default_param_bw=4)
    official = official_evaluation(tree, saved / "simulated")
    w4a8 = result["backends"]["W4A8 simulated"]
    assert w4a8["miou"] == pytest.approx(100 * official["averageScoreClasses"], abs=1e-10)
    assert w4a8["iou"] == pytest.approx(
        {name: 100 * official["classScores"][name] for name in CITYSCAPES.names}, abs=1e-10
    )
    assert f"{w4a8['miou']:.2f}" in printed.out and "INT8 simulated" not in printed.out
    layers = result["layers"]
    assert layers["images"] == sorted(layers["images"]) and len(layers["images"]) == 2
    assert all(0 < row["sqnr"]["W4A8 simulated"]["total"] < 60 for row in layers["rows"])
    labels = matrix(result, FP32).sum(1).tolist()
    assert [each["labelled_pixels"] for each in result["classes"].values()] == labels and result["schema"] == 4
    assert w4a8["change"] == pytest.approx(w4a8["miou"] - result["backends"][FP32]["miou"])
    assert len(list(csv.DictReader((out / "per_image.csv").open(encoding="utf-8-sig")))) == 4
    for stage in ("load checkpoint", "build QuantSim", "calibrate", "evaluate"):
        assert result["stage_seconds"][stage] > 0


@pytest.mark.slow
def test_other_quantization_configs_give_what_aimet_gives(tree, toy_checkpoint):
    result = run_with_result(arguments(tree, toy_checkpoint, *UNUSUAL), tree / "out")
    assert list(result["backends"]) == [FP32, "W4A16 simulated"]
    check_matrices(result, tree, quant_scheme="tf", default_param_bw=4, default_output_bw=16)
    assert result["options"]["cle"] is False


def check_matrices(result, tree, **quantization):
    """Compare confusion matrices with those of torch and AIMET, which use neither the program's loop nor its metrics.

    AIMET's convolutions take their weights in another memory format than the lowered ones, and round differently. With
    4-bit weights, the difference is small beside that to FP32.
    """
    pairs = read_pairs(tree)
    fp32 = toy_model().to(memory_format=torch.channels_last)
    expected = confusion_matrix(fp32, pairs)
    assert matrix(result, FP32).tolist() == expected.tolist()
    counts = matrix(result, SIMULATED)
    by_aimet = confusion_matrix(aimets_simulation(pairs, **quantization), pairs)
    assert np.abs(counts - by_aimet).sum() / 2 <= 0.001 * counts.sum()
    assert np.abs(counts - expected).sum() > 10 * np.abs(counts - by_aimet).sum()


def read_pairs(tree):
    """Return the normalized images (1, 3, H, W) and the train ids (H, W) of the val split, read with scikit-image."""
    lookup = np.full(256, 255, np.uint8)
    lookup[CITYSCAPES.label_ids] = range(19)
    pairs = []
    for path in sorted(tree.glob("gtFine/val/*/*.png")):
        image = tree / "leftImg8bit" / "val" / path.parent.name / path.name.replace("gtFine_labelIds", "leftImg8bit")
        pixels = torch.from_numpy(imread(image)).permute(2, 0, 1)[None]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        normalized = (pixels.float() / 255 - mean) / std
        pairs.append((normalized.contiguous(memory_format=torch.channels_last), torch.from_numpy(lookup[imread(path)])))
    return pairs


def aimets_simulation(pairs, default_param_bw=8, default_output_bw=8, quant_scheme="tf_enhanced"):
    """Return AIMET's simulation of the toy network, calibrated on batches of two images, without the program."""
    dummy = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with quiet_aimet(), torch.no_grad():
        prepared = prepare_model(copy.deepcopy(toy_model()))
        if quant_scheme == "tf":
            fold_all_batch_norms(prepared, (1, 3, 64, 64), dummy_input=dummy)
        else:
            equalize_model(prepared, dummy_input=dummy)
        bits = {"default_param_bw": default_param_bw, "default_output_bw": default_output_bw}
        sim = QuantizationSimModel(prepared, dummy, quant_scheme, config_file="default", **bits)
        batches = [torch.cat([image for image, _ in pairs[start : start + 2]]) for start in (0, 2)]
        sim.compute_encodings(lambda model: [model(batch) for batch in batches])
    return sim.model


def confusion_matrix(model, pairs):
    """Return the counts (19, 19) of labels and of the argmax of upsampled logits, one image at a time."""
    counts = np.zeros((19, 19), np.int64)
    for image, labels in pairs:
        with torch.no_grad():
            logits = model(image).as_subclass(torch.Tensor).contiguous()
        full = torch.nn.functional.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
        np.add.at(counts, (labels[labels < 19], full.argmax(1)[0][labels < 19]), 1)
    return counts


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """A run with all backends and files, written into folders that hold other files: its folder and result.json."""
    root = tmp_path_factory.mktemp("exported")
    options = ["--execute", "--sensitivity", "--sensitivity-images", "1", "--force"]
    for name in ("out", "export", "saved"):
        (root / name).mkdir()
        (root / name / "thesis.txt").touch()
    options += ["--export", root / "export", "--save-predictions", root / "saved"]
    return root, run_with_result(arguments(data, toy_weights(data), *options), root / "out")


def toy_weights(data):
    return data / "weights" / f"{TOY.name}.pth"


@pytest.mark.slow
def test_all_backends_and_files_come_from_one_run(exported):
    root, result = exported
    assert list(result["backends"]) == [FP32, INT8_SIMULATED, INT8_ONNX_RUNTIME]
    assert result["agreement"][f"{INT8_SIMULATED}|{INT8_ONNX_RUNTIME}"] > 99
    assert "25 of 25" in " ".join(result["notes"])
    assert sorted(path.name for path in (root / "out").iterdir()) == [
        "layers.csv", "per_class.csv", "per_image.csv", "progress", "report.html", "result.json", "sensitivity.csv",
        "thesis.txt",
    ]  # fmt: skip
    manifest = json.loads((root / "export" / "manifest.json").read_text())
    assert manifest["checkpoint_sha256"] == result["checkpoint"]["sha256"]
    assert (root / "export" / "thesis.txt").exists() and len(list((root / "saved").glob("*/*.png"))) == 6


@pytest.mark.slow
def test_an_exported_file_scores_like_the_backend_that_it_came_from(data, exported, tmp_path, capsys):
    root, first = exported
    for name, expected in (("model.onnx", ONNX_RUNTIME), ("model_fp32.onnx", FP32)):
        given = ["--onnx", root / "export" / name, "--dataset-path", data, "--num-workers", "0"]
        result = run_with_result(given, tmp_path / name)
        counts = matrix(first, expected)
        assert np.abs(matrix(result, ONNX_FILE) - counts).sum() <= 0.001 * counts.sum()
        assert str(root / "export" / name) in capsys.readouterr().out and "opset 21" in " ".join(result["notes"])


@pytest.mark.slow
def test_exported_encodings_are_read_back_and_completed_if_asked_for(data, exported, tmp_path, capsys):
    root, first = exported
    whole, partial = root / "export" / "model.encodings", tmp_path / "partial.encodings"
    given = arguments(data, toy_weights(data))
    again = run_with_result([*given, "--encodings", whole], tmp_path / "again")
    assert again["calibration"]["images"] == 0 and "model.encodings" in again["calibration"]["description"]
    assert matrix(again, SIMULATED).tolist() == matrix(first, SIMULATED).tolist()

    content = json.loads(whole.read_text())
    content["activation_encodings"].pop(3)
    partial.write_text(json.dumps(content))
    assert ffnet_quanteval.main([*given, "--encodings", str(partial)]) == 2
    error = capsys.readouterr().err
    assert str(partial) in error and "--partial-encodings" in error
    completed = run_with_result([*given, "--encodings", partial, "--partial-encodings"], tmp_path / "completed")
    assert completed["calibration"]["images"] == 6
    assert "Quantizers that the file does not cover (1)" in completed["calibration"]["description"]


@pytest.mark.slow
def test_int8_does_not_depend_on_the_files_that_are_written(tree, tmp_path):
    """Biases beyond int32 change the weight scales, whether or not a file is exported.

    A constant of 60 is added before a ReLU; the next convolution's weights cancel it in pairs.
    """
    model = toy_model()
    _, norm, _, last = model.head.layers[3].last_layer
    with torch.no_grad():
        norm.bias += 60
        last.weight[:, 4:] = -last.weight[:, :4]
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    counts = []
    for options in ([], ["--export", tmp_path / "export", "--execute"]):
        given = arguments(tree, tmp_path / "weights.pth", "--default-output-bw", "16", "--no-cle", *options)
        result = run_with_result(given, tmp_path / f"out {len(options)}")
        assert any("Weight scales were raised" in note for note in result["notes"])
        counts.append(matrix(result, SIMULATED).tolist())
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_operating_system_files_are_counted_in_a_note_and_change_no_result(tree, toy_checkpoint, capsys):
    options = arguments(tree, toy_checkpoint, "--calibration-split", "train", "--calibration-images", "2")
    clean = run_with_result(options, tree / "clean")
    assert clean["images"] == 4 and clean["calibration"]["images"] == 2
    assert "2 images of the train split; none of them is scored" in capsys.readouterr().out
    for folder in ("leftImg8bit", "leftImg8bit/val", "gtFine/val/aachen", "gtFine/train"):
        (tree / folder / ".DS_Store").touch()
    (tree / "out").mkdir()
    (tree / "out" / ".DS_Store").touch()
    littered = run_with_result(options, tree / "out")
    note = "4 hidden or operating-system files in the dataset folder were ignored."
    assert note in littered["notes"] and set(littered["notes"]) - {note} == set(clean["notes"])
    assert matrix(littered, SIMULATED).tolist() == matrix(clean, SIMULATED).tolist()


@pytest.mark.slow
def test_an_equalized_file_is_not_equalized_again(tree, two_models):
    model, folded = (FFNet(SMOOTHED).eval() for _ in range(2))
    model.load_state_dict(golden_state(model))
    remove_batch_norms(folded).load_state_dict(checkpoint_forms.folded(model))
    checkpoint_forms.save_pickled(checkpoint_forms.prepared(folded), tree / "equalized.pth")
    given = arguments(tree, tree / "equalized.pth", model=SMOOTHED.name)
    results = [run_with_result([*given, option], tree / option) for option in ("--cle", "--no-cle")]
    assert results[0]["checkpoint"]["form"] == "equalized"
    assert any("equalization was not applied again" in note for note in results[0]["notes"])
    assert matrix(results[0], SIMULATED).tolist() == matrix(results[1], SIMULATED).tolist()


def test_a_broken_image_ends_the_run_with_one_line(tree, toy_checkpoint, capsys):
    path = sorted(tree.glob("leftImg8bit/val/*/*.png"))[2]
    path.write_bytes(path.read_bytes()[:3000])
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--num-workers", "1", "--quiet")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ffnet_quanteval.py: error: {path}: ") and error.count("\n") == 1


def test_names_in_a_file_do_not_control_the_terminal(tree, toy_checkpoint, tmp_path, capsys):
    scale = {"scale": 1.0, "offset": -128, "bitwidth": 8, "is_symmetric": "True"}
    (tmp_path / "given.json").write_text(json.dumps({"param_encodings": {"a\n\x1b[2J.weight": scale}}))
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--encodings", tmp_path / "given.json")) == 2
    assert (
        "no entry matches this network; the entries are a\\n\\x1b[2J.weight" in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_lack_of_memory_ends_the_run_with_one_line_that_blames_no_file(tree, toy_checkpoint, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(split, "decode", fail)
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--num-workers", "2", "--quiet")) == 2
    error = capsys.readouterr().err
    assert "error: --batch-size 2 and --num-workers 2: the memory does not suffice" in error and error.count("\n") == 1


def test_the_scores_are_reported_if_the_diagnostics_fail(tree, toy_checkpoint, capsys, monkeypatch):
    def broken(*_):
        raise MemoryError("no memory for images")

    monkeypatch.setattr("ffnet.run.pipeline.compare_images", broken)
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--output-dir", tree / "out")) == 2
    printed = capsys.readouterr()
    assert "error: The scores are reported, but the diagnostics failed: no memory for images" in printed.err
    assert "mIoU %" in printed.out and (tree / "out" / "result.json").exists()


@pytest.mark.slow
def test_a_quiet_run_of_the_script_writes_nothing_to_stderr(tree):
    given = arguments(tree, demo_checkpoint(DEMO), "--quiet", "--limit", "1", model=DEMO)
    run = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True, check=True)
    assert run.stderr == "" and "mIoU %" in run.stdout and "\x1b" not in run.stdout


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_loses_no_file(tree, toy_checkpoint):
    reading, writing = os.pipe()
    os.close(reading)

    def run():
        sys.stdout = os.fdopen(writing, "w")
        return ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--output-dir", tree / "out"))

    _, status = os.waitpid(start_fork(run, tree / "log"), 0)
    os.close(writing)
    assert "Traceback" not in (tree / "log").read_text()
    assert os.waitstatus_to_exitcode(status) in (0, 2) and (tree / "out" / "report.html").exists()


def test_models_are_listed(capsys):
    assert ffnet_quanteval.main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("segmentation_ffnet40S_dBBB_mobile ")]
    assert "13.91 M" in line and "1024x2048" in line and "128x256" in line and "79.2" in line and "78.9" in line
