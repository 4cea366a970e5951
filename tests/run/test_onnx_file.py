"""The program with --onnx: files that take other images than FFNet's own, and files that return probabilities."""

import itertools
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from skimage.io import imread, imsave

import ffnet_quanteval
from ffnet.evaluation.backends import INT8_NPU, ONNX_FILE
from ffnet.file_names import FLOAT_MODEL_FILE, MODEL_FILE
from ffnet.labels import LABEL_IDS
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.onnx_files import color_network, normalizing_inside, save
from tests.helpers.program import run_with_result

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TRAIN_COLORS = np.random.default_rng(1).integers(0, 256, (19, 3)).astype(np.uint8)  # color of each train id
FORMATS = tuple(itertools.product(("normalized", "0-1", "0-255"), ("rgb", "bgr")))


def run(tree, path, *options, name="out"):
    return run_with_result(["--dataset-path", tree, "--onnx", path, "--num-workers", "0", *options], tree / name)


def matrix(result):
    return np.array(result["backends"][ONNX_FILE]["confusion_matrix"])


def note(result):
    """The note on what the file was fed."""
    (found,) = (text for text in result["notes"] if text.startswith("The file is fed"))
    return found


@pytest.fixture
def colored(tree):
    """The tree with images in which every pixel has the color of its class."""
    lookup = np.zeros((256, 3), np.uint8)
    lookup[LABEL_IDS] = TRAIN_COLORS
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
    result = run(colored, save(colored / "colors.onnx", color_network(colors_as(*chosen))))
    assert result["backends"][ONNX_FILE]["miou"] == 100
    values = {"normalized": "normalized", "0-1": "0..1", "0-255": "0..255"}[chosen[0]]
    assert note(result).startswith(f"The file is fed images in {chosen[1].upper()}, {values}. mIoU on a few images")


def test_options_are_obeyed_even_if_they_are_wrong(colored):
    path = save(colored / "colors.onnx", color_network(colors_as("0-1", "bgr")))
    right = run(colored, path, "--onnx-input", "0-1", "--onnx-channels", "bgr", name="right")
    wrong = run(colored, path, "--onnx-input", "0-1", "--onnx-channels", "rgb", name="wrong")
    assert right["backends"][ONNX_FILE]["miou"] == 100 > 60 > wrong["backends"][ONNX_FILE]["miou"]
    assert note(wrong) == "The file is fed images in RGB, 0..1. --onnx-input says so. --onnx-channels says so."


def test_a_file_that_nothing_is_known_about_is_fed_normalized_rgb(tree, small_export):
    text = note(run(tree, small_export.folder / FLOAT_MODEL_FILE))
    assert text.startswith(
        "The file is fed images in RGB, normalized. mIoU on a few images, in percent: RGB, normalized"
    )
    assert text.endswith("if it is wrong, give --onnx-input and --onnx-channels.")


@pytest.mark.parametrize("name", (FLOAT_MODEL_FILE, MODEL_FILE))
def test_a_file_that_normalizes_inside_scores_like_the_plain_export(tree, small_export, name):
    """The layout of Qualcomm AI Hub's exports."""
    plain = onnx.load(small_export.folder / name)
    expected = matrix(
        run(tree, save(tree / "plain.onnx", plain), "--onnx-input", "normalized", "--onnx-channels", "rgb")
    )
    result = run(tree, save(tree / "hub.onnx", normalizing_inside(plain)), name="hub")
    assert np.array_equal(matrix(result), expected)
    assert note(result).startswith(
        "The file is fed images in RGB, 0..1. Its first operations (sub, div) subtract a mean of 0.485, 0.456, 0.406."
    )


def test_integers_in_and_out_score_like_real_numbers(tree, small_export):
    """As AI Hub writes them with --quantize_io."""
    plain = onnx.load(small_export.folder / MODEL_FILE)
    expected = matrix(run(tree, save(tree / "plain.onnx", plain)))
    result = run(tree, save(tree / "integers.onnx", normalizing_inside(plain, TensorProto.UINT8)), name="integers")
    assert np.array_equal(matrix(result), expected) and "RGB, 0..1" in note(result)


@pytest.mark.parametrize("size", ((32, 64), (128, 256)), ids=str)
def test_images_of_another_size_are_resized_alike(tmp_path, small_export, size):
    write_tree(tmp_path, "val", 2, size)
    plain = onnx.load(small_export.folder / FLOAT_MODEL_FILE)
    expected = matrix(run(tmp_path, save(tmp_path / "plain.onnx", plain)))
    found = matrix(run(tmp_path, save(tmp_path / "hub.onnx", normalizing_inside(plain)), name="hub"))
    assert np.abs(found - expected).sum() <= 0.002 * expected.sum()  # two roundings in another order


def test_a_softmax_that_is_resized_is_reported(colored):
    colors = colors_as("0-1", "rgb")
    fed = ("--onnx-input", "0-1", "--onnx-channels", "rgb")
    for pool, expected in ((8, 1), (None, 0)):  # without a pool nothing is resized
        path = save(colored / f"softmax{pool}.onnx", color_network(colors, ["Softmax"], pool))
        notes = run(colored, path, *fed, name=f"out{pool}")["notes"]
        assert sum("probabilities (softmax, Softmax)" in text for text in notes) == expected


def test_a_network_that_returns_class_ids_is_refused(colored, capsys):
    proto = color_network(colors_as("0-1", "rgb"), ["ArgMax"])
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("logits", TensorProto.INT64, (1, 1, 64, 128)))
    path = save(colored / "ids.onnx", proto)
    assert ffnet_quanteval.main(["--dataset-path", str(colored), "--onnx", str(path)]) == 2
    assert "ids.onnx: this file has the output 'logits' of class ids (argmax, ArgMax)" in capsys.readouterr().err


@pytest.mark.npu
def test_the_npu_is_fed_what_onnx_runtime_is(tree, small_export):
    path = save(tree / "hub.onnx", normalizing_inside(onnx.load(small_export.folder / MODEL_FILE)))
    npu = run(tree, path, "--npu", "--npu-images", "2", "--npu-fallback")["npu"]
    assert npu["agreement"][f"{ONNX_FILE}|{INT8_NPU}"] > 97, json.dumps(npu["cpu_nodes"])
