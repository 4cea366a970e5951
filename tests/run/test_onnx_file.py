"""Files for --onnx: some take other images than FFNet's own exports, and some return probabilities."""

import importlib.util
import itertools
import json
import math
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from skimage.io import imread, imsave

from datasets.cityscapes import CityscapesSplit
from ffnet.chips import CHIPS
from ffnet.config import ENCODINGS_FILE, FLOAT_MODEL_FILE, MODEL_FILE, Runtime
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.scores import ONNX_FILE
from ffnet.labels import CITYSCAPES
from ffnet.npu.backend import NpuBackend
from ffnet.npu.worker import NpuTarget
from ffnet.run.onnx_file import open_onnx
from ffnet_quanteval import main
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.onnx_files import color_network, convolution_network, normalizing_inside, save
from tests.helpers.program import run_with_result

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TRAIN_COLORS = np.random.default_rng(1).integers(0, 256, (19, 3)).astype(np.uint8)  # color of each train id
FORMATS = tuple(itertools.product(("normalized", "0-1", "0-255"), ("rgb", "bgr")))
RUNTIME = Runtime(quiet=True, num_workers=0)


def score(tree, path, *given):
    """The confusion matrix of a file, and the notes on it."""
    images = CityscapesSplit(tree, "val")
    backend, notes = open_onnx(path, images, RUNTIME, given or (None, None))
    return evaluate({ONNX_FILE: backend}, images, RUNTIME).total(ONNX_FILE), notes


def is_perfect(matrix):
    return matrix.sum() == np.trace(matrix) > 0


def note(notes):
    """The note on what the file was fed."""
    (found,) = (text for text in notes if text.startswith("The file is fed"))
    return found


@pytest.fixture
def colored(tree):
    """The tree with images in which every pixel has the color of its class."""
    lookup = np.zeros((256, 3), np.uint8)
    lookup[CITYSCAPES.label_ids] = TRAIN_COLORS
    for path in tree.glob("gtFine/val/*/*_labelIds.png"):
        image = str(path).replace("gtFine/", "leftImg8bit/").replace("gtFine_labelIds", "leftImg8bit")
        imsave(image, lookup[imread(path)], check_contrast=False)
    return tree


def colors_as(value_range, channels):
    colors = TRAIN_COLORS.astype(np.float64)
    if value_range != "0-255":
        colors = colors / 255
    if value_range == "normalized":
        colors = (colors - MEAN) / STD
    return colors[:, ::-1] if channels == "bgr" else colors


@pytest.mark.parametrize("chosen", FORMATS, ids="-".join)
def test_a_trial_finds_what_a_network_takes_that_recognizes_colors(colored, chosen):
    matrix, notes = score(colored, save(colored / "colors.onnx", color_network(colors_as(*chosen))))
    assert is_perfect(matrix)
    values = {"normalized": "normalized", "0-1": "0..1", "0-255": "0..255"}[chosen[0]]
    assert note(notes).startswith(f"The file is fed images in {chosen[1].upper()}, {values}. mIoU on a few images")


@pytest.mark.parametrize("kind", (TensorProto.FLOAT, TensorProto.UINT8), ids=("float", "integers"))
def test_a_trial_finds_what_a_file_takes_that_normalizes_inside(colored, kind):
    """The layout of Qualcomm AI Hub's exports, also with --quantize_io."""
    proto = normalizing_inside(color_network(colors_as("normalized", "rgb")), kind)
    matrix, notes = score(colored, save(colored / "hub.onnx", proto))
    assert is_perfect(matrix) and note(notes).startswith("The file is fed images in RGB, 0..1. mIoU on a few images")


def test_the_program_obeys_options_even_if_they_are_wrong(colored):
    path = save(colored / "colors.onnx", color_network(colors_as("0-1", "bgr")))
    options = ["--dataset-path", colored, "--onnx", path, "--num-workers", "0", "--onnx-input", "0-1"]
    right, wrong = (
        run_with_result([*options, "--onnx-channels", channels], colored / channels) for channels in ("bgr", "rgb")
    )
    assert right["backends"][ONNX_FILE]["miou"] == 100 > 60 > wrong["backends"][ONNX_FILE]["miou"]
    assert note(wrong["notes"]) == "The file is fed images in RGB, 0..1. --onnx-input says so. --onnx-channels says so."


@pytest.mark.slow
@pytest.mark.parametrize("name", (FLOAT_MODEL_FILE, MODEL_FILE))
def test_exports_of_this_project_need_no_trial(tree, small_export, name):
    _, notes = score(tree, small_export.folder / name)
    assert note(notes) == "The file is fed images in RGB, normalized. Its metadata says so."


@pytest.mark.slow
def test_a_file_that_nothing_is_known_about_is_fed_normalized_rgb(tree, small_export):
    proto = onnx.load(small_export.folder / FLOAT_MODEL_FILE)
    del proto.metadata_props[:]
    matrix, notes = score(tree, save(tree / "other.onnx", proto))
    assert note(notes).startswith("The file is fed images in RGB, normalized. mIoU on a few images, in percent: RGB, n")
    assert note(notes).endswith("if the choice is wrong, give --onnx-input and --onnx-channels.")
    assert np.array_equal(matrix, score(tree, small_export.folder / FLOAT_MODEL_FILE)[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    ((FLOAT_MODEL_FILE, TensorProto.FLOAT), (MODEL_FILE, TensorProto.FLOAT), (MODEL_FILE, TensorProto.UINT8)),
)
def test_a_file_that_normalizes_inside_scores_like_the_plain_export(tree, small_export, name, kind):
    path = save(tree / "hub.onnx", normalizing_inside(onnx.load(small_export.folder / name), kind))
    matrix, _ = score(tree, path, "0-1", "rgb")
    assert np.array_equal(matrix, score(tree, small_export.folder / name)[0])


def test_images_of_another_size_are_resized_alike(tmp_path, small_export):
    write_tree(tmp_path, "val", 2, (128, 256))
    plain = small_export.folder / FLOAT_MODEL_FILE
    expected, _ = score(tmp_path, plain)
    found, _ = score(tmp_path, save(tmp_path / "hub.onnx", normalizing_inside(onnx.load(plain))), "0-1", "rgb")
    assert np.abs(found - expected).sum() <= 0.002 * expected.sum()  # two roundings in another order


def test_a_softmax_that_is_resized_is_reported(colored):
    for pool, expected in ((8, 1), (None, 0)):  # without a pool nothing is resized
        path = save(colored / f"softmax{pool}.onnx", color_network(colors_as("0-1", "rgb"), ["Softmax"], pool))
        _, notes = score(colored, path, "0-1", "rgb")
        assert sum("probabilities (softmax, Softmax)" in text for text in notes) == expected


def test_a_file_that_returns_other_classes_than_it_declares_is_an_error_of_the_program(tree, capsys):
    proto = convolution_network(300)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 19, 8, 8)))
    path = save(tree / "other.onnx", proto)
    assert main([str(option) for option in ("--dataset-path", tree, "--onnx", path, "--num-workers", "0")]) == 2
    error = "ONNX file: for 1 image this backend returned float32 [1, 300, 8, 8] in place of logits, float"
    assert error in capsys.readouterr().err


@pytest.mark.npu
def test_the_npu_is_fed_what_onnx_runtime_is(tree, small_export):
    path = save(tree / "hub.onnx", normalizing_inside(onnx.load(small_export.folder / MODEL_FILE)))
    images = CityscapesSplit(tree, "val")
    backend, _ = open_onnx(path, images, RUNTIME, ("0-1", "rgb"))
    inputs = normalize(images[0][0][None])
    target = NpuTarget(path, CHIPS["sm8750"], fallback=True)
    with NpuBackend(target, input_format=backend.input_format) as npu, torch.inference_mode():
        agreement = (npu(inputs).argmax(1) == backend(inputs).argmax(1)).float().mean()
    assert agreement > 0.97


@pytest.fixture
def pair(tree, small_export):
    """The options of a run with an exported pair, and its encodings."""
    path = tree / "changed.encodings"
    content = json.loads((small_export.folder / ENCODINGS_FILE).read_text())
    options = ["--dataset-path", tree, "--num-workers", 0, "--onnx", small_export.folder / FLOAT_MODEL_FILE]
    return [*map(str, options), "--encodings", str(path)], content, path


def test_an_exported_pair_scores_like_the_quantized_file(pair, small_export, tmp_path):
    options, content, path = pair
    path.write_text(json.dumps(content))
    found = run_with_result([*options, "--resume"], tmp_path / "pair")
    executed = run_with_result([*options[:5], small_export.folder / MODEL_FILE], tmp_path / "file")
    both = found["backends"]["INT8 ONNX Runtime"], executed["backends"][ONNX_FILE]
    same = [key for key in both[0] if "change" not in key and key != "images_per_second"]
    assert [both[0][key] for key in same] == [both[1][key] for key in same]
    assert list(found["backends"]) == ["FP32", "INT8 ONNX Runtime"] and found["precision"] == "INT8"
    assert both[0]["change_interval"] is not None
    assert "The encodings quantize the tensors that the published configuration quantizes." in found["notes"]
    assert "with the largest mIoU drop" in (tmp_path / "pair" / "report.html").read_text()
    assert run_with_result([*options, "--resume"], tmp_path / "pair") == found


def without_half(content):
    return {**content, **{key: content[key][::2] for key in ("activation_encodings", "param_encodings")}}


def with_entry(content, section, **changes):
    first, *others = content[section]
    return {**content, section: [{**first, **changes}, *others]}


BROKEN = {
    "half": (without_half, r"no entry for tensors of quantized operators: \d+ \("),
    "other": (lambda content: with_entry(content, "activation_encodings", name="x"), r"no float32 tensor: 1 \(x\)"),
    "nan": (lambda content: with_entry(content, "activation_encodings", scale=[math.nan]), "'nan', which is not a num"),
    "float": (lambda content: with_entry(content, "activation_encodings", dtype="FLOAT"), r"into INT8: 1 \(image\)"),
    "twice": (lambda content: {**content, "param_encodings": content["param_encodings"] * 2}, "weight' twice"),
    "axis": (lambda content: with_entry(content, "param_encodings", scale=[0.1] * 3, offset=[-128] * 3), "3 scales"),
    "bits": (lambda content: content, "--default-param-bw asks for 4 bits, and entries have others: 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pairs_get_one_message(name, pair, capsys):
    change, message = BROKEN[name]
    options, content, path = pair
    path.write_text(json.dumps(change(content)))
    assert main([*options, *(["--default-param-bw", "4"] if name == "bits" else [])]) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: --encodings {path}: .*{message}", error) and error.count("\n") == 1


def test_partial_encodings_are_listed(pair, tmp_path):
    options, content, path = pair
    path.write_text(json.dumps(with_entry(content, "activation_encodings", name="x")))
    found = run_with_result([*options, "--partial-encodings"], tmp_path / "out")
    assert "Entries that name no float32 tensor and were ignored (1): x." in found["notes"]
    assert "Tensors of quantized operators without an encoding, which stay in float (1): image." in found["notes"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Placement of quantizers" in page and "the published configuration" in page


def test_without_aimet_onnx_a_file_is_not_quantized(pair, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*pair[0][:6], "--calibration-split", "train"]) == 2
    assert "pip install -r requirements-aimet-onnx.txt" in capsys.readouterr().err


def test_aimet_onnx_quantizes_a_file(pair, tmp_path):
    found = run_with_result([*pair[0][:6], "--calibration-split", "val", "--default-param-bw", "4"], tmp_path / "out")
    assert list(found["backends"]) == ["FP32", "W4A8 ONNX Runtime"]
