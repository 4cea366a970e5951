"""Float ONNX networks with encodings; the references are AIMET's simulations and what aimet-onnx wrote.

The files in `tests/data/aimet_onnx` were made with aimet-onnx 2.42 from the `model_fp32.onnx` of `exported(DEMO)`, the
demo's network at 128x256: `QuantizationSimModel` with 8 bits, TF-Enhanced and its per-channel configuration, calibrated
on the first of the `scenes()`; `sim.export` with each `encoding_version`. `predictions.png` holds the classes that the
simulation's session predicted for both scenes, after bilinear resizing to 128x256, one below the other.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from skimage.io import imread

from ffnet.config import ENCODINGS_FILE, FLOAT_MODEL_FILE
from ffnet.onnx.placement import place
from ffnet.onnx.quantizers import insert_quantizers
from ffnet.onnx.reading import read_onnx
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.encodings_file import Encoding, EncodingsFile, read_encodings
from ffnet.system.errors import UserError
from tests.helpers.encodings_files import VERSIONS
from tests.helpers.exports import exported, scenes
from tests.helpers.networks import DEMO, PRE_DOWN
from tests.helpers.onnx_files import save

AIMET_ONNX = Path(__file__).parents[1] / "data" / "aimet_onnx"
UINT8 = Encoding(0, 255, (0.1,), (-100,))


def entry(bits=8, scale=0.1, channels=1):
    """A signed encoding of a weight."""
    return Encoding(-(1 << bits - 1), (1 << bits - 1) - 1, (scale,) * channels, (0,) * channels)


def placed(proto, entries, floats=()):
    return place(proto, EncodingsFile(ENCODINGS_FILE, False, entries, floats), "float.onnx")


def network(nodes, opset=21, outputs=("logits",), **constants):
    """A network (1, 3, 8, 8) -> `outputs` of nodes (operator, inputs, output, attributes)."""
    made = [helper.make_node(op, inputs.split(), [output], output, **more) for op, inputs, output, more in nodes]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, 8, 8))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(made, "network", [image], values, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def convolution(opset=21, **more):
    weight = np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32)
    nodes = [("Conv", "image weight bias", "conv", {}), ("Relu", "conv", "logits", {})]
    return network(nodes, opset, weight=weight, bias=np.float32([0.25, -0.5]), **more)


def run(proto):
    image = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32) * 3
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"image": image})[0], image


@pytest.mark.parametrize("version", VERSIONS)
def test_predictions_are_those_of_the_simulation_of_aimet_onnx(version, tmp_path):
    source = exported(DEMO).folder / FLOAT_MODEL_FILE
    proto = read_onnx(source)
    placement = place(proto, read_encodings(AIMET_ONNX / f"{version}.encodings"), source)
    assert (placement.precision, placement.missing, placement.unexpected) == ("INT8", (), ())
    backend = OnnxBackend(save(tmp_path / "quantized.onnx", insert_quantizers(proto, placement)))
    with torch.inference_mode():
        logits = F.interpolate(backend(scenes()), (128, 256), mode="bilinear", align_corners=False)
    agreement = (logits.argmax(1).numpy().reshape(256, 256) == imread(AIMET_ONNX / "predictions.png")).mean()
    assert agreement >= 0.995


@pytest.mark.parametrize("pixel", (UINT8, entry()), ids=("asymmetric", "symmetric"))
@pytest.mark.parametrize(("opset", "bits"), ((17, 4), (17, 8), (11, 8), (21, 4), (17, 16)))
def test_a_convolution_computes_with_rounded_values_in_every_opset(opset, bits, pixel):
    proto, scale = convolution(opset), 0.3 if bits == 4 else 0.02
    entries = {"image": pixel, "weight": entry(bits, scale, 2), "logits": Encoding(0, 65535, (1e-3,), (0,))}
    found, image = run(insert_quantizers(proto, placed(proto, entries)))
    weight, bias = (numpy_helper.to_array(tensor) for tensor in proto.graph.initializer)
    rounded = np.clip(np.rint(weight / np.float32(scale)), -(1 << bits - 1), (1 << bits - 1) - 1) * scale
    low = pixel.qmin + pixel.offsets[0]
    pixels = np.clip(np.rint(image / np.float32(0.1)), low, low + 255) * 0.1
    expected = np.einsum("oi,nihw->nohw", rounded[:, :, 0, 0], pixels) + bias[None, :, None, None]
    assert np.abs(found - np.maximum(expected, 0)).max() <= 0.5e-3 + 0.5 * 0.1 * scale + 1e-5


def test_operators_that_move_values_share_an_encoding_and_others_do_not():
    nodes = [
        ("MaxPool", "image", "pooled", {"kernel_shape": [1, 1]}),
        ("Resize", "pooled none factors", "resized", {"mode": "linear"}),
        ("Concat", "resized pooled", "logits", {"axis": 1}),
    ]
    factors = np.float32([1, 1, 1, 1])
    proto = network(nodes, factors=factors, none=np.zeros(0, np.float32))
    assert placed(proto, {"image": UINT8}).implied == dict.fromkeys(("pooled", "resized", "logits"), UINT8)
    before = placed(proto, {"logits": UINT8})
    assert before.implied == {"resized": UINT8} and before.missing == ("image",)  # two operators read `pooled`


def test_tensors_of_quantized_operators_without_an_encoding_are_found():
    proto = convolution()
    whole = {"image": UINT8, "weight": entry(), "logits": UINT8}
    assert placed(proto, whole).missing == () and placed(proto, {"image": UINT8, "x": UINT8}).unexpected == ("x",)
    for name in whole:
        others = {key: value for key, value in whole.items() if key != name}
        assert placed(proto, others).missing == ({"logits": "conv"}.get(name, name),)
        assert placed(proto, others, (name,)).missing == (("conv",) if name == "logits" else ())
    alone = placed(proto, {"image": UINT8})
    assert (alone.missing, alone.float_operators) == ((), ("conv",))


def test_the_published_configuration_is_compared_tensor_by_tensor():
    placement = placed(convolution(), {"image": UINT8, "weight": entry(), "conv": UINT8, "logits": UINT8})
    assert placement.differences() == [("conv", "the encodings")]
    placement = placed(convolution(), {"weight": entry(), "logits": UINT8})
    assert placement.differences() == [("image", "the published configuration")]
    for name in (DEMO, PRE_DOWN):
        folder = exported(name).folder
        ours = place(read_onnx(folder / FLOAT_MODEL_FILE), read_encodings(folder / ENCODINGS_FILE), folder)
        assert ours.differences() == [] and not ours.missing + ours.unexpected


@pytest.mark.parametrize(
    ("name", "encoding", "message"),
    (
        ("weight", Encoding(-128, 127, (0.1,) * 2, (0,) * 2, axis=1), "scales along axis 1, but .* are on axis 0"),
        ("weight", entry(channels=3), "3 scales, but the tensor has 2 output channels"),
        ("image", entry(channels=2), "2 scales, but activations have one"),
        ("image", entry(bits=5), "5 bits, but ONNX has integers of 4, 8, 16 bits"),
        ("other", UINT8, "no entry names a float32 tensor"),
    ),
)
def test_entries_that_do_not_suit_their_tensor_are_refused(name, encoding, message):
    with pytest.raises(UserError, match=message):
        placed(convolution(), {name: encoding})


def test_a_quantized_file_is_refused():
    proto = convolution()
    quantized = insert_quantizers(proto, placed(proto, {"image": UINT8}))
    with pytest.raises(UserError, match="is quantized already. Give --onnx the float file"):
        placed(quantized, {"image": UINT8})
