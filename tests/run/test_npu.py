"""The program with --npu: the smallest network end to end, and what is saved if the NPU's evaluation ends early."""

import csv
import json
import multiprocessing
import os
import shutil
import signal

import pytest

import ffnet_quanteval
from ffnet.config import MODEL_FILE
from ffnet.evaluation.scores import FP32, NPU, ONNX_FILE
from ffnet.npu.backend import NpuBackend
from ffnet.onnx.divergence import Difference, LayerDivergence
from ffnet.run.npu import divergence_notes
from tests.helpers.cityscapes_tree import SIZE
from tests.helpers.names import INT8_NPU, INT8_SIMULATED
from tests.helpers.program import arguments, run_with_result


@pytest.fixture
def ready_export(small_export, monkeypatch):
    """Replace the export by a copy of a smaller file."""
    assert small_export.size == SIZE

    def copy(sim, size, folder, *_):
        folder.mkdir()
        shutil.copy(small_export.folder / MODEL_FILE, folder)

    monkeypatch.setattr("ffnet.run.networks.export", copy)


def end_at_second_image(monkeypatch, end):
    """Call `end` before the NPU gets its second image."""
    original, calls = NpuBackend.__call__, []

    def call(backend, images):
        calls.append(images)
        if len(calls) == 2:
            end()
        return original(backend, images)

    monkeypatch.setattr(NpuBackend, "__call__", call)


@pytest.mark.npu
@pytest.mark.slow
def test_a_run_with_export_scores_the_npu_and_compares_its_layers(tree, toy_checkpoint, capfd):
    out, export = tree / "out", tree / "export"
    options = arguments(tree, toy_checkpoint, "--npu", "--npu-images", "3", "--export", export, "--fail-under", "100")
    npu = run_with_result(options, out)["npu"]
    printed = capfd.readouterr().out
    assert (npu["chip"], npu["name"], npu["hardware"], npu["cpu_nodes"]) == ("sm8750", "Snapdragon 8 Elite", False, [])
    assert list(npu["backends"]) == [FP32, INT8_SIMULATED, INT8_NPU] and len(npu["images"]) == 3
    assert npu["agreement"][f"{INT8_SIMULATED}|{INT8_NPU}"] > 97
    assert abs(npu["backends"][INT8_NPU]["miou"] - npu["backends"][INT8_SIMULATED]["miou"]) < 1
    for text in (
        "on the 3 images of the NPU",
        "compiler and emulator (onnxruntime-qnn",
        "ran 3 of 3 images",
        "the CPU: none",
    ):
        assert text in printed
    assert "LIBNATIVE" not in printed

    rows = list(csv.DictReader((out / "npu_layers.csv").open(encoding="utf-8-sig")))
    assert rows[0]["layer"] == "image" and rows[-1]["layer"] == "logits" and len(rows) > 25
    assert 'id="npu-layers"' in (out / "report.html").read_text()
    manifest = json.loads((export / "manifest.json").read_text())
    assert manifest["npu"]["chip"]["part"] == "sm8750"
    assert {"onnxruntime-qnn", "qairt"} < manifest["npu"]["versions"].keys()
    assert set(manifest["files"]) > {"npu/sm8750/model_ctx.onnx", MODEL_FILE}


@pytest.mark.npu
@pytest.mark.slow
def test_ctrl_c_costs_neither_the_images_that_were_done_nor_other_results(
    tree, toy_checkpoint, ready_export, monkeypatch, capsys
):
    end_at_second_image(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    options = ["--npu", "snapdragon-8-gen-3", "--npu-images", "all", "--output-dir", str(tree / "out")]
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, *options)) == 130
    result = json.loads((tree / "out" / "result.json").read_text())
    assert result["images"] == 4 and result["npu"]["requested_images"] == 4 and len(result["npu"]["images"]) == 1
    assert result["npu"]["chip"] == "sm8650"
    assert "ran 1 of 4 images, and then ended early" in capsys.readouterr().out
    assert not multiprocessing.active_children()


@pytest.mark.npu
@pytest.mark.slow
def test_a_resumed_run_continues_with_the_images_that_the_npu_has_not_done(
    tree, toy_checkpoint, ready_export, monkeypatch
):
    monkeypatch.setattr("ffnet.run.npu.compare_with_npu", lambda *_: [])  # the file is that of another network
    options = arguments(tree, toy_checkpoint, "--npu", "--npu-images", "3")
    whole = run_with_result(options, tree / "whole")["npu"]
    with monkeypatch.context() as patch:
        end_at_second_image(patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert ffnet_quanteval.main([*options, "--output-dir", str(tree / "out")]) == 130
    original, calls = NpuBackend.__call__, []
    monkeypatch.setattr(NpuBackend, "__call__", lambda *call: calls.append(call) or original(*call))
    resumed = run_with_result([*options, "--resume"], tree / "out")["npu"]
    assert len(calls) == 2 and resumed["images"] == whole["images"] and resumed["agreement"] == whole["agreement"]
    for name, entry in whole["backends"].items():
        assert resumed["backends"][name]["confusion_matrix"] == entry["confusion_matrix"]


@pytest.mark.npu
@pytest.mark.slow
def test_a_crash_of_the_library_costs_no_other_result(tree, toy_checkpoint, ready_export, monkeypatch, capsys):
    def crash():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSEGV)

    end_at_second_image(monkeypatch, crash)
    assert ffnet_quanteval.main(arguments(tree, toy_checkpoint, "--npu")) == 2
    printed = capsys.readouterr()
    assert "INT8 NPU is not: --npu: the process that runs" in printed.err and "SIGSEGV" in printed.err
    assert "mIoU %" in printed.out and "ran 1 of 4 images" in printed.out


@pytest.mark.npu
@pytest.mark.slow
def test_an_onnx_file_is_scored_on_the_npu(tree, small_export):
    options = ["--dataset-path", tree, "--onnx", small_export.folder / MODEL_FILE, "--npu", "--npu-images", "2"]
    npu = run_with_result([*options, "--num-workers", "0"], tree / "out")["npu"]
    assert list(npu["backends"]) == [ONNX_FILE, NPU] and npu["agreement"][f"{ONNX_FILE}|{NPU}"] > 97


def test_the_layers_that_diverge_first_and_most_are_named():
    layers = [LayerDivergence(name, Difference(*own), Difference(*own)) for name, own in {
        "image": (0.0, 0.0, 0), "conv": (0.02, 0.02, 1), "logits": (0.05, 0.06, 2),
    }.items()]  # fmt: skip
    (note,) = divergence_notes(layers, "W4A8 NPU")
    assert note.startswith("W4A8 NPU: on the first image, the first layer that diverges from the simulation is conv (")
    assert "conv (2.00 % of its values differ" in note
    assert "and logits adds most (5.00 % of its values differ for the same input, by 0.0600" in note
    (note,) = divergence_notes(layers[:1], "W4A8 NPU")
    assert "all quantized values equal those of the simulation" in note
