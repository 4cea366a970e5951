"""Export a calibrated simulation as a folder of files that device runtimes take.

- `model.onnx`: the quantized network with Q/DQ nodes, for runtimes that read these, such as ONNX Runtime
- `model_fp32.onnx`: the equalized float network, whose tensors `model.encodings` names; QAIRT and AI Hub take the pair
- `model.encodings`: AIMET's encodings
- `manifest.json`: where the files come from, their hashes, and how to prepare inputs and use outputs
- `npu/<chip>/`, if requested: `model.onnx` compiled for a chip with an NPU

Nodes and tensors carry the names of the network's layers, such as `head.layers.1.fam_4.layers.2`.
"""

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aimet_torch.onnx
import numpy as np
import onnx
import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.chips import CHIPS
from ffnet.config import NpuConfig
from ffnet.evaluation.loading import MEAN, STD
from ffnet.file_names import (
    CONTEXT_FILE,
    ENCODINGS_FILE,
    EXPORT_FILES,
    FLOAT_MODEL_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    NPU_FOLDER,
)
from ffnet.labels import CLASSES
from ffnet.npu import worker as npu_worker
from ffnet.npu.backend import NpuProcess
from ffnet.npu.worker import NpuSession, NpuTarget
from ffnet.onnx.mixed_precision import rescale_biases, unify_bit_widths, widen
from ffnet.onnx.rewriting import fold_float_constants, keep_scale_in_resizes
from ffnet.options import check_bit_widths
from ffnet.quantization.quiet import quiet_aimet
from ffnet.quantization.sites import ACTIVATION, INPUT_TENSOR, OUTPUT_TENSOR, WEIGHT, quantizer_sites, site_parameter
from ffnet.system.errors import UserError
from ffnet.system.files import check_output_folder, sha256_of, unfinished_name

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
SUFFIXES = ("", "_q", "_qdq", "_dq", "_scale", "_zero_point")  # of the names that AIMET derives from a tensor's


def export(
    sim: QuantizationSimModel,
    size: tuple[int, int],
    folder: Path | str,
    provenance: Mapping[str, Any],
    force: bool = False,
    npu: NpuConfig | None = None,
) -> Path:
    """Write the files of an export into `folder`, completely or not at all, and return the folder.

    Args:
        sim: a calibrated simulation whose biases fit into int32 (`raise_weight_scales`); it stays as it is.
        size: height and width of the images. The files have static shapes and batch size 1.
        folder: may be missing.
        provenance: what is exported, for manifest.json.
        force: write into a folder that holds other files, which are kept.
        npu: also compile model.onnx for the NPU of this chip.

    Raises:
        UserError: if the folder can't be used, if the simulation has quantizers that no exported file can express, or
            if the file can't be compiled for the chip.
        RuntimeError: if the Q/DQ nodes of model.onnx differ from the quantizers of `sim`.
    """
    folder = Path(folder)
    check_output_folder("--export", folder, (*EXPORT_FILES, NPU_FOLDER), force)
    _check_sites(sim)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(unfinished_name(folder.name))
    work.mkdir()
    try:
        write_models(sim, size, work)
        if npu and npu.chip:
            provenance = {**provenance, "npu": write_npu_context(work, npu)}
        write_manifest(work, size, provenance)
        move_files(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _check_sites(sim: QuantizationSimModel) -> None:
    """Raise a UserError if an exported file can't express one of the simulation's quantizers."""
    bit_widths = {WEIGHT: 0, ACTIVATION: 0}
    sites = quantizer_sites(sim)
    for site in sites:
        bit_widths[site.kind] = max(bit_widths[site.kind], site.bit_width)
    check_bit_widths(bit_widths[WEIGHT], bit_widths[ACTIVATION])
    if layer := next((site.layer for site in sites if site.tensor is None), None):
        raise UserError(f"--config-file: {layer} quantizes its own input, which can't be exported. Remove the option.")


def write_models(sim: QuantizationSimModel, size: tuple[int, int], work: Path) -> None:
    """Write the two ONNX files and the encodings into the folder `work`."""
    example = _example(sim.model, size)
    with _quiet_exporter():
        aimet_torch.onnx.export(sim.model, (example,), str(work / MODEL_FILE), **EXPORTER)
        sim.onnx.export((example,), str(work / FLOAT_MODEL_FILE), **EXPORTER)
    quantized, float_network = onnx.load(work / MODEL_FILE), onnx.load(work / FLOAT_MODEL_FILE)
    encodings_file = (work / FLOAT_MODEL_FILE).with_suffix(".encodings").rename(work / ENCODINGS_FILE)
    _rename_encodings(encodings_file, layer_tensors(float_network.graph))
    _restore_weights(float_network.graph, sim.model)
    name_layers(quantized.graph)
    name_layers(float_network.graph)
    fold_float_constants(quantized, quantized_weights(sim))
    keep_scale_in_resizes(quantized.graph)
    unify_bit_widths(quantized.graph)
    rescale_biases(quantized.graph)
    _save(quantized, work / MODEL_FILE)
    _save(float_network, work / FLOAT_MODEL_FILE)
    check_export(sim, quantized)


def quantized_weights(sim: QuantizationSimModel) -> dict[str, np.ndarray]:
    """Return the quantized and dequantized weights of a simulation by their tensor in exported files."""
    weights = {}
    for site in quantizer_sites(sim):
        if site.kind == WEIGHT and site.tensor:
            weight = site_parameter(sim, site)
            weights[site.tensor] = site.quantizer(weight).detach().as_subclass(torch.Tensor).cpu().numpy()
    return weights


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
            value = parameters[tensor.name].detach().as_subclass(torch.Tensor).cpu().numpy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def export_float(model: nn.Module, size: tuple[int, int], path: Path) -> None:
    """Write a float network as an ONNX file with the input, output and static shapes of an export."""
    with _quiet_exporter():
        torch.onnx.export(model, (_example(model, size),), str(path), **EXPORTER)
    _save(onnx.load(path), path)


def _example(model: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    return torch.zeros(1, 3, *size, device=next(model.parameters()).device)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that AIMET's operators have no type annotations
    try:
        with quiet_aimet():
            yield
    finally:
        logger.setLevel(level)


def layer_tensors(graph: onnx.GraphProto) -> dict[str, str]:
    """Return {tensor: layer that computes it}, without the network's output, for a graph as torch exported it."""
    outputs = {output.name for output in graph.output}
    tensors = {node.output[0].removesuffix("_qdq"): layer for node in graph.node if (layer := _layer(node))}
    return {tensor: layer for tensor, layer in tensors.items() if tensor not in outputs}


def _layer(node: onnx.NodeProto) -> str:
    """Return the layer that a node computes; empty for Q/DQ nodes."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == LAYER_METADATA), None)
    return ast.literal_eval(scopes)[-2] if scopes else ""


def name_layers(graph: onnx.GraphProto) -> None:
    """Give the nodes and tensors of a graph the names of the layers, in place."""
    renamed = {old + suffix: new + suffix for old, new in layer_tensors(graph).items() for suffix in SUFFIXES}
    for node in graph.node:
        node.name = _layer(node) or renamed.get(node.name, node.name)
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)


def _save(proto: onnx.ModelProto, path: Path) -> None:
    """Check a network and write it without the exporter's metadata, which holds stack traces and local paths."""
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
    graph.ClearField("value_info")  # of old names
    proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def check_export(sim: QuantizationSimModel, proto: onnx.ModelProto) -> None:
    """Raise a RuntimeError unless a file expresses every quantizer.

    Its Q/DQ nodes must have the quantizer's scale and zero point. A weight without them, of a layer with a float input,
    must be a constant with the quantized values. Further Q/DQ nodes must repeat a quantizer, or refine it to 16 bits.
    """
    found, weights = file_quantizers(proto), quantized_weights(sim)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for site in quantizer_sites(sim):
        if site.tensor in weights and site.tensor in constants and site.tensor not in found:
            same = np.array_equal(onnx.numpy_helper.to_array(constants[site.tensor]), weights[site.tensor])
        elif site.tensor in found:
            scale = site.quantizer.get_scale().detach().cpu().float().flatten().numpy()
            zero_point = (-site.quantizer.get_offset().detach().cpu() - site.quantizer.qmin).flatten().numpy()
            same = all(map(np.array_equal, found[site.tensor], (scale, zero_point)))
        else:
            raise RuntimeError(f"{MODEL_FILE} has no quantizer at {site.tensor}.")
        if not same:
            raise RuntimeError(f"{MODEL_FILE} has another scale or zero point at {site.tensor} than the simulation.")
    _check_further_quantizers(found, {site.tensor for site in quantizer_sites(sim)})


def _check_further_quantizers(found: Mapping[str, tuple[np.ndarray, np.ndarray]], sites: set[str | None]) -> None:
    """Raise a RuntimeError if a quantizer that belongs to no site would round otherwise than those of the sites."""
    known = [quantization for tensor, quantization in found.items() if tensor in sites]
    allowed = {_key(*quantization) for quantization in (*known, *(widen(*quantization) for quantization in known))}
    for tensor, quantization in found.items():
        if tensor not in sites and _key(*quantization) not in allowed:
            raise RuntimeError(f"{MODEL_FILE} has a quantizer at {tensor} that the simulation lacks.")


def _key(scale: np.ndarray, zero_point: np.ndarray) -> tuple[bytes, bytes]:
    return scale.tobytes(), zero_point.tobytes()


def file_quantizers(proto: onnx.ModelProto) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {tensor: (scales float32, zero points counted from the type's smallest value)} of an exported file."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    dequantizers = {node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in (node for node in proto.graph.node if node.op_type == "QuantizeLinear"):
        values = [[constants[name] for name in each.input[1:3]] for each in (node, dequantizers[node.output[0]])]
        if not all(map(np.array_equal, *values)):
            raise RuntimeError(f"{MODEL_FILE}: {node.name} quantizes and dequantizes differently.")
        scale, zero_point = (value.flatten() for value in values[0])
        tensor = node.output[0].removesuffix("_q")
        found[tensor] = scale.astype(np.float32), zero_point.astype(np.int64) - _smallest(zero_point.dtype)
    return found


def _smallest(dtype: np.dtype) -> int:
    """Return the smallest value of an integer type; numpy's own iinfo does not know int4."""
    return 0 if dtype.name.startswith("u") else -(2 ** (int(dtype.name.removeprefix("int")) - 1))


def write_npu_context(work: Path, npu: NpuConfig) -> dict[str, Any]:
    """Write `model.onnx` as compiled for a chip into the folder `work`, and return what the manifest says about it."""
    chip = CHIPS[str(npu.chip)]
    file = work / NPU_FOLDER / chip.part / CONTEXT_FILE
    file.parent.mkdir(parents=True)
    with NpuProcess(NpuTarget(work / MODEL_FILE, chip, npu.fallback)) as process:
        session: NpuSession = process.call(npu_worker.write_context, file)
    description = dataclasses.asdict(session)
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "onnxruntime-qnn")}
    return {
        "chip": dataclasses.asdict(chip),
        "file": file.relative_to(work).as_posix(),
        "versions": {**versions, "qairt": description.pop("qairt")},
        **description,
    }


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
            "classes": list(CLASSES),
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
    _remove_contexts(folder / NPU_FOLDER)
    files = [path.relative_to(work) for path in work.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: file.name == MANIFEST_FILE):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).replace(folder / file)


def _remove_contexts(folder: Path) -> None:
    """Remove the compiled networks of an earlier export, and the folders that are empty then; keep all other files."""
    for path in folder.glob(f"*/{Path(CONTEXT_FILE).stem}*"):
        if path.parent.name in CHIPS:
            path.unlink()
    for empty in (*folder.glob("*/"), folder):
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            empty.rmdir()
