"""The comparison with ONNX Runtime's quantization, on a small network and on images of noise."""

import numpy as np
import pytest

from benchmarks import accuracy, accuracy_measurements
from benchmarks.accuracy_measurements import FileScore, Images
from datasets.cityscapes import CityscapesSplit
from ffnet.system.errors import UserError
from tests.helpers.networks import toy_model

FILES = [("FP32", "FP32"), *((bits, tool) for bits in ("W8A8", "W4A8") for tool in ("ffnet_quanteval", "MinMax"))]


def score(bit_widths, tool, **changes):
    values = {"miou": 50.0, "cpu_miou": 51.25, "npu_miou": 52.5, "cpu_nodes": (), "failure": None}
    return FileScore("net", bit_widths, tool, **{**values, **changes})


def npu_lines(*scores):
    npu = {"chip": "sm8750", "version": "2.7.0", "images": ["a", "b"], "scores": scores}
    return accuracy.format_npu(npu, ["FP32", "ffnet_quanteval", "MinMax"])


@pytest.mark.slow
@pytest.mark.npu
def test_every_file_is_scored_on_the_cpu_and_on_the_npu(tree, monkeypatch):
    monkeypatch.setattr(accuracy_measurements, "BASELINES", ("MinMax",))
    images = Images(CityscapesSplit(tree, "train"), CityscapesSplit(tree, "val"), np.array([0, 3]))
    scores = accuracy_measurements.score_network("net", toy_model(), images)
    assert [(each.bit_widths, each.tool) for each in scores] == FILES
    for each in scores:
        assert each.failure is None
        assert each.npu_miou == pytest.approx(each.cpu_miou, abs=0.5) and each.miou != each.cpu_miou


def test_a_row_for_each_bit_widths_and_processor_repeats_the_miou_in_fp32():
    lines = npu_lines(*(score(*file) for file in FILES))
    assert "on the same 2 val images" in lines[1]
    assert [line.split() for line in lines[2].splitlines()[1:]] == [
        ["net", bits, processor, *[miou] * 3]
        for bits in ("W8A8", "W4A8")
        for processor, miou in (("CPU", "51.25"), ("NPU", "52.50"))
    ]


def test_reasons_of_failures_and_nodes_on_the_cpu_stand_below_the_table():
    scores = [score(*file) for file in FILES[:3]]
    scores[1] = score(*FILES[1], cpu_nodes=("head.up",))
    scores[2] = score(*FILES[2], npu_miou=None, failure="Resize is refused.")
    lines = npu_lines(*scores)
    assert lines[2].splitlines()[-1].split() == ["net", "W8A8", "NPU", "52.50", "52.50", "fails"]
    assert lines[3] == "net, W8A8, ffnet_quanteval: 1 node on the CPU, head.up"
    assert lines[4] == "net, W8A8, MinMax fails: Resize is refused."


def test_a_file_that_the_npu_refuses_is_reported_without_its_folder(tmp_path, monkeypatch):
    def refuse(target, processes):
        raise UserError(f"{target.path} can't be compiled.")

    monkeypatch.setattr(accuracy_measurements, "NpuBackend", refuse)
    outcome = accuracy_measurements.run_on_npu(tmp_path / "MinMax.onnx", images=None)
    assert outcome.npu_miou is None and outcome.failure == "MinMax.onnx can't be compiled."
