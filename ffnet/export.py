"""A calibrated simulation -> a folder of files that device runtimes take.

model.onnx       QDQ, opset 21: for runtimes that read Q/DQ nodes, ONNX Runtime here
model_fp32.onnx  the equalized float network, whose tensors model.encodings names: the pair that QAIRT and AI Hub take
model.encodings  AIMET's encodings
manifest.json    what was exported from what, hashes of the files, and how to feed the network
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from datasets.cityscapes import CLASSES
from ffnet.errors import UserError
from ffnet.evaluate import MEAN, STD
from ffnet.quantize import quantizers, quiet_aimet
from ffnet.tidy import fold_sizes, name_layers

OPSET = 21  # the first with 4-bit and 16-bit Q/DQ
INPUT, OUTPUT = "image", "logits"
EXPORTER = {"dynamo": False, "opset_version": OPSET, "input_names": [INPUT], "output_names": [OUTPUT]}
MODEL, FP32_MODEL, ENCODINGS, MANIFEST = FILES = ("model.onnx", "model_fp32.onnx", "model.encodings", "manifest.json")
PARAM_BITWIDTHS, OUTPUT_BITWIDTHS = (4, 8, 16), (8, 16)  # that ONNX has integers for and ONNX Runtime kernels


def check_bitwidths(param_bw, output_bw):
    """UserError where ONNX has no integers of these widths, or ONNX Runtime no kernels for them."""
    remedy = "give one of them, or leave out --export and --execute (in the demo, give --no-execute)"
    widths = (("--default-param-bw", param_bw, PARAM_BITWIDTHS), ("--default-output-bw", output_bw, OUTPUT_BITWIDTHS))
    for option, bits, known in widths:
        if bits not in known:
            kinds = " and ".join(map(str, known))
            raise UserError(f"{option}: ONNX Runtime has no kernels for {bits} bits, only for {kinds}; {remedy}")
    if param_bw == output_bw == 16:
        raise UserError("weights and activations of 16 bits both: ONNX Runtime's int32 biases overflow; take 8 for one")


def check_folder(folder, force=False):
    """UserError where an export into `folder` could not be written, or would lie among other files without `force`."""
    folder = Path(folder)
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
        if others and not force:
            raise UserError(
                f"--export {folder}: holds other files, {others[0]} first; name a folder that is empty or new, or "
                "write there with --force, which replaces the export's own files only"
            )
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"--export {folder}: is not a folder; name another one")
    parents = [parent for parent in (folder, *folder.absolute().parents) if parent.exists()]
    if not parents[0].is_dir():
        raise UserError(f"--export {folder}: {parents[0]} is not a folder; name another one")
    for place in {parents[0], folder.resolve().parent if folder.is_dir() else parents[0]}:
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--export {folder}: {place} can't be written to; name another folder")


def export(sim, size, folder, facts, force=False):
    """Writes the four files into `folder`, whole or not at all, and returns it as a Path.

    `sim`: calibrated, its biases fitted by fit_biases, left as it is. `size`: (height, width) of the images; the files'
    shapes are static, batch 1. `facts`: a dict that json can write, for manifest.json. UserError as check_folder and
    check_bitwidths raise it; RuntimeError where a file does not say what `sim` does.
    """
    check_folder(folder, force)
    check_bitwidths(*_widest(sim))
    sim_quantizers(sim)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder) as work:
        write_models(sim, size, work)
        write_manifest(work, size, facts)
        move_in(work, folder)
    return folder


def _widest(sim):
    """(bits of weights, bits of activations): the most that a quantizer of `sim` has."""
    bits = {True: 0, False: 0}
    for name, quantizer in quantizers(sim):
        is_weight = "param_quantizers" in name
        bits[is_weight] = max(bits[is_weight], int(quantizer.qmax - quantizer.qmin).bit_length())
    return bits[True], bits[False]


@contextlib.contextmanager
def _temporary_folder(folder):
    """A hidden folder beside `folder`, gone afterwards unless it was moved."""
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        work.chmod(0o777 & ~_umask())  # mkdtemp's own is for the owner alone
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_models(sim, size, work):
    """The two ONNX files and the encodings into the folder `work`; RuntimeError where one is not what `sim` is."""
    import onnx

    x = _example(sim.model, size)
    with quiet_aimet(), _quiet_exporter():
        import aimet_torch.onnx

        aimet_torch.onnx.export(sim.model, (x,), str(work / MODEL), **EXPORTER)
        original = sim.get_original_model(sim.model).eval()
        torch.onnx.export(original, (x,), str(work / FP32_MODEL), **EXPORTER)
        with tempfile.TemporaryDirectory(dir=work) as scratch:  # its ONNX file holds quantized weights as floats
            sim.onnx.export((x,), str(Path(scratch) / MODEL), **EXPORTER)
            encodings = json.loads((Path(scratch) / ENCODINGS).read_text())
    for name in (MODEL, FP32_MODEL):
        tensors = tidy_file(work / name, sim.model)
    rename_encodings(encodings, tensors)
    compare_quantizers(sim, onnx.load(work / MODEL))
    (work / ENCODINGS).write_text(json.dumps(encodings, indent=1) + "\n")


def write_fp32(model, size, path):
    """The float network as an ONNX file with the names and shapes of an export: what other tools start from."""
    with _quiet_exporter():
        torch.onnx.export(model, (_example(model, size),), str(path), **EXPORTER)
    tidy_file(path)


def tidy_file(path, network=None):
    """Writes an ONNX file anew, sizes folded and named after the layers of `network`: {old tensor name: new one}."""
    import onnx

    proto = fold_sizes(onnx.load(path))
    tensors = name_layers(proto, network) if network else {}
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return tensors


def _example(model, size):
    return torch.zeros(1, 3, *size, device=next(model.parameters()).device)


@contextlib.contextmanager
def _quiet_exporter():
    """The TorchScript exporter without its warnings; what it writes is checked afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # opset 21, constants, traced asserts
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


def rename_encodings(encodings, tensors):
    """Gives AIMET's entries, changed in place, the names that the ONNX files' tensors have."""
    for entry in (*encodings["activation_encodings"], *encodings["param_encodings"]):
        entry["name"] = tensors.get(entry["name"], entry["name"])


def compare_quantizers(sim, proto):
    """RuntimeError unless the file's Q/DQ nodes have the scales and zero points of every quantizer of `sim`."""
    found = file_quantizers(proto)
    for tensor, quantizer in sim_quantizers(sim).items():
        scale = quantizer.get_scale().detach().cpu().float().flatten().numpy()
        zero_point = (-quantizer.get_offset().detach().cpu() - quantizer.qmin).flatten().numpy()
        if tensor not in found:
            raise RuntimeError(f"{MODEL} has no quantizer at {tensor}")
        if not (np.array_equal(found[tensor][0], scale) and np.array_equal(found[tensor][1], zero_point)):
            raise RuntimeError(f"{MODEL} has another scale or zero point than the simulation at {tensor}")


def sim_quantizers(sim):
    """{tensor name in the exported file: AIMET's quantizer} of all that are switched on; UserError where one has no
    tensor of its own."""
    (output,) = (node for node in sim.model.graph.nodes if node.op == "output")
    found = {}
    for node in sim.model.graph.nodes:
        module = sim.model.get_submodule(node.target) if node.op == "call_module" else None
        for key, quantizer in getattr(module, "param_quantizers", {}).items():
            found[f"{node.target}.{key}"] = quantizer
        if any(quantizer is not None for quantizer in getattr(module, "input_quantizers", ())):
            source = node.all_input_nodes[0]
            if source.op != "placeholder" or len(module.input_quantizers) > 1:
                raise UserError(
                    f"{node.target} quantizes an input of its own, which can't be exported; leave out --config-file"
                )
            found[INPUT] = module.input_quantizers[0]
        for quantizer in getattr(module, "output_quantizers", ()):
            found[OUTPUT if node is output.args[0] else node.target] = quantizer
    return {tensor: quantizer for tensor, quantizer in found.items() if quantizer is not None}


def file_quantizers(proto):
    """{tensor: (scales float32, zero points counted from the type's least value)} of an exported onnx.ModelProto.

    RuntimeError where a Q and its DQ differ.
    """
    import onnx

    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    dequantizers = {node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        values = [[constants[name] for name in one.input[1:3]] for one in (node, dequantizers[node.output[0]])]
        if not all(map(np.array_equal, *values)):
            raise RuntimeError(f"{node.name}: quantizes and dequantizes differently")
        scale, zero_point = values[0]
        least = _least(types[node.input[2]])
        found[node.output[0].removesuffix("_q")] = (
            scale.astype(np.float32).flatten(),
            zero_point.astype(np.int64).flatten() - least,
        )
    return found


def _least(data_type):
    """The least value of one of ONNX's integer types."""
    import onnx

    name = onnx.TensorProto.DataType.Name(data_type)
    return 0 if name.startswith("U") else -(2 ** (int(name.removeprefix("INT")) - 1))


def write_manifest(work, size, facts):
    """manifest.json in `work`: `facts`, the files' hashes, and how an image becomes input and the output train ids."""
    files = {name: (work / name).read_bytes() for name in FILES if name != MANIFEST}
    manifest = facts | {
        "opset": OPSET,
        "input": {
            "name": INPUT,
            "shape": [1, 3, *size],
            "dtype": "float32",
            "preprocess": "RGB in 0..1 (a byte / 255), minus mean, divided by std, channel by channel; NCHW",
            "mean": list(MEAN),
            "std": list(STD),
        },
        "output": {
            "name": OUTPUT,
            "postprocess": "upsample bilinearly (corners not aligned) to the image's size, then argmax over channels",
            "classes": list(CLASSES),
        },
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def move_in(work, folder):
    """Gives `work` the name `folder`; where that has files, replaces each of the four by its new one.

    The manifest goes first and comes last, so a folder that has one is whole.
    """
    if not folder.exists() or not any(folder.iterdir()):
        work.rename(folder)
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in FILES:
        (work / name).replace(folder / name)
