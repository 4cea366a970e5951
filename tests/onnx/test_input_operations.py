"""What files do to their image first, against what ONNX Runtime computes with the same nodes."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ffnet.onnx.input_operations import first_operations
from tests.helpers.onnx_files import constant

COLUMN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
CHAINS = {  # operators with the constants after or before their image
    "Sub and Div": [("Sub", "x", COLUMN), ("Div", "x", COLUMN / 2)],
    "Mul and Add": [("Mul", "x", np.float32(0.017)), ("Add", -COLUMN[0], "x")],
    "a constant minus the image": [("Sub", COLUMN, "x")],
    "divided by 255 first": [("Div", "x", np.float32(255)), ("Sub", "x", COLUMN), ("Mul", "x", 4 * COLUMN)],
    "reversed by Gather": [("Gather", "x", [2, 1, 0], {"axis": 1}), ("Sub", "x", COLUMN), ("Div", "x", 2 * COLUMN)],
    "reversed after the mean": [("Sub", "x", COLUMN), ("Gather", "x", [2, 1, 0], {"axis": 1}), ("Div", "x", COLUMN)],
    "reversed by Slice": [("Slice", "x", [-1], [-(2**40)], [1], [-1]), ("Sub", "x", COLUMN)],
    "batch norm": [("BatchNormalization", "x", *(COLUMN.flatten() * factor for factor in (1, 2, 3, 4)))],
    "depthwise convolution": [("Conv", "x", COLUMN.reshape(3, 1, 1, 1), COLUMN.flatten(), {"group": 3})],
}


def network(chain, end="Relu", dtype=TensorProto.FLOAT):
    """An onnx.ModelProto of a chain of operators, and then `end`."""
    nodes, constants, last = [], [], "image"
    for number, (operator, *arguments) in enumerate(chain):
        attributes = arguments.pop() if isinstance(arguments[-1], dict) else {}
        names = []
        for position, argument in enumerate(arguments):
            names.append(last if isinstance(argument, str) else f"constant{number}{position}")
            if not isinstance(argument, str):
                kind = TensorProto.INT64 if isinstance(argument, list) else TensorProto.FLOAT
                constants.append(constant(names[-1], argument, kind))
        last = f"value{number}"
        nodes.append(helper.make_node(operator, names, [last], f"{operator}{number}", **attributes))
    nodes.append(helper.make_node(end, [last], ["logits"], "end"))
    values = [helper.make_tensor_value_info(name, dtype, (1, 3, 4, 4)) for name in ("image", "logits")]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("case", CHAINS)
def test_scale_and_offset_are_what_onnx_runtime_computes(case):
    proto = network(CHAINS[case], end="Identity")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 3, 4, 4), np.float32)
    (computed,) = session.run(None, {"image": image})
    found = first_operations(proto, "image")
    expected = image * found.scale.reshape(3, 1, 1) + found.offset.reshape(3, 1, 1)
    assert (found.reversed_by is not None) == ("reversed" in case)
    assert np.allclose(computed, expected[:, ::-1] if found.reversed_by else expected, atol=1e-5)
    assert len(found.nodes) == len(CHAINS[case]) - ("reversed" in case)


@pytest.mark.parametrize(
    "chain",
    (
        [("Sub", "x", np.ones((1, 1, 4, 4), np.float32))],  # a mean per pixel
        [("Gather", "x", [1, 1, 0], {"axis": 1})],
        [("Slice", "x", [0], [4], [2], [1])],
        [("Pow", "x", np.float32(2))],
    ),
    ids=("per pixel", "other channels", "crop", "power"),
)
def test_other_operations_end_the_search(chain):
    found = first_operations(network([("Div", "x", np.float32(255)), *chain]), "image")
    assert found.nodes == ("Div0",) and np.allclose(found.scale, 1 / 255)


def test_a_branch_ends_the_search():
    proto = network([("Div", "x", np.float32(255)), ("Sub", "x", COLUMN)])
    proto.graph.node.append(helper.make_node("Neg", ["value0"], ["other"]))
    assert first_operations(proto, "image").nodes == ("Div0",)


def test_the_range_of_the_inputs_own_quantizer_is_read():
    quantized = [("QuantizeLinear", "x", np.float32(0.02)), ("DequantizeLinear", "x", np.float32(0.02))]
    found = first_operations(network([*quantized, ("Sub", "x", COLUMN)]), "image")
    assert found.quantized_range == pytest.approx((0, 5.1)) and found.nodes == ("Sub2",)
    assert first_operations(network([("Sub", "x", COLUMN), *quantized]), "image").quantized_range is None
