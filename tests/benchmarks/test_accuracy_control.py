"""The comparison with NNCF's accuracy control. All but one test run without NNCF."""

import importlib.util
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch.utils.data import Subset

from benchmarks import accuracy_control
from benchmarks import accuracy_control_measurements as measurements
from benchmarks.accuracy_control_measurements import Images, NetworkScore
from datasets.cityscapes import CityscapesSplit
from ffnet.system.errors import UserError
from tests.helpers.networks import toy_model

HAS_NNCF = importlib.util.find_spec("nncf") is not None


def result(*scores):
    return {
        "images": 1,
        "calibration_images": 16,
        "validation_images": 8,
        "max_drop": 0.3,
        "scores": scores,
        "nncf": "3.4.0",
        "versions": {"onnxruntime": "1.32.0"},
    }


def graph(*nodes):
    weights = [numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), name) for name in ("a.weight", "b.weight")]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("image", "logits")]
    return helper.make_graph(nodes, "net", tensors[:1], tensors[1:], weights)


def node(operator, name, *inputs):
    return helper.make_node(operator, inputs, [f"{name}_out"], name)


def test_a_missing_nncf_is_one_line_that_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert accuracy_control.main([]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    assert "pip install -r benchmarks/requirements-nncf.txt" in error


def test_the_table_counts_the_operations_in_float_and_names_their_layers_below():
    scores = NetworkScore("a", 90.6, 90.5, 90.4, 90.4, 46, ()), NetworkScore("b", 90.6, 90.5, 80, 90, 46, ("x", "y"))
    lines = accuracy_control.format_result(result(*scores)).splitlines()
    assert "on 1 val image, calibrated on 16 train images; NNCF validated on 8 other train images" in lines[0]
    assert lines[4:6] == [
        "| a | 90.60 | 90.50 | 90.40 | 90.40 | 0 of 46 |",
        "| b | 90.60 | 90.50 | 80.00 | 90.00 | 2 of 46 |",
    ]
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")
    assert lines[6:] == ["", "Left in float, b: x, y"]


def test_an_operation_is_quantized_if_it_takes_dequantized_values():
    network = graph(
        node("QuantizeLinear", "q", "image", "scale"),
        node("DequantizeLinear", "dq", "q_out", "scale"),
        node("Concat", "concat", "dq_out", "dq_out"),
        node("Conv", "first", "dq_out", "a.weight"),
        node("Conv", "second", "first_out", "b.weight"),
        node("Resize", "up", "second_out"),
    )
    assert measurements.quantized_operations(network) == {"first"}
    names = measurements.layer_names(network)
    assert (names["first"], names["second"], names["up"]) == ("a", "b", "up")


@pytest.mark.parametrize("validation", ["0", "3", "-1"])
def test_images_must_remain_to_calibrate_and_to_validate(tree, monkeypatch, validation):
    monkeypatch.setattr(measurements, "ensure_scenes", lambda cache: tree)
    with pytest.raises(UserError, match="below that of the train images, 3"):
        measurements.load_images(accuracy_control.parse_args(["--validation-images", validation]))


def test_no_image_both_calibrates_and_validates(tree, monkeypatch):
    monkeypatch.setattr(measurements, "ensure_scenes", lambda cache: tree)
    images = measurements.load_images(accuracy_control.parse_args(["--validation-images", "2"]))
    assert list(images.validation.indices) == [0, 2] and list(images.calibration.indices) == [1]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NNCF, reason="needs nncf")
def test_onnx_runtime_runs_what_nncf_makes_of_a_network(tree):
    train = CityscapesSplit(tree, "train")
    images = Images(
        Subset(train, [0, 1]), Subset(train, [2]), CityscapesSplit(tree, "val"), (train.height, train.width)
    )
    score = measurements.score_network("net", toy_model(), images, max_drop=100)
    assert score.nncf == score.controlled == pytest.approx(score.fp32, abs=1)
    assert score.in_float == () and score.operations > 5
    assert not sys.modules["openvino_telemetry"]  # NNCF can't send usage data
