"""Why a convolution runs in float: every situation is one that ONNX Runtime itself leaves in float."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ffnet.onnx.inspection import inspect_onnx
from tests.helpers.onnx_files import quantized_convolution, save

SINGLE = ", and an integer kernel needs a single QuantizeLinear there"
LIKEWISE = ", and an integer kernel needs one that clips like that node"
IN_FLOAT = {
    "input": ({"float_input": True}, "its input is not quantized"),
    "weight": ({"float_weight": True}, "its weight is not quantized"),
    "output": ({"float_output": True}, "its output (to end, Identity) is not quantized"),
    "two of them": ({"float_input": True, "float_weight": True}, "its input and weight are not quantized"),
    "other activation": ({"after": ["LeakyRelu"]}, "its output (to leakyrelu, LeakyRelu) is not quantized"),
    "int16": ({"activation": "INT16"}, "ONNX Runtime has no integer kernel for int16"),
    "int4 weight": ({"weight": "INT4"}, "ONNX Runtime has no integer kernel for int4"),
    "uint16 output": ({"output": "UINT16"}, "ONNX Runtime has no integer kernel for uint16"),
    "int8 bias": ({"bias": "INT8"}, "its bias is quantized as int8, and an integer kernel needs int32"),
    "bias scale": ({"bias_scale": 1e-2}, "the scale of its bias is not that of its input times that of its weight"),
    "branch": ({"branch": "Sigmoid"}, f"its output goes to y_q (QuantizeLinear), branch (Sigmoid){SINGLE}"),
    "branch after the Relu": (
        {"after": ["Relu"], "zero_point": 0, "branch": "Sigmoid"},
        f"its output goes to y_q (QuantizeLinear), branch (Sigmoid){SINGLE}",
    ),
    "negative values after a Relu": (
        {"after": ["Relu"], "zero_point": 10},
        f"the quantizer after relu (Relu) takes -0.2 to 4.9{LIKEWISE}",
    ),
    "symmetric after a Relu": (
        {"activation": "INT8", "after": ["Relu"], "zero_point": 0},
        f"the quantizer after relu (Relu) takes -2.56 to 2.54{LIKEWISE}",
    ),
}
ON_INTEGERS = (
    {},
    {"bias": None},
    {"bias": "FLOAT"},
    {"activation": "INT8"},
    {"weight": "UINT8"},
    {"activation": "INT8", "weight": "UINT8"},
    {"output": "INT8"},
    {"after": ["Relu"], "zero_point": 0},
)


@pytest.mark.parametrize("case", IN_FLOAT)
def test_every_convolution_in_float_has_its_reason(case, tmp_path):
    settings, reason = IN_FLOAT[case]
    facts = inspect_onnx(save(tmp_path / "case.onnx", quantized_convolution(**settings)))
    assert (facts.integer, facts.floats) == (0, {"conv": reason})


@pytest.mark.parametrize("settings", ON_INTEGERS, ids=str)
def test_types_and_biases_that_onnx_runtime_takes_need_no_reason(settings, tmp_path):
    facts = inspect_onnx(save(tmp_path / "case.onnx", quantized_convolution(**settings)))
    assert (facts.integer, facts.floats) == (1, {})


def test_a_convolution_that_nothing_explains_is_reported_with_its_types(tmp_path, monkeypatch):
    monkeypatch.setattr("ffnet.onnx.inspection._integer_convolutions", lambda *_: set())
    facts = inspect_onnx(save(tmp_path / "case.onnx", quantized_convolution()))
    assert facts.floats["conv"].endswith(
        "takes it to no integer kernel, although its Q/DQ nodes are complete (input uint8, weight int8, bias int32, "
        "output uint8)"
    )


def test_scales_that_are_computed_are_the_reason(tmp_path):
    proto = quantized_convolution()
    (bias,) = (node for node in proto.graph.node if node.name == "bias")
    proto.graph.node.insert(0, onnx.helper.make_node("Abs", ["bias_scale"], ["positive"], "abs"))
    bias.input[1] = "positive"
    facts = inspect_onnx(save(tmp_path / "case.onnx", proto))
    if facts.integer == 0:  # otherwise ONNX Runtime computed the constant first
        assert facts.floats == {"conv": "the scale of its input, weight or bias is not a constant"}


def test_a_weight_that_is_the_networks_own_computation_is_named(tmp_path):
    proto = quantized_convolution(float_weight=True)
    (convolution,) = (node for node in proto.graph.node if node.op_type == "Conv")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    proto.graph.node.insert(0, onnx.helper.make_node("Mul", ["weight", "two"], ["doubled"], "double"))
    convolution.input[1] = "doubled"
    facts = inspect_onnx(save(tmp_path / "case.onnx", proto))
    assert facts.floats == {"conv": "its weight (double) is not quantized"}
