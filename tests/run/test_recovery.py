"""The program with --seq-mse, --adaround and --max-drop: what it reports, exports and reads back."""

import pytest

from ffnet.quantization.recovery import search as recovery_search
from ffnet.quantization.recovery.search import PLAIN, Candidate
from tests.helpers.program import arguments, run_with_result

W4 = ("--calibration-split", "train", "--default-param-bw", "4")


@pytest.mark.slow
def test_what_a_recovered_run_exports_is_read_back_bit_for_bit(tree, toy_checkpoint, monkeypatch):
    """The drop is replaced by one that only more bits make smaller, so that five quantizers are raised."""
    monkeypatch.setattr(Candidate, "drop", property(lambda candidate: 1 - len(candidate.raised) / 100))
    first, second = tree / "first", tree / "second"
    recover = *W4, "--max-drop", "0.955", "--adaround", "20", "--export", first
    searched = run_with_result(arguments(tree, toy_checkpoint, *recover), tree / "out")
    recovery = searched["recovery"]
    assert len({(each["layer"], each["tensor"]) for each in recovery["raised"]}) >= 5
    assert recovery["chosen"] in [step["name"] for step in recovery["steps"]]
    load = "--encodings", first / "model.encodings", "--export", second
    loaded = run_with_result(arguments(tree, toy_checkpoint, *load), tree / "out2")
    backends = [result["backends"]["W4A8 mixed simulated"]["confusion_matrix"] for result in (searched, loaded)]
    assert backends[0] == backends[1]
    for name in ("model.onnx", "model_fp32.onnx"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
def test_an_interrupted_search_continues_with_the_best_so_far(tree, toy_checkpoint, capsys, monkeypatch):
    """On selection images that are neither calibrated on nor scored."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recovery_search, "apply_seq_mse", interrupt)
    result = run_with_result(arguments(tree, toy_checkpoint, *W4, "--max-drop", "0"), tree / "out")
    recovery = result["recovery"]
    assert recovery["interrupted"] and recovery["chosen"] == PLAIN
    assert len(recovery["selection_images"]) == 1 and result["calibration"]["images"] == 2
    assert not recovery["scored_too"] and result["images"] == 4
    output = capsys.readouterr()
    assert "Interrupted: continuing with the best configuration so far" in output.err
    assert "The search was interrupted" in output.out


@pytest.mark.slow
def test_the_report_says_if_the_selection_images_are_scored(tree, toy_checkpoint, capsys):
    options = arguments(tree, toy_checkpoint, "--max-drop", "100", "--selection-images", "2")
    result = run_with_result(options, tree / "out")
    assert result["recovery"]["scored_too"] and result["calibration"]["images"] == 2
    assert "the mIoU may be too favorable" in capsys.readouterr().out
