"""Read weights that AdaRound rounded back from an export: encodings hold ranges, but not how weights are rounded."""

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from aimet_torch.quantsim import QuantizationSimModel
from google.protobuf.message import DecodeError
from torch import nn

from ffnet.file_names import FLOAT_MODEL_FILE, MANIFEST_FILE, ROUNDED_LAYERS
from ffnet.quantization.sites import WEIGHT, QuantizerSite, quantizer_sites, site_parameter
from ffnet.system.errors import UserError
from ffnet.system.files import sha256_of

TOLERANCE = 1e-3  # of a quantization step, for the arithmetic of float32


def rounded_layers(sim: QuantizationSimModel, float_network: nn.Module) -> list[str]:
    """Return the layers of a simulation whose weights are not those of its float network."""
    originals = dict(float_network.named_parameters())
    return [
        site.layer
        for site in quantizer_sites(sim)
        if site.kind == WEIGHT and not torch.equal(site_parameter(sim, site), originals[f"{site.layer}.{site.key}"])
    ]


@torch.no_grad()
def load_rounded_weights(sim: QuantizationSimModel, encodings: Path) -> tuple[str, ...]:
    """Load the rounded weights that belong to an encodings file, and return the names of the rounded layers.

    They are in the float network beside it, as the manifest there says; without a manifest of this file there are none.

    Args:
        sim: its weights, which must have their encodings, are changed.
        encodings: path of the encodings file.

    Raises:
        UserError: if the float network is missing, was changed after the export, or is not that of `sim`.
    """
    manifest = _read_manifest(encodings)
    layers = manifest.get(ROUNDED_LAYERS)
    if not layers:
        return ()
    path = encodings.with_name(FLOAT_MODEL_FILE)
    if not path.is_file() or sha256_of(path) != _recorded_hash(manifest, FLOAT_MODEL_FILE):
        raise UserError(
            f"--encodings {encodings}: AdaRound rounded the weights of this export, and {path}, which holds them, is "
            "missing or was changed. Keep the files of an export together."
        )
    tensors = {tensor.name: tensor for tensor in _load_graph(path, encodings).initializer}
    sites = [site for site in quantizer_sites(sim) if site.key == "weight" and site.layer in layers]
    for site in sites:
        _replace_weight(sim, site, tensors.get(str(site.tensor)), encodings)
    return tuple(site.layer for site in sites)


def _read_manifest(encodings: Path) -> dict[str, Any]:
    """Return the manifest of the export that wrote the encodings file; empty if there is none."""
    try:
        manifest = json.loads(encodings.with_name(MANIFEST_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if _recorded_hash(manifest, encodings.name) == sha256_of(encodings) else {}


def _recorded_hash(manifest: Any, name: str) -> str | None:
    """Return the hash that a manifest has of a file; None if it has none, or is not a manifest."""
    try:
        return manifest["files"][name]["sha256"]
    except (KeyError, TypeError):
        return None


def _load_graph(path: Path, encodings: Path) -> onnx.GraphProto:
    try:
        return onnx.load(path).graph
    except (DecodeError, OSError) as error:
        raise UserError(f"--encodings {encodings}: {path} is not an ONNX file ({error}). Export again.") from error


def _replace_weight(
    sim: QuantizationSimModel, site: QuantizerSite, tensor: onnx.TensorProto | None, encodings: Path
) -> None:
    """Replace a weight by `tensor`, which must be at most one step away from it wherever its range is not exceeded."""
    parameter = site_parameter(sim, site)
    rounded = None if tensor is None else torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
    weight, quantizer = parameter.detach().as_subclass(torch.Tensor).cpu(), site.quantizer
    if rounded is not None and rounded.shape == weight.shape:
        scale, low, high = (
            value.detach().cpu() for value in (quantizer.get_scale(), quantizer.get_min(), quantizer.get_max())
        )
        steps = (rounded - weight.clamp(low, high)).abs() / scale
        if (steps <= 1 + TOLERANCE).all():
            parameter.copy_(rounded)
            return
    raise UserError(
        f"--encodings {encodings}: the rounded weights of {site.layer} in {FLOAT_MODEL_FILE} are not those of this "
        "network. Give the checkpoint and the options of the run that exported them."
    )
