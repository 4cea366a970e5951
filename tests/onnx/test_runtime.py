"""Compare ONNX Runtime's integer kernels with AIMET's simulation."""

import numpy as np
import onnx
import pytest
import torch

from ffnet.evaluation.postprocessing import predict
from ffnet.file_names import MODEL_FILE
from ffnet.onnx.runtime import OnnxBackend, open_session, resize, run_session
from ffnet.system.errors import UserError
from tests.helpers.exports import exported
from tests.helpers.networks import DEMO
from tests.helpers.onnx_files import convolution_network, external_weight, save


def agreement(files):
    """Share of pixels that ONNX Runtime and AIMET's own simulation predict alike."""
    with torch.inference_mode():
        simulated = predict(files.sim.model(files.inputs), files.size)
        executed = predict(OnnxBackend(files.folder / MODEL_FILE)(files.inputs), files.size)
    return (simulated == executed).float().mean().item()


def test_onnx_runtime_predicts_what_the_simulation_does(export_case):
    assert agreement(export_case) > 0.995


@pytest.mark.slow
@pytest.mark.parametrize("bit_widths", ((4, 8), (8, 16)), ids=str)
def test_other_bit_widths_run_too(bit_widths):
    assert agreement(exported(DEMO, *bit_widths)) > 0.99


def test_images_are_resized_to_the_size_of_the_file(export_case):
    backend = OnnxBackend(export_case.folder / MODEL_FILE)
    images = torch.randn(2, 3, 200, 300)
    expected = torch.nn.functional.interpolate(images, export_case.size, mode="bilinear", antialias=True)
    assert torch.equal(backend(images), torch.cat([backend(image[None]) for image in expected]))
    assert resize(images, (None, None)) is images


@pytest.mark.parametrize("shape", ((1, 3, 8, 8), ("n", 3, "h", "w"), (1, 3, "h", "w")), ids=str)
def test_files_of_other_tools_run(shape, tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.ones(57, np.float32).tobytes())
    path = save(tmp_path / "other.onnx", convolution_network(shape=shape, weight=external_weight("weights.bin")))
    images = torch.randn(2, 3, 12, 10)
    expected = resize(images, (8, 8)) if shape[2] == 8 else images
    logits = OnnxBackend(path)(images)
    assert torch.allclose(logits, expected.sum(1, keepdim=True).expand(-1, 19, -1, -1), atol=1e-5)


def test_errors_of_onnx_runtime_name_the_file(tmp_path):
    path = save(tmp_path / "other.onnx", convolution_network())
    with pytest.raises(UserError, match=r"other\.onnx: ONNX Runtime failed .*\(Got invalid dimensions.*\)"):
        run_session(open_session(path), ["logits"], {"image0": np.zeros((1, 3, 4, 8), np.float32)}, path)
    proto = onnx.load(path)
    proto.graph.node[0].op_type = "Convolve"
    with pytest.raises(UserError, match=r"other\.onnx: ONNX Runtime [\d.]+ can't run .*Convolve"):
        open_session(path, proto)
