"""The measurements of `benchmarks.accuracy_control`."""

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from torch.utils.data import Dataset, Subset

from benchmarks.accuracy_measurements import PROJECT, RUNTIME
from datasets.cityscapes import CityscapesSplit
from demo.ill_conditioned import ill_conditioned
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.evaluation.backends import FP32
from ffnet.evaluation.loading import Sample, evenly_spaced
from ffnet.evaluation.loop import calibration_batches, evaluate
from ffnet.file_names import MODEL_FILE
from ffnet.model import FFNet
from ffnet.onnx.export import export, export_float
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantsim import quantize
from ffnet.quantization.sites import INPUT_TENSOR
from ffnet.results.result import versions
from ffnet.run.inputs import DEMO_FOLDER
from ffnet.system.errors import UserError
from ffnet.variants import DEMO_VARIANTS

NNCF, CONTROLLED = "NNCF", "NNCF, accuracy control"
COPYING = ("Concat", "Pad", "QuantizeLinear")  # operations that only copy or quantize values; NNCF does not count them
SILENT = replace(RUNTIME, progress=False)


@dataclass(frozen=True)
class Images:
    """The images of all networks. Those that calibrate and those that validate are different ones of one split."""

    calibration: Subset[Sample]
    validation: Subset[Sample]
    scored: CityscapesSplit
    size: tuple[int, int]  # height, width


@dataclass(frozen=True)
class NetworkScore:
    """The mIoU of the files of a network in percent, and what accuracy control left in float."""

    network: str
    fp32: float
    project: float
    nncf: float  # without accuracy control
    controlled: float
    operations: int  # number of operations that NNCF quantizes without accuracy control
    in_float: tuple[str, ...]  # those of them that accuracy control left in float


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `benchmarks.accuracy_control` prints for its arguments."""
    images = load_images(args)
    scores = []
    for name in args.model_name or DEMO_VARIANTS:
        model = load_checkpoint(name, DEMO_FOLDER / f"{name}.pth").model
        scores.append(score_network(name, model, images, args.max_drop))
        scores.append(score_network(f"{name}, ill-conditioned", ill_conditioned(model), images, args.max_drop))
    return {
        "images": len(images.scored),
        "calibration_images": len(images.calibration),
        "validation_images": len(images.validation),
        "max_drop": args.max_drop,
        "scores": scores,
        "nncf": import_nncf().__version__,
        "versions": versions(),
    }


def load_images(args: argparse.Namespace) -> Images:
    """Return the demo's scenes, the train split divided into images that calibrate and images that validate."""
    root = ensure_scenes(args.cache_dir or default_cache_dir())
    train = CityscapesSplit(root, "train", args.train_images)
    if not 0 < args.validation_images < len(train):
        raise UserError(
            f"--validation-images {args.validation_images}: this leaves no images to validate or none to calibrate. "
            f"Give a positive number below that of the train images, {len(train)}."
        )
    validation = evenly_spaced(len(train), args.validation_images).tolist()
    return Images(
        calibration=Subset(train, sorted(set(range(len(train))) - set(validation))),
        validation=Subset(train, validation),
        scored=CityscapesSplit(root, "val", args.images),
        size=(train.height, train.width),
    )


def score_network(network: str, model: FFNet, images: Images, max_drop: float) -> NetworkScore:
    """Write the FP32 file of a network and the INT8 files of both tools, and score all of them."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, images, max_drop, Path(folder))
        scores = evaluate({name: OnnxBackend(path) for name, path in files.items()}, images.scored, RUNTIME)
        layers = layer_names(onnx.load(files[FP32]).graph)
        quantized, controlled = (quantized_operations(onnx.load(files[name]).graph) for name in (NNCF, CONTROLLED))
    return NetworkScore(
        network=network,
        fp32=scores.miou(FP32),
        project=scores.miou(PROJECT),
        nncf=scores.miou(NNCF),
        controlled=scores.miou(CONTROLLED),
        operations=len(quantized),
        in_float=tuple(layer for node, layer in layers.items() if node in quantized - controlled),
    )


def write_files(model: FFNet, images: Images, max_drop: float, folder: Path) -> dict[str, Path]:
    """Return the paths of the FP32 file and of the INT8 files that both tools make of the network."""
    fp32_file = folder / "fp32.onnx"
    export_float(model, images.size, fp32_file)
    sim = quantize(model, images.calibration, runtime=RUNTIME)
    files = {FP32: fp32_file, PROJECT: export(sim, images.size, folder / "project", {}) / MODEL_FILE}
    for name, proto in quantize_with_nncf(onnx.load(fp32_file), images, max_drop).items():
        files[name] = folder / f"{name}.onnx"
        onnx.save(proto, files[name])
    return files


def quantize_with_nncf(proto: onnx.ModelProto, images: Images, max_drop: float) -> dict[str, onnx.ModelProto]:
    """Return the FP32 network as NNCF quantizes it without and with accuracy control."""
    # NNCF prints its progress on stdout, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        nncf = import_nncf()
        batches = [{INPUT_TENSOR: batch.numpy()} for batch in calibration_batches(images.calibration, SILENT)]
        return {
            NNCF: nncf.quantize(proto, nncf.Dataset(batches)),
            CONTROLLED: nncf.quantize_with_accuracy_control(
                proto,
                nncf.Dataset(batches),
                nncf.Dataset(range(len(images.validation))),
                functools.partial(validation_miou, images.validation),
                max_drop=max_drop,  # absolute, in the unit of `validation_miou`
            ),
        }


def validation_miou(images: Dataset[Sample], proto: onnx.ModelProto, indices: Iterable[int]) -> float:
    """Return the mIoU in percent of a network that NNCF tries on some of the images, by ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.onnx"
        onnx.save(proto, path)
        return evaluate({NNCF: OnnxBackend(path)}, Subset(images, list(indices)), SILENT).miou(NNCF)


def quantized_operations(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the nodes that compute on quantized values."""
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {node.name for node in graph.node if node.op_type not in COPYING and not dequantized.isdisjoint(node.input)}


def layer_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Return {node: name of its layer} of a float network; a node without weights has only its own name."""
    weights = {tensor.name for tensor in graph.initializer if tensor.name.endswith(".weight")}
    return {
        node.name: next((name.removesuffix(".weight") for name in node.input if name in weights), node.name)
        for node in graph.node
    }


def import_nncf() -> ModuleType:
    """Return NNCF, kept from sending usage data to its makers, which it does without asking."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # NNCF does without the package
    import nncf

    return nncf
