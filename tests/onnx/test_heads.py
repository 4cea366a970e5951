"""Networks that return probabilities."""

import numpy as np
import pytest
import torch

from ffnet.onnx.heads import describe_head
from ffnet.onnx.runtime import OnnxBackend
from tests.helpers.onnx_files import color_network, save

COLORS = np.random.default_rng(0).random((19, 3))


def described(end, path, hidden=False):
    proto = color_network(COLORS, end, pool=8)
    logits = OnnxBackend(save(path, proto))(torch.rand(1, 3, 64, 128))
    if hidden:
        proto.graph.node[-1].op_type = "Custom"  # as if it were computed by operators that nobody knows
    return describe_head(proto, "logits", logits)


def test_a_softmax_is_noticed_by_its_name(tmp_path):
    assert "The file returns probabilities (softmax, Softmax), which are resized" in described(
        ["Softmax"], tmp_path / "a.onnx"
    )


def test_probabilities_are_noticed_by_their_values(tmp_path):
    assert "add up to 1 per pixel, like probabilities" in described(["Softmax"], tmp_path / "a.onnx", hidden=True)


@pytest.mark.parametrize("end", ([], ["LogSoftmax"]), ids=str)
def test_logits_and_their_logarithmic_probabilities_need_no_note(end, tmp_path):
    assert described(end, tmp_path / "a.onnx") is None


def test_resized_logarithmic_probabilities_predict_what_resized_logits_do():
    logits = torch.randn(1, 19, 16, 32, dtype=torch.float64)
    resized = [
        torch.nn.functional.interpolate(values, (128, 256), mode="bilinear").argmax(1)
        for values in (logits, logits.log_softmax(1), logits.softmax(1))
    ]
    assert torch.equal(resized[0], resized[1]) and not torch.equal(resized[0], resized[2])
