"""The program with --seq-mse, --adaround and --max-drop: what it reports, exports and reads back."""

import json

import pytest

import ffnet_quanteval
from ffnet.config import EXPORT_FILES
from ffnet.evaluation.scores import INT8_SIMULATED
from ffnet.quantization.recovery import search as recovery_search
from ffnet.quantization.recovery.search import PLAIN, Candidate
from tests.helpers.program import arguments, run_with_result

W4 = ("--calibration-split", "train", "--default-param-bw", "4")


@pytest.mark.slow
def test_what_a_recovered_run_exports_is_read_back_bit_for_bit(tree, toy_checkpoint, monkeypatch):
    """With a pretended drop, which only more bits make smaller: five quantizers are raised."""
    monkeypatch.setattr(Candidate, "drop", property(lambda candidate: 1 - len(candidate.raised) / 100))
    first, second = tree / "first", tree / "second"
    searched = run_with_result(
        arguments(tree, toy_checkpoint, *W4, "--max-drop", "0.955", "--adaround", "20", "--export", first), tree / "out"
    )
    recovery = searched["recovery"]
    assert len({(each["layer"], each["tensor"]) for each in recovery["raised"]}) >= 5
    assert recovery["chosen"] in [step["name"] for step in recovery["steps"]]
    loaded = run_with_result(
        arguments(tree, toy_checkpoint, "--encodings", first / "model.encodings", "--export", second), tree / "out2"
    )
    assert (
        loaded["backends"][INT8_SIMULATED]["confusion_matrix"]
        == (searched["backends"][INT8_SIMULATED]["confusion_matrix"])
    )
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()
    assert (first / "model_fp32.onnx").read_bytes() == (second / "model_fp32.onnx").read_bytes()
    manifests = [json.loads((folder / EXPORT_FILES[-1]).read_text()) for folder in (first, second)]
    assert manifests[0]["rounded_layers"] == manifests[1]["rounded_layers"]


def test_selection_images_are_apart_from_calibration_and_scoring(tree, toy_checkpoint, capsys):
    options = arguments(tree, toy_checkpoint, *W4, "--adaround", "5", "--recovery-images", "1")
    result = run_with_result(options, tree / "out")
    recovery = result["recovery"]
    assert len(recovery["selection_images"]) == 1 and result["calibration"]["images"] == 2
    assert not recovery["scored_too"]
    assert [step["name"] for step in recovery["steps"]] == [PLAIN, "AdaRound"]
    assert "Accuracy recovery: AdaRound, with an mIoU drop of" in capsys.readouterr().out


def test_the_report_says_if_the_selection_images_are_scored(tree, toy_checkpoint, capsys):
    options = arguments(tree, toy_checkpoint, "--max-drop", "100", "--selection-images", "2")
    result = run_with_result(options, tree / "out")
    assert result["recovery"]["scored_too"] and result["calibration"]["images"] == 2
    assert "the mIoU may be too favourable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-drop 1 --selection-images 4", "--selection-images: 4 of the 4 images of the val split"),
        ("--max-drop 1 --limit 1", "--selection-images: 1 of the 1 image of the val split"),
        ("--max-drop 1 --selection-images 2 --calibration-images 3", "has only 2 images, apart from 2 for"),
    ],
)
def test_images_that_do_not_suffice_are_refused_before_the_work(tree, toy_checkpoint, capsys, words, message):
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, *words.split())) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_interrupted_search_goes_on_with_the_best_so_far(tree, toy_checkpoint, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recovery_search, "apply_seq_mse", interrupt)
    result = run_with_result(arguments(tree, toy_checkpoint, *W4, "--max-drop", "0"), tree / "out")
    assert result["recovery"]["interrupted"]
    assert result["recovery"]["chosen"] == PLAIN
    output = capsys.readouterr()
    assert "Interrupted: the run goes on with the best configuration so far" in output.err
    assert "The search was interrupted" in output.out
