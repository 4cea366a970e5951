"""The program as its users run it, on a tiny Cityscapes tree: the smoke test of CI."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ffnet_quanteval
from datasets.cityscapes import CLASSES, CityscapesSplit
from ffnet import build_model, evaluate, metrics, quantize
from ffnet.lower import lower
from tests.test_model import golden_state

MODEL = "segmentation_ffnet14T_dBBB_mobile"
SCRIPT = Path(ffnet_quanteval.__file__)


@pytest.fixture
def checkpoint(tmp_path):
    """A state_dict of golden weights, in FFNet's own form."""
    path = tmp_path / "weights.pth"
    torch.save(golden_state(build_model(MODEL)), path)
    return path


def arguments(tree, checkpoint, *more):
    return ["--model-name", MODEL, "--dataset-path", str(tree), "--checkpoint", str(checkpoint),
            "--use-cuda", "false", "--batch-size", "2", "--num-workers", "0", *more]  # fmt: skip


def test_a_whole_run_is_what_its_parts_give(tree, checkpoint, capsys):
    out = tree / "out"
    result = ffnet_quanteval.main(arguments(tree, checkpoint, "--limit", "3", "--output-dir", str(out)))
    printed = capsys.readouterr().out

    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["images"] == 3 and result["calibration_images"] == 3
    expected = expected_matrices(tree, checkpoint)
    for name in ("FP32", "INT8"):
        entry = result["passes"][name]
        matrix = np.array(entry["confusion_matrix"])
        assert matrix.tolist() == expected[name].tolist()
        assert entry["miou"] == pytest.approx(100 * metrics.mean_iou(matrix), abs=1e-10)
        assert list(entry["iou"]) == list(CLASSES)
        assert f"{entry['miou']:.2f}" in printed
    # AIMET's own convolutions take their weights in another memory format than the lowered ones, and round otherwise.
    assert np.abs(matrix - expected["AIMET"]).sum() / 2 <= 0.001 * matrix.sum()
    for stage in ("load", "equalize and simulate", "calibrate", "evaluate"):
        assert result["times"][stage] > 0 and stage in printed


def expected_matrices(tree, checkpoint):
    """The same evaluation without the program: one image at a time, by argmax of the upsampled logits."""
    images = CityscapesSplit(tree, "val", limit=3)
    fp32 = build_model(MODEL)
    fp32.load_state_dict(torch.load(checkpoint, weights_only=True))
    batches = evaluate.calibration_inputs(evaluate.loader(images, 2, 0, torch.device("cpu")), torch.device("cpu"))
    sim = quantize.quantize(fp32, quantize.Recipe(), batches)
    matrices = {}
    for name, model in {"FP32": fp32, "INT8": lower(sim), "AIMET": sim.model}.items():
        model.to(memory_format=torch.channels_last)
        total = np.zeros((19, 19), np.int64)
        for image, labels in images:
            with torch.no_grad():
                logits = model(evaluate.normalize(image[None])).contiguous()
            full = torch.nn.functional.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
            np.add.at(total, (labels[labels < 19], full.argmax(1)[0][labels < 19]), 1)
        matrices[name] = total
    return matrices


def test_calibration_set_and_protocol_are_said(tree, checkpoint, capsys):
    clean = ["--calibration-split", "train", "--calibration-images", "2", "--no-cle"]
    result = ffnet_quanteval.main(arguments(tree, checkpoint, *clean))
    assert result["images"] == 4 and result["calibration_images"] == 2
    assert "2 images of the train split, none of them scored" in capsys.readouterr().out
    assert result["arguments"]["cle"] is False


@pytest.mark.slow
def test_bit_widths_change_the_figures(tree, checkpoint):
    coarse = ffnet_quanteval.main(arguments(tree, checkpoint, "--default-param-bw", "4", "--default-output-bw", "4"))
    fine = ffnet_quanteval.main(arguments(tree, checkpoint, "--default-param-bw", "16", "--default-output-bw", "16"))
    distances = [
        np.abs(np.subtract(*(result["passes"][name]["confusion_matrix"] for name in ("FP32", "INT8")))).sum()
        for result in (coarse, fine)
    ]
    assert distances[0] > 20 * distances[1]


def test_dataset_path_comes_from_the_environment(tree, checkpoint, monkeypatch):
    monkeypatch.setenv("CITYSCAPES_DATASET", str(tree))
    given = arguments(tree, checkpoint, "--limit", "1")
    del given[given.index("--dataset-path") : given.index("--dataset-path") + 2]
    assert ffnet_quanteval.main(given)["images"] == 1


MISTAKES = {
    "--model-name segmentation_ffnet78s_dBBB_mobile": "did you mean segmentation_ffnet78S_dBBB_mobile",
    "--model-name segmentation_ffnet78S_dBBB": "did you mean segmentation_ffnet",
    "--use-cuda maybe": "take one of true",
    "--batch-size 0": "at least 1",
    "--batch-size x": "at least 1",
    "--num-workers -1": "at least 0",
    "--limit 0": "at least 1",
    "--default-param-bw 3": "4 to 16",
    "--default-output-bw 32": "4 to 16",
    "--quant-scheme minmax": "choose from",
    "--split test": "choose from",
    "--calibration-images 99": "only 4 images",
    "--dataset-path /nowhere": "/nowhere: no such folder",
    "--checkpoint /nowhere.pth": "/nowhere.pth: no such file",
    "--config-file /nowhere.json": "--config-file /nowhere.json",
    "--demo": "leave out --dataset-path",
    "--unknown": "unrecognized arguments",
    "--model segmentation_ffnet78S_dBBB_mobile": "unrecognized arguments",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_by_name_with_status_2(tree, checkpoint, capsys, mistake):
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main(arguments(tree, checkpoint, *mistake.split()))
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert MISTAKES[mistake] in error and "Traceback" not in error


def test_cuda_asked_for_and_missing_is_an_error(tree, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["--use-cuda"], ["--use-cuda", "yes"]):
        with pytest.raises(SystemExit) as status:
            ffnet_quanteval.main(arguments(tree, checkpoint, *words))
        assert status.value.code == 2 and "--use-cuda" in capsys.readouterr().err


def test_cuda_left_out_and_missing_is_said(tree, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [word for word in arguments(tree, checkpoint, "--limit", "1") if word not in ("--use-cuda", "false")]
    assert ffnet_quanteval.main(given)["device"].startswith("CPU")
    assert "running on the CPU" in capsys.readouterr().err


def test_broken_image_ends_the_run_in_one_line(tree, checkpoint, capsys):
    path = sorted(tree.glob("leftImg8bit/val/*/*.png"))[2]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main(arguments(tree, checkpoint, "--num-workers", "1"))
    error = capsys.readouterr().err
    assert status.value.code == 2 and f"error: {path}: truncated" in error and "Traceback" not in error


def test_no_images_is_answered(capsys, monkeypatch):
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    with pytest.raises(SystemExit) as status:
        ffnet_quanteval.main([])
    assert status.value.code == 2 and "--dataset-path" in capsys.readouterr().err


def test_help_needs_no_torch():
    script = "import sys, ffnet_quanteval\ntry: ffnet_quanteval.main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert "--dataset-path" in run.stdout
