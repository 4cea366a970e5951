"""The program with --npu: the smallest network end to end, and what is saved if the NPU's evaluation ends early."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

import ffnet_quanteval
from ffnet.config import MODEL_FILE
from ffnet.evaluation.scores import FP32, NPU, ONNX_FILE
from ffnet.npu.backend import NpuBackend
from ffnet.onnx.input_format import NORMALIZED_RGB
from ffnet.run.npu import NpuFile
from tests.helpers.cityscapes_tree import SIZE
from tests.helpers.names import INT8_NPU, INT8_SIMULATED
from tests.helpers.program import arguments, run_with_result
from tests.helpers.results import several_chips
from tests.helpers.two_models import SMOOTHED, options_for


@pytest.fixture
def ready_export(small_export, monkeypatch):
    """Replace the export by a copy of a smaller file."""
    assert small_export.size == SIZE

    def copy(sim, size, folder, *_):
        folder.mkdir()
        shutil.copy(small_export.folder / MODEL_FILE, folder)

    monkeypatch.setattr("ffnet.run.networks.export", copy)


def end_at_image(monkeypatch, number, end):
    """Call `end` before the NPU gets an image, counted from 1."""
    original, calls = NpuBackend.__call__, []

    def call(backend, images):
        calls.append(images)
        if len(calls) == number:
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

    rows = list(csv.DictReader((out / "layers.csv").open(encoding="utf-8-sig")))
    assert rows[0]["layer"] == "image" and rows[-1]["tensor"] == "logits" and len(rows) > 25
    assert float(rows[-1]["INT8 NPU SQNR"]) > float(rows[-1]["INT8 simulated SQNR"]) > 10
    manifest = json.loads((export / "manifest.json").read_text())
    assert manifest["npu"]["chip"]["part"] == "sm8750"
    assert {"onnxruntime-qnn", "qairt"} < manifest["npu"]["versions"].keys()
    assert set(manifest["files"]) > {"npu/sm8750/model_ctx.onnx", MODEL_FILE}


@pytest.mark.npu
@pytest.mark.slow
def test_ctrl_c_costs_neither_the_images_that_were_done_nor_other_results(
    tree, toy_checkpoint, ready_export, monkeypatch, capsys
):
    end_at_image(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
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
    monkeypatch.setattr(
        "ffnet.run.npu._with_layers", lambda outcome, *_: outcome
    )  # the file is that of another network
    options = arguments(tree, toy_checkpoint, "--npu", "--npu-images", "3")
    whole = run_with_result(options, tree / "whole")["npu"]
    with monkeypatch.context() as patch:
        end_at_image(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
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

    end_at_image(monkeypatch, 2, crash)
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


SEVERAL = ("--npu", "sm8450", "qcs6490", "sm8750", "sm8650", "--npu-images", "2")


@pytest.fixture
def pre_down(data):
    """Options of a run of a network whose float convolution some chips refuse."""
    return options_for(data, "--limit", "4", *SEVERAL, names=[SMOOTHED.name])


@pytest.mark.npu
@pytest.mark.slow
def test_one_chip_of_each_group_runs_the_images_and_a_refusal_is_a_row(pre_down, tmp_path, capsys):
    options = [*pre_down, "--output-dir", tmp_path / "out", "--export", tmp_path / "export", "--fail-under", "100"]
    assert ffnet_quanteval.main([*map(str, options)]) == 2  # because of the refusal
    printed = capsys.readouterr()
    assert printed.err.endswith("1 of 4 chips can't run the file: qcs6490. Name other chips, or remove --fail-under.\n")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {row["chip"]: row for row in result["npu_chips"]}
    assert [row["error"] is None for row in rows.values()] == [True, False, True, True]
    assert "smoothing (DepthWiseConv2d)" in rows["qcs6490"]["refused"] and "refuses " in printed.out
    groups = [result["npu"], *result["other_npus"]]
    assert [(npu["chip"], npu["same_chips"], len(npu["images"])) for npu in groups] == [
        ("sm8450", [], 2), ("sm8750", ["sm8650"], 2),
    ]  # fmt: skip
    alone = run_with_result(
        [*pre_down[: pre_down.index("--npu")], "--npu", "sm8650", "--npu-images", "2"], tmp_path / "a"
    )
    matrices = [npu["backends"][INT8_NPU]["confusion_matrix"] for npu in (*groups, alone["npu"])]
    assert matrices[2] == matrices[1]
    assert list(result["layers"]["rows"][-1]["sqnr"])[1:] == ["INT8 NPU, sm8450", "INT8 NPU, sm8750"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(page.count(f'id="{name}"') == 1 for name in ("chips", "layer-sqnr", "npu-backends-sm8750"))
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    entries = [manifest["npu"], *manifest["npu_others"]]
    assert [entry["file"] for entry in entries] == [
        f"npu/{each}/model_ctx.onnx" for each in ("sm8450", "sm8750", "sm8650")
    ]
    assert not (tmp_path / "export" / "npu" / "qcs6490").exists()


@pytest.mark.npu
@pytest.mark.slow
def test_a_run_that_ends_in_the_second_group_is_resumed_there(pre_down, tmp_path, monkeypatch):
    monkeypatch.setattr("ffnet.run.npu._with_layers", lambda outcome, *_: outcome)
    whole = run_with_result(pre_down, tmp_path / "whole")
    with monkeypatch.context() as patch:  # three calls for the comparison of chips, two for the first group
        end_at_image(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert ffnet_quanteval.main([*pre_down, "--output-dir", str(tmp_path / "out")]) == 130
    stopped = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [len(npu["images"]) for npu in (stopped["npu"], *stopped["other_npus"])] == [2, 1]
    original, calls = NpuBackend.__call__, []
    monkeypatch.setattr(NpuBackend, "__call__", lambda *call: calls.append(call[0].target.chip.part) or original(*call))
    resumed = run_with_result([*pre_down, "--resume"], tmp_path / "out")
    assert calls == ["sm8750"] and resumed["npu_chips"] == whole["npu_chips"]
    for one, other in zip(*([run["npu"], *run["other_npus"]] for run in (resumed, whole)), strict=True):
        assert one["images"] == other["images"] and one["agreement"] == other["agreement"]


@pytest.mark.npu
@pytest.mark.slow
def test_a_file_that_no_chip_takes_is_an_error(pre_down, capsys):
    chips = pre_down.index("sm8450")
    assert ffnet_quanteval.main([*pre_down[:chips], "qcs6490", "qcm6490"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--npu: none of 2 chips takes the file. --npu qcs6490: " in error and "refuses 3 nodes" in error


def test_chips_with_equal_logits_form_a_group_without_those_that_refuse():
    file = NpuFile(Path("model.onnx"), NORMALIZED_RGB, tuple(several_chips()["npu_chips"]))
    assert [[row.chip for row in group] for group in file.groups] == [["sm8450", "sm8650"], ["sm8750"]]
