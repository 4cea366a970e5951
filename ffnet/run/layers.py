"""Compare the layers of the simulation with FP32, and those of the files that backends run with the simulation."""

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from datasets import Split
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.scores import ONNX_RUNTIME, SIMULATED, Backend
from ffnet.onnx.divergence import compare_layers
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.layers import (
    WORST,
    LayerDivergence,
    Layers,
    activations,
    compare_activations,
    histograms,
    layer_names,
    layer_rows,
    record,
    worst_weights,
)
from ffnet.quantization.sensitivity import remove_quantizers
from ffnet.quantization.sites import quantizer_sites
from ffnet.run.networks import Model
from ffnet.run.session import Run


def compared_images(images: Split, run: Run) -> Split:
    """Return the images on which layers are compared: --layers of them or, without --output-dir, the first."""
    output = run.config.output
    return images.select(evenly_spaced(len(images), output.layers if output.output_dir else 1).tolist())


def normalized(images: Split, run: Run, title: str) -> "tqdm[torch.Tensor]":
    """Return an iterator over normalized images (1, 3, H, W) that shows its progress."""
    tensors = (normalize(images[index][0][None]) for index in range(len(images)))
    return tqdm(tensors, title, len(images), unit="image", disable=run.runtime.quiet)


def measure_layers(
    model: Model, backends: Mapping[str, Backend], images: Split, run: Run
) -> tuple[Layers | None, Sequence[LayerDivergence]]:
    """Return the SQNR of all layers, None without --output-dir or with --layers 0, and the divergence of ONNX Runtime.

    The simulation of one image is held as integers, a byte per value; the values in FP32 are compared as they come.
    """
    network, chosen = model.network, compared_images(images, run)
    if not run.config.output.output_dir or not len(chosen):
        return None, []
    layers = _simulated_layers(model, chosen, run)
    backend = backends.get(ONNX_RUNTIME)
    if not isinstance(backend, OnnxBackend):
        return layers, []
    batches = normalized(chosen, run, "compare layers with ONNX Runtime")
    executed = compare_layers(network.lowered, quantizer_sites(network.sim), backend.path, batches)
    return layers.add(network.names.of(ONNX_RUNTIME), executed), executed


def _simulated_layers(model: Model, images: Split, run: Run) -> Layers:
    """Return the layers of the simulation compared with FP32, and details of the worst ones."""
    network, original, device = model.network, model.checkpoint.model, run.runtime.device
    sites = activations(quantizer_sites(network.sim))
    rows = layer_rows(sites, layer_names(original, network.sim))
    plain = remove_quantizers(network.sim, network.float_network, network.lowered)
    batches = (image.to(device) for image in normalized(images, run, "compare layers with FP32"))
    runs = ((image, record(network.lowered, sites, image)) for image in batches)
    found = compare_activations(plain, network.lowered, sites, runs)
    noisy = sorted((each for each in found if each.own.sqnr is not None), key=lambda each: each.own.sqnr or 0.0)
    worst = {each.layer: sites[each.layer] for each in noisy[:WORST]}
    batches = (image.to(device) for image in normalized(images, run, "histograms"))
    described = histograms(plain, network.lowered, worst, batches, {row.tensor: row.layer for row in rows})
    weights = worst_weights(original, network.sim, network.float_network, network.lowered)
    return Layers(images.names, rows, described, weights).add(network.names.of(SIMULATED), found)
