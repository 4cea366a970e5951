"""The whole program on data of one's own: seven classes, JPEG images of two sizes, a head that demo.train learned."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

import ffnet_quanteval
from datasets import split
from demo import train
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.labels import CITYSCAPES
from tests.helpers.own_data import IDS, LABEL_SET, NAMES, write_bdd100k, write_folders, write_kitti
from tests.helpers.program import run_on_ranks, run_with_result

MODEL = "segmentation_ffnet14T_dBBB_mobile"

pytestmark = pytest.mark.slow


def options(root, weights, *more):
    return ["--dataset", "folders", "--dataset-path", root, "--model-name", MODEL, "--checkpoint", weights,
            "--use-cuda", "false", "--num-workers", "0", *more]  # fmt: skip


def matrices(result):
    return {name: entry["confusion_matrix"] for name, entry in result["backends"].items()}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of a data set, with weights that know its classes a little."""
    root = tmp_path_factory.mktemp("own")
    write_folders(root, "train", 8, seed=1)
    write_folders(root, "val", 24)
    weights = root / "weights.pth"
    train.main(["--dataset-path", str(root), "--output", str(weights), "--steps", "40", "--model-name", MODEL])
    return root, weights


@pytest.fixture(scope="module")
def alone(own):
    """The result of a run on images of two sizes, which saves predictions."""
    root, weights = own
    return run_with_result(options(root, weights, "--save-predictions", root / "predictions"), root / "out")


def test_the_miou_is_that_of_scikit_learn_on_the_saved_predictions(own, alone):
    root, _ = own
    predictions = {path.name: path for path in (root / "predictions").glob("*/*.png")}
    assert len(predictions) == 24
    labels, predicted = [], []
    for path in sorted((root / "labels" / "val").glob("*/*.png")):
        ids = np.array(Image.open(path))
        found = np.array(Image.open(predictions[f"{path.parent.name}_{path.stem}_pred_labelIds.png"]))
        labels.append(ids[ids != 0])
        predicted.append(found[ids != 0])
    ious = 100 * jaccard_score(np.concatenate(labels), np.concatenate(predicted), labels=IDS, average=None)
    entry = alone["backends"]["INT8 simulated"]
    assert list(entry["iou"].values()) == pytest.approx(ious) and entry["miou"] == pytest.approx(ious.mean())
    assert ious.mean() > 40  # a network that predicts one class would not test much


def test_the_results_have_the_names_and_colors_of_the_label_set(own, alone):
    root, _ = own
    assert alone["dataset"] == f"{root.name} val" and alone["label_set"] == "off-road"
    assert {name: entry["color"] for name, entry in alone["classes"].items()} == {
        each["name"]: each["color"] for each in LABEL_SET["classes"]
    }
    page = (root / "out" / "report.html").read_text()
    colors = ["rgb({}, {}, {})".format(*each["color"]) for each in LABEL_SET["classes"]]
    assert all(name in page for name in NAMES) and all(
        color in page.replace(",", ", ").replace(",  ", ", ") for color in colors
    )


def test_resumed_runs_and_two_ranks_count_the_same(own, alone, tmp_path):
    root, weights = own
    records = root / "out" / "progress" / "images-0.jsonl"
    (root / "out" / "progress" / "finished").unlink()
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[::2]))
    more = "--save-predictions", root / "predictions", "--resume"
    assert matrices(run_with_result(options(root, weights, *more), root / "out")) == matrices(alone)

    def run(_):
        return ffnet_quanteval.main([*map(str, options(root, weights, "--output-dir", tmp_path / "out"))])

    assert run_on_ranks(2, run, tmp_path / "logs") == 0
    assert matrices(json.loads((tmp_path / "out" / "result.json").read_text())) == matrices(alone)


@pytest.mark.npu
def test_one_input_size_lets_all_backends_and_the_exported_file_run(own, tmp_path):
    root, weights = own
    sized = ["--input-size", "64x128", "--execute", "--export", tmp_path / "export", "--npu", "--npu-images", "2"]
    result = run_with_result(options(root, weights, *sized), tmp_path / "out")
    assert list(result["backends"]) == ["FP32", "INT8 simulated", "INT8 ONNX Runtime"] and result["npu"]
    assert json.loads((tmp_path / "export" / "manifest.json").read_text())["output"]["classes"] == list(NAMES)
    file = ["--dataset", "folders", "--dataset-path", root, "--onnx", tmp_path / "export" / "model.onnx"]
    again = run_with_result([*file, "--input-size", "64x128"], tmp_path / "onnx")
    assert matrices(again)["ONNX file"] == matrices(result)["INT8 ONNX Runtime"]


def test_what_needs_one_size_says_so_before_the_work(own, capsys):
    root, weights = own
    assert ffnet_quanteval.main([*map(str, options(root, weights, "--execute"))]) == 2
    assert "--execute needs images of one size" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ("checkpoint", "ONNX file"))
def test_a_network_for_other_classes_is_refused_with_both_numbers(own, tmp_path, capsys, kind):
    root, weights = own
    write_bdd100k(tmp_path)
    network = ["--model-name", MODEL, "--checkpoint", weights]
    if kind == "ONNX file":
        network = ["--onnx", tmp_path / "model.onnx"]
        options = torch.nn.Conv2d(3, 7, 3), (torch.zeros(1, 3, 64, 128),), str(tmp_path / "model.onnx")
        torch.onnx.export(*options, dynamo=True, verbose=False)
    arguments = ["--dataset", "bdd100k", "--dataset-path", tmp_path, *network]
    assert ffnet_quanteval.main([*map(str, arguments), *(["--use-cuda", "false"] if kind == "checkpoint" else [])]) == 2
    expected = "this network has 7 classes, and the label set 'Cityscapes' has 19. Name the network's label set with"
    assert f"{network[-1]}: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "write"), (("kitti", write_kitti), ("bdd100k", write_bdd100k)))
def test_networks_for_cityscapes_run_on_other_street_scenes(tmp_path, capsys, layout, write):
    write(tmp_path)
    checkpoint = ["--model-name", MODEL, "--checkpoint", train.DEMO_FOLDER / f"{MODEL}.pth", "--use-cuda", "false"]
    result = run_with_result(["--dataset", layout, "--dataset-path", tmp_path, *checkpoint], tmp_path / "out")
    notes = " ".join(result["notes"])
    assert list(result["classes"]) == list(CITYSCAPES.names) and result["images"] == 4
    assert "The published weights were trained on Cityscapes, and not on" in notes
    assert ("this data set has one part only" in notes) == (layout == "kitti")


@pytest.mark.npu
def test_the_demo_at_half_its_size_counts_what_images_that_pillow_resized_do(tmp_path, monkeypatch):
    more = "--limit", "3", "--input-size", "256x512", "--npu", "--npu-images", "1", "--use-cuda", "false"
    sized = run_with_result(["--demo", *more], tmp_path / "sized")
    scenes = ensure_scenes(default_cache_dir(), False)
    paths = [str(path) for path in (scenes / "leftImg8bit" / "val").glob("*/*.png")]
    resized = {path: np.array(Image.open(path).resize((512, 256))) for path in paths}
    original = split.decode
    monkeypatch.setattr(split, "decode", lambda path, kind: resized[path] if path in resized else original(path, kind))
    again = run_with_result(["--demo", *more], tmp_path / "resized")
    assert len(sized["backends"]) == 3 and matrices(again) == matrices(sized)
    assert matrices(again["npu"]) == matrices(sized["npu"])
