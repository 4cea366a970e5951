"""Export a calibrated simulation as a folder of files that device runtimes take.

- `model.onnx`: the quantized network with Q/DQ nodes, for runtimes that read these, such as ONNX Runtime
- `model_fp32.onnx`: the equalized float network, whose tensors `model.encodings` names; QAIRT and AI Hub take the pair
- `model.encodings`: AIMET's encodings
- `manifest.json`: where the files come from, their hashes, and how to prepare inputs and use outputs
- `npu/<chip>/`, if requested: `model.onnx` compiled for the NPU of a chip

Nodes and tensors carry the names of the network's layers, such as `head.layers.1.fam_4.layers.2`.
"""

import ast
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.chips import CHIPS
from ffnet.config import (
    CONTEXT_FILE,
    ENCODINGS_FILE,
    FLOAT_MODEL_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    NPU_FOLDER,
)
from ffnet.evaluation.loading import MEAN, STD
from ffnet.onnx.input_format import METADATA_OF_EXPORTS
from ffnet.onnx.placement import place
from ffnet.onnx.quantizers import insert_quantizers
from ffnet.options import check_bit_widths
from ffnet.quantization.encodings_file import read_encodings
from ffnet.quantization.quantsim import quiet_aimet
from ffnet.quantization.sites import ACTIVATION, INPUT_TENSOR, OUTPUT_TENSOR, WEIGHT, quantizer_sites
from ffnet.system.errors import UserError
from ffnet.system.files import sha256_of, unfinished_name

OPSET = 21  # the first with 4-bit and 16-bit QuantizeLinear
EXPORTER: dict[str, Any] = {
    "dynamo": True,  # torch.export keeps the names of modules, which the TorchScript exporter drops
    "opset_version": OPSET,
    "external_data": False,
    "verbose": False,
    "input_names": [INPUT_TENSOR],
    "output_names": [OUTPUT_TENSOR],
}
LAYER_METADATA = "pkg.torch.onnx.name_scopes"  # the modules around a node, outermost first, and its operator

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that AIMET's operators have no type annotations


def export(
    sim: QuantizationSimModel,
    size: tuple[int, int],
    folder: Path | str,
    provenance: Mapping[str, Any],
    compile_for: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Path:
    """Write the files of an export into `folder`, completely or not at all, and return the folder.

    Args:
        sim: A calibrated simulation whose biases fit into int32 (`raise_weight_scales`); it is not changed.
        size: Height and width of the images. The files have static shapes and batch size 1.
        folder: May be missing; other files in it are kept.
        provenance: What is exported, for manifest.json; its "output" describes the output further.
        compile_for: Compiles model.onnx for a device: writes further files below the folder that it is given, which
            holds the export, and returns further entries of the manifest.

    Raises:
        UserError: If the simulation has quantizers that no exported file can express.
        RuntimeError: If the encodings lack a quantizer of `sim`.
    """
    _check_sites(sim)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(unfinished_name(folder.name))
    work.mkdir()
    try:
        write_models(sim, size, work)
        compiled = compile_for(work) if compile_for else {}
        write_manifest(work, size, {**provenance, **compiled})
        move_files(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _check_sites(sim: QuantizationSimModel) -> None:
    """Raise a UserError if an exported file can't express one of the simulation's quantizers."""
    sites = quantizer_sites(sim)
    weights = max((site.bit_width for site in sites if site.kind == WEIGHT), default=0)
    activations = max((site.bit_width for site in sites if site.kind == ACTIVATION), default=0)
    check_bit_widths(weights, activations)
    if layer := next((site.layer for site in sites if site.tensor is None), None):
        raise UserError(f"--config-file: {layer} quantizes its own input, which can't be exported. Remove the option.")


def write_models(sim: QuantizationSimModel, size: tuple[int, int], work: Path) -> None:
    """Write the two ONNX files and the encodings into the folder `work`."""
    example = torch.zeros(1, 3, *size, device=next(sim.model.parameters()).device)
    path = work / FLOAT_MODEL_FILE
    with quiet_aimet():
        sim.onnx.export((example,), str(path), **EXPORTER)
    float_network = onnx.load(path)
    encodings = path.with_suffix(".encodings").rename(work / ENCODINGS_FILE)
    _rename_encodings(encodings, layer_tensors(float_network.graph))
    _restore_weights(float_network.graph, sim.model)
    name_layers(float_network.graph)
    _save(float_network, path)
    placement = place(float_network, read_encodings(encodings), path)
    if lost := [str(site.tensor) for site in quantizer_sites(sim) if site.tensor not in placement.entries]:
        raise RuntimeError(f"{ENCODINGS_FILE} has no entry for {lost[0]}.")
    _save(insert_quantizers(float_network, placement), work / MODEL_FILE)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().as_subclass(torch.Tensor).cpu().numpy()


def _rename_encodings(path: Path, tensors: Mapping[str, str]) -> None:
    encodings = json.loads(path.read_text())
    for entry in (*encodings["activation_encodings"], *encodings["param_encodings"]):
        entry["name"] = tensors.get(entry["name"], entry["name"])
    path.write_text(json.dumps(encodings, indent=1) + "\n")


def _restore_weights(graph: onnx.GraphProto, model: nn.Module) -> None:
    """Replace the graph's weights, which AIMET writes quantized, by those of `model`."""
    parameters = dict(model.named_parameters())
    for tensor in graph.initializer:
        if tensor.name in parameters:
            tensor.CopyFrom(onnx.numpy_helper.from_array(_array(parameters[tensor.name]), tensor.name))


def layer_tensors(graph: onnx.GraphProto) -> dict[str, str]:
    """Return {tensor: layer that computes it}, without the network's output, for a graph as torch exported it."""
    outputs = {output.name for output in graph.output}
    tensors = {node.output[0]: layer for node in graph.node if (layer := _layer(node))}
    return {tensor: layer for tensor, layer in tensors.items() if tensor not in outputs}


def _layer(node: onnx.NodeProto) -> str:
    """Return the layer that a node computes; empty for Q/DQ nodes."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == LAYER_METADATA), None)
    return ast.literal_eval(scopes)[-2] if scopes else ""


def name_layers(graph: onnx.GraphProto) -> None:
    """Give the nodes and tensors of a graph the names of the layers, in place."""
    renamed = layer_tensors(graph)
    for node in graph.node:
        node.name = _layer(node) or renamed.get(node.name, node.name)
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def _save(proto: onnx.ModelProto, path: Path) -> None:
    """Check a network and write it with its input format, and without the exporter's stack traces and local paths."""
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
    graph.ClearField("value_info")  # has the old names
    onnx.helper.set_model_props(proto, METADATA_OF_EXPORTS)
    proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def write_manifest(work: Path, size: tuple[int, int], provenance: Mapping[str, Any]) -> None:
    """Write manifest.json into `work`: `provenance`, hashes, and how images become inputs and outputs train ids."""
    files = sorted(path for path in work.rglob("*") if path.is_file())
    manifest = {
        **provenance,
        "opset": OPSET,
        "input": {
            "name": INPUT_TENSOR,
            "shape": [1, 3, *size],
            "dtype": "float32",
            "preprocess": "RGB in 0..1 (a byte / 255), minus mean, divided by std, per channel; NCHW",
            "mean": list(MEAN),
            "std": list(STD),
        },
        "output": {
            "name": OUTPUT_TENSOR,
            "postprocess": "upsample bilinearly (corners not aligned) to the image's size, then argmax over channels",
            **provenance.get("output", {}),
        },
        "files": {
            str(file.relative_to(work)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
        },
    }
    (work / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


def move_files(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`, or, if that holds files, replace each file of the export by the new one.

    The manifest is removed first and moved last, so that a folder with a manifest is complete. Networks that an earlier
    export compiled for chips are removed: they belong to the file that is replaced.
    """
    if not folder.exists() or not any(folder.iterdir()):
        work.rename(folder)
        return
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for path in (folder / NPU_FOLDER).glob(f"*/{Path(CONTEXT_FILE).stem}*"):
        if path.parent.name in CHIPS:
            path.unlink()
    files = [path.relative_to(work) for path in work.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: file.name == MANIFEST_FILE):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).replace(folder / file)
