"""The program as its users run it, on a tiny Cityscapes folder: the smoke test of CI."""

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
from datasets import cityscapes
from datasets.cityscapes import CityscapesSplit
from ffnet import QuantizationConfig
from ffnet.config import Runtime
from ffnet.evaluation import metrics
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.scores import FP32, INT8_ONNX_RUNTIME, INT8_SIMULATED, ONNX_FILE
from ffnet.labels import CLASSES, LABEL_IDS
from ffnet.model import remove_batch_norms
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import quantize
from ffnet.variants import DEMO_VARIANTS
from tests.helpers import checkpoint_forms
from tests.helpers.networks import PRE_DOWN, golden_model, golden_state, toy_model
from tests.helpers.program import SCRIPT, arguments, run_with_result


def matrix(result, backend):
    return np.array(result["backends"][backend]["confusion_matrix"])


def test_a_whole_run_gives_what_its_parts_give(tree, toy_checkpoint, capsys):
    out, saved = tree / "out", tree / "saved"
    result = run_with_result(arguments(tree, toy_checkpoint, "--limit", "3", "--save-predictions", saved), out)
    printed = capsys.readouterr().out

    assert list(result["backends"]) == [FP32, INT8_SIMULATED]
    assert result["images"] == result["calibration"]["images"] == 3
    check_metrics(result, expected_matrices(tree), printed)
    assert predicted_matrix(tree, saved / "INT8_simulated").tolist() == matrix(result, INT8_SIMULATED).tolist()
    assert len(list(csv.DictReader((out / "per_image.csv").open()))) == 3
    for stage in ("load checkpoint", "build QuantSim", "calibrate", "evaluate"):
        assert result["stage_seconds"][stage] > 0 and stage in printed


@pytest.mark.slow
def test_all_backends_and_files_come_from_one_run(tree, toy_checkpoint):
    out, export = tree / "out", tree / "export"
    options = ["--export", export, "--execute", "--sensitivity", "--sensitivity-images", "1"]
    result = run_with_result(arguments(tree, toy_checkpoint, *options), out)
    assert list(result["backends"]) == [FP32, INT8_SIMULATED, INT8_ONNX_RUNTIME]
    assert result["agreement"][f"{INT8_SIMULATED}|{INT8_ONNX_RUNTIME}"] > 99
    assert "25 of 25" in " ".join(result["notes"])
    assert sorted(path.name for path in out.iterdir()) == [
        "per_class.csv", "per_image.csv", "progress", "report.html", "result.json", "sensitivity.csv",
    ]  # fmt: skip
    assert json.loads((export / "manifest.json").read_text())["checkpoint_sha256"] == result["checkpoint"]["sha256"]


def check_metrics(result, expected, printed):
    for name in (FP32, INT8_SIMULATED):
        entry, counts = result["backends"][name], matrix(result, name)
        assert counts.tolist() == expected[name].tolist()
        assert entry["miou"] == pytest.approx(100 * metrics.mean_iou(counts), abs=1e-10)
        assert list(entry["iou"]) == list(CLASSES)
        assert f"{entry['miou']:.2f}" in printed
    # AIMET's own convolutions take their weights in another memory format than the lowered ones, and round differently.
    assert np.abs(counts - expected["AIMET"]).sum() / 2 <= 0.001 * counts.sum()


def expected_matrices(tree):
    """The same evaluation without the program: one image at a time, by argmax of the upsampled logits."""
    images = CityscapesSplit(tree, "val", limit=3)
    fp32 = toy_model()
    sim = quantize(fp32, images, QuantizationConfig(), Runtime(batch_size=2, progress=False))
    matrices = {}
    for name, model in {FP32: fp32, INT8_SIMULATED: lower(sim), "AIMET": sim.model}.items():
        model.to(memory_format=torch.channels_last)
        total = np.zeros((19, 19), np.int64)
        for image, labels in images:
            with torch.no_grad():
                logits = model(normalize(image[None])).contiguous()
            full = torch.nn.functional.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
            np.add.at(total, (labels[labels < 19], full.argmax(1)[0][labels < 19]), 1)
        matrices[name] = total
    return matrices


def predicted_matrix(tree, folder):
    """The confusion matrix of saved predictions, computed from the files alone."""
    lookup = {label_id: train_id for train_id, label_id in enumerate(LABEL_IDS.tolist())}
    counts = np.zeros((19, 19), np.int64)
    for path in folder.glob("*.png"):
        stem = path.name.removesuffix("_pred_labelIds.png")
        labels = imread(next(tree.glob(f"gtFine/val/*/{stem}_gtFine_labelIds.png")))
        pixels = np.isin(labels, LABEL_IDS)
        pairs = ([lookup[i] for i in labels[pixels].tolist()], [lookup[i] for i in imread(path)[pixels].tolist()])
        np.add.at(counts, pairs, 1)
    return counts


@pytest.fixture(scope="module")
def overflowing_checkpoint(toy_variant, tmp_path_factory):
    """Weights with biases beyond int32 at W8A16, and INT8 predictions that depend on the remedy.

    A constant of 60 is added before a ReLU; the next convolution's weights cancel it in pairs.
    """
    model = toy_model()
    _, norm, _, last = model.head.layers[3].last_layer
    with torch.no_grad():
        norm.bias += 60
        last.weight[:, 4:] = -last.weight[:, :4]
    path = tmp_path_factory.mktemp("overflow") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_int8_does_not_depend_on_the_files_that_are_written(tree, overflowing_checkpoint):
    """Biases that do not fit into int32 change the weight scales, whether or not a file is exported."""
    counts = []
    for number, options in enumerate(([], ["--export", tree / "export"], ["--execute"])):
        given = arguments(tree, overflowing_checkpoint, "--default-output-bw", "16", "--no-cle", *options)
        result = run_with_result(given, tree / f"out {number}")
        assert any("Weight scales were raised" in note for note in result["notes"])
        counts.append(matrix(result, INT8_SIMULATED).tolist())
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.slow
def test_the_calibration_set_is_reported(tree, toy_checkpoint, capsys):
    options = ["--calibration-split", "train", "--calibration-images", "2", "--no-cle"]
    result = run_with_result(arguments(tree, toy_checkpoint, *options), tree / "out")
    assert result["images"] == 4 and result["calibration"]["images"] == 2
    assert "2 images of the train split; none of them is scored" in capsys.readouterr().out
    assert result["options"]["cle"] is False


@pytest.mark.slow
def test_bit_widths_change_the_metrics(tree, toy_checkpoint):
    distances = []
    for bits in ("4", "16"):
        given = arguments(tree, toy_checkpoint, "--default-param-bw", bits, "--default-output-bw", bits)
        result = run_with_result(given, tree / bits)
        distances.append(np.abs(matrix(result, FP32) - matrix(result, INT8_SIMULATED)).sum())
    assert distances[0] > 20 * distances[1]


@pytest.mark.slow
def test_dataset_path_comes_from_the_environment(tree, toy_checkpoint, monkeypatch):
    monkeypatch.setenv("CITYSCAPES_DATASET", str(tree))
    given = arguments(tree, toy_checkpoint, "--limit", "1")
    del given[given.index("--dataset-path") : given.index("--dataset-path") + 2]
    assert run_with_result(given, tree / "out")["images"] == 1


@pytest.mark.slow
def test_a_missing_gpu_is_reported_unless_a_cpu_is_asked_for(tree, toy_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [word for word in arguments(tree, toy_checkpoint, "--limit", "1") if word not in ("--use-cuda", "false")]
    assert run_with_result(given, tree / "out")["device"].startswith("CPU")
    assert "No CUDA device found: running on the CPU." in capsys.readouterr().err
    run_with_result([*given, "--quiet"], tree / "quiet")
    assert capsys.readouterr().err == ""


def test_a_required_gpu_that_is_missing_is_an_error(tree, toy_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["--use-cuda"], ["--use-cuda", "yes"]):
        assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, *words)) == 2
        assert "--use-cuda: torch finds no CUDA device" in capsys.readouterr().err


def test_tf32_on_a_cpu_is_an_error(tree, toy_checkpoint, capsys):
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--allow-tf32")) == 2
    assert "--allow-tf32 has an effect on GPUs only" in capsys.readouterr().err


def test_more_calibration_images_than_there_are_is_an_error(tree, toy_checkpoint, capsys):
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--calibration-images", "99")) == 2
    assert "--calibration-images 99: the val split has only 4 images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_image_ends_the_run_with_one_line(tree, toy_checkpoint, capsys):
    path = sorted(tree.glob("leftImg8bit/val/*/*.png"))[2]
    path.write_bytes(path.read_bytes()[:3000])
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--num-workers", "1", "--quiet")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ffnet_quanteval.py: error: {path}: ") and error.count("\n") == 1


def test_a_lack_of_memory_ends_the_run_with_one_line_that_blames_no_file(tree, toy_checkpoint, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(cityscapes, "decode_image", fail)
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--num-workers", "2", "--quiet")) == 2
    error = capsys.readouterr().err
    assert "error: --batch-size 2 and --num-workers 2: the memory does not suffice" in error and error.count("\n") == 1


@pytest.mark.slow
def test_operating_system_files_are_counted_in_a_note_and_change_no_result(tree, toy_checkpoint):
    options = arguments(tree, toy_checkpoint, "--calibration-split", "train", "--calibration-images", "2")
    clean = run_with_result(options, tree / "clean")
    for folder in ("leftImg8bit", "leftImg8bit/val", "gtFine/val/aachen", "gtFine/train"):
        (tree / folder / ".DS_Store").touch()
    (tree / "out").mkdir()
    (tree / "out" / ".DS_Store").touch()
    littered = run_with_result(options, tree / "out")
    note = "4 hidden or operating-system files in the dataset folder were ignored."
    assert note in littered["notes"] and set(littered["notes"]) - {note} == set(clean["notes"])
    assert matrix(littered, INT8_SIMULATED).tolist() == matrix(clean, INT8_SIMULATED).tolist()


@pytest.mark.slow
def test_an_exported_file_scores_like_the_backend_that_it_came_from(tree, toy_checkpoint, capsys):
    export = tree / "export"
    first = run_with_result(arguments(tree, toy_checkpoint, "--export", export, "--execute"), tree / "first")
    for name, expected in (("model.onnx", INT8_ONNX_RUNTIME), ("model_fp32.onnx", FP32)):
        given = ["--onnx", export / name, "--dataset-path", tree, "--num-workers", "0"]
        result = run_with_result(given, tree / name)
        found, counts = matrix(result, ONNX_FILE), matrix(first, expected)
        assert np.abs(found - counts).sum() <= 0.001 * counts.sum()
        assert str(export / name) in capsys.readouterr().out and "opset 21" in " ".join(result["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_VARIANTS)
def test_exported_encodings_are_read_back(tree, name):
    path = tree / "weights.pth"
    torch.save(golden_model(name).state_dict(), path)
    given = arguments(tree, path, model=name)
    first = run_with_result([*given, "--export", tree / "export"], tree / "first")
    again = run_with_result([*given, "--encodings", tree / "export" / "model.encodings"], tree / "again")
    assert again["calibration"]["images"] == 0 and "model.encodings" in again["calibration"]["description"]
    assert matrix(again, INT8_SIMULATED).tolist() == matrix(first, INT8_SIMULATED).tolist()


@pytest.mark.slow
def test_quantizers_that_encodings_do_not_cover_are_calibrated_if_asked_for(tree, toy_checkpoint, toy_sim, capsys):
    toy_sim.save_encodings_to_json(str(tree), "encodings")
    path = tree / "encodings.json"
    content = json.loads(path.read_text())
    del content["activation_encodings"]["backbone_model.relu"]
    path.write_text(json.dumps(content))
    given = arguments(tree, toy_checkpoint, "--encodings", path)
    assert ffnet_quanteval.main(given) == 2
    assert "backbone_model.relu" in capsys.readouterr().err
    calibration = run_with_result([*given, "--partial-encodings"], tree / "out")["calibration"]
    assert calibration["images"] == 4 and "backbone_model.relu" in calibration["description"]


@pytest.mark.slow
def test_an_equalized_file_is_not_equalized_again(tree):
    model, folded = golden_model(PRE_DOWN), golden_model(PRE_DOWN)
    remove_batch_norms(folded).load_state_dict(checkpoint_forms.folded(model))
    path = tree / "equalized.pth"
    checkpoint_forms.save_pickled(checkpoint_forms.prepared(folded), path)
    given = arguments(tree, path, model=PRE_DOWN)
    results = [run_with_result([*given, option], tree / option) for option in ("--cle", "--no-cle")]
    assert results[0]["checkpoint"]["form"] == "equalized"
    assert any("equalization was not applied again" in note for note in results[0]["notes"])
    assert matrix(results[0], INT8_SIMULATED).tolist() == matrix(results[1], INT8_SIMULATED).tolist()


@pytest.mark.slow
def test_a_quiet_run_writes_nothing_to_stderr(tree):
    checkpoint = tree / "weights.pth"
    torch.save(golden_state(golden_model(DEMO_VARIANTS[0])), checkpoint)
    given = arguments(tree, checkpoint, "--quiet", "--limit", "1", model=DEMO_VARIANTS[0])
    run = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True, check=True)
    assert run.stderr == "" and "mIoU %" in run.stdout and "\x1b" not in run.stdout


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_loses_no_file(tree):
    checkpoint = tree / "weights.pth"
    torch.save(golden_state(golden_model(DEMO_VARIANTS[0])), checkpoint)
    options = ["--limit", "1", "--quiet", "--output-dir", tree / "out"]
    command = shlex.join([sys.executable, str(SCRIPT), *arguments(tree, checkpoint, *options, model=DEMO_VARIANTS[0])])
    run = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in run.stderr and (tree / "out" / "report.html").exists()


@pytest.mark.slow
def test_the_scores_are_reported_if_the_diagnostics_fail(tree, toy_checkpoint, capsys, monkeypatch):
    def broken(*_):
        raise MemoryError("no memory for images")

    monkeypatch.setattr("ffnet.run.pipeline.diagnose", broken)
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--output-dir", str(tree / "out"))) == 2
    printed = capsys.readouterr()
    assert "no memory for images" in printed.err
    assert "mIoU %" in printed.out and (tree / "out" / "result.json").exists()


@pytest.mark.slow
def test_a_disk_that_fills_with_predictions_costs_no_scores(tree, toy_checkpoint, capsys, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ffnet.run.scoring.write_atomically", full)
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--save-predictions", str(tree / "saved"))) == 2
    printed = capsys.readouterr()
    assert "_pred_labelIds.png: No space left on device" in printed.err and "mIoU %" in printed.out


@pytest.mark.slow
def test_folders_with_other_files_can_be_forced(tree, toy_checkpoint):
    options = []
    for option in ("--output-dir", "--save-predictions", "--export"):
        folder = tree / option.strip("-")
        folder.mkdir()
        (folder / "thesis.txt").touch()
        options += [option, folder]
    given = arguments(tree, toy_checkpoint, "--limit", "1", *options)
    assert ffnet_quanteval.main(given) == 2
    assert ffnet_quanteval.main([*given, "--force"]) == 0
    for folder in options[1::2]:
        assert (folder / "thesis.txt").exists() and len(list(folder.iterdir())) > 1


@pytest.mark.slow
def test_models_are_listed(capsys):
    assert ffnet_quanteval.main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 70  # heading, 66 models, an empty line and two lines on AI Hub's results
    (line,) = [line for line in lines if line.startswith("segmentation_ffnet40S_dBBB_mobile ")]
    assert "13.91 M" in line and "1024x2048" in line and "128x256" in line and "79.2" in line and "78.9" in line
