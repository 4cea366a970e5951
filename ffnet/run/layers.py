"""Compare the layers of the simulation with FP32, and those of the files that backends run with the simulation."""

from collections.abc import Mapping

import torch

from datasets import Split
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.scores import ONNX_RUNTIME, Backend
from ffnet.onnx.divergence import compare_layers
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.layers import Comparison, Layers, analyze_layers
from ffnet.quantization.sites import quantizer_sites
from ffnet.run.networks import Model
from ffnet.run.session import Run


def compared_images(images: Split, run: Run) -> Split:
    """Return the images on which layers are compared: --layers of them or, without --output-dir, the first."""
    output = run.config.output
    return images.select(evenly_spaced(len(images), output.layers if output.output_dir else 1).tolist())


def normalized(images: Split) -> list[torch.Tensor]:
    """Return normalized images (1, 3, H, W) float32."""
    return [normalize(images[index][0][None]) for index in range(len(images))]


def measure_layers(
    model: Model, backends: Mapping[str, Backend], split: Split, run: Run
) -> tuple[Layers | None, Comparison]:
    """Return the SQNR of all layers, None without --output-dir or with --layers 0, and that of ONNX Runtime's."""
    network, chosen = model.network, compared_images(split, run)
    if not run.config.output.output_dir or not chosen.names:
        return None, {}
    loaded, backend = normalized(chosen), backends.get(ONNX_RUNTIME)
    on_device = [image.to(run.runtime.device) for image in loaded]
    layers = analyze_layers(model.checkpoint.model, network, on_device, chosen.names)
    if not isinstance(backend, OnnxBackend):
        return layers, {}
    executed = compare_layers(network.lowered, quantizer_sites(network.sim), backend.path, loaded)
    return layers.add(network.names.of(ONNX_RUNTIME), executed), executed
