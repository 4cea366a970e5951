"""The measurements of `benchmarks.accuracy`."""

import argparse
import contextlib
import importlib.metadata
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch.utils.data import Subset

from datasets.cityscapes import CityscapesSplit, image_name
from demo.ill_conditioned import ill_conditioned
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.chips import CHIPS, DEFAULT_CHIP
from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation import metrics
from ffnet.evaluation.backends import FP32, INT8_NPU
from ffnet.evaluation.loop import calibration_batches, evaluate
from ffnet.file_names import MODEL_FILE
from ffnet.model import FFNet
from ffnet.npu.backend import NpuBackend
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.export import export, export_float
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantsim import quantize
from ffnet.quantization.sites import INPUT_TENSOR
from ffnet.results.result import versions
from ffnet.run.inputs import DEMO_FOLDER
from ffnet.run.npu import evenly_spaced
from ffnet.system.errors import UserError
from ffnet.variants import DEMO_VARIANTS

PROJECT = "ffnet_quanteval"
BASELINES = ("MinMax", "Entropy", "Percentile")  # names of onnxruntime.quantization.CalibrationMethod
RUNTIME = Runtime(batch_size=1)
W8A8 = "W8A8"
WEIGHTS = {  # bits of the weights, and their type in onnxruntime.quantization; activations have 8 bits
    W8A8: (8, quantization.QuantType.QInt8),
    "W4A8": (4, quantization.QuantType.QInt4),
}


@dataclass(frozen=True)
class Images:
    """The images on which all files are calibrated and scored."""

    calibration: CityscapesSplit
    scored: CityscapesSplit
    npu: np.ndarray  # indices of the scored images that the NPU runs


@dataclass(frozen=True)
class File:
    """One ONNX file of a network."""

    bit_widths: str  # a key of WEIGHTS, or FP32
    tool: str  # that quantized it: PROJECT or one of BASELINES; or FP32
    path: Path

    @property
    def name(self) -> str:
        """Name that no other file of the network has."""
        return f"{self.tool} {self.bit_widths}"


@dataclass(frozen=True)
class NpuScore:
    """What the NPU computed for a file."""

    npu_miou: float | None = None  # percent; None if the NPU did not run the file
    cpu_nodes: tuple[str, ...] = ()  # names of the nodes that ran on the CPU
    failure: str | None = None  # why the file can't be compiled or run


@dataclass(frozen=True)
class FileScore:
    """The mIoU of a file in percent."""

    network: str
    bit_widths: str  # a key of WEIGHTS, or FP32
    tool: str
    miou: float  # by ONNX Runtime on the CPU, on all scored images
    cpu_miou: float  # the same, on the images that the NPU runs
    npu_miou: float | None
    cpu_nodes: tuple[str, ...]
    failure: str | None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `benchmarks.accuracy` prints for its arguments."""
    root = ensure_scenes(args.cache_dir or default_cache_dir())
    scored = CityscapesSplit(root, "val", args.images)
    images = Images(
        calibration=CityscapesSplit(root, "train", args.calibration_images),
        scored=scored,
        npu=evenly_spaced(len(scored), args.npu_images) if args.npu_images else np.empty(0, np.int64),
    )
    scores = []
    for name in args.model_name or DEMO_VARIANTS:
        model = load_checkpoint(name, DEMO_FOLDER / f"{name}.pth").model
        scores += score_network(name, model, images)
        scores += score_network(f"{name}, ill-conditioned", ill_conditioned(model), images)
    return {
        "images": len(images.scored),
        "calibration_images": len(images.calibration),
        "miou": mious(scores),
        "npu": npu_result(scores, images),
        "versions": versions(),
    }


def mious(scores: list[FileScore]) -> dict[str, dict[str, float]]:
    """Return {network: {tool: mIoU of the W8A8 file on all images}}."""
    table: dict[str, dict[str, float]] = {}
    for score in scores:
        if score.bit_widths in (FP32, W8A8):
            table.setdefault(score.network, {})[score.tool] = score.miou
    return table


def npu_result(scores: list[FileScore], images: Images) -> dict[str, Any] | None:
    """Return the scores with what they were measured on; None without the NPU."""
    if not len(images.npu):
        return None
    return {
        "chip": DEFAULT_CHIP,
        "version": importlib.metadata.version("onnxruntime-qnn"),
        "images": [image_name(images.scored.images[index]) for index in images.npu],
        "scores": scores,
    }


def score_network(network: str, model: FFNet, images: Images) -> list[FileScore]:
    """Write all files of a network and score each on the CPU and on the NPU."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, images.calibration, Path(folder))
        scores = evaluate({file.name: OnnxBackend(file.path) for file in files}, images.scored, RUNTIME)
        return [score_file(network, file, scores.confusion_matrices, images) for file in files]


def write_files(model: FFNet, images: CityscapesSplit, folder: Path) -> list[File]:
    """Write the FP32 network and, for each pair of bit widths, the file of every tool."""
    size = images.height, images.width
    fp32_file = folder / "fp32.onnx"
    export_float(model, size, fp32_file)
    files = [File(FP32, FP32, fp32_file)]
    for bit_widths, (bits, weight_type) in WEIGHTS.items():
        sim = quantize(model, images, QuantizationConfig(param_bw=bits), RUNTIME)
        files.append(File(bit_widths, PROJECT, export(sim, size, folder / bit_widths, {}) / MODEL_FILE))
        for method in BASELINES:
            path = folder / f"{method}-{bit_widths}.onnx"
            quantize_with_baseline(fp32_file, path, method, weight_type, images)
            files.append(File(bit_widths, method, path))
    return files


def score_file(network: str, file: File, matrices: Mapping[str, np.ndarray], images: Images) -> FileScore:
    """Return the scores of a file; `matrices`: confusion matrices (images, 19, 19) on the CPU, by name of the file."""
    of_file = matrices[file.name]
    npu = run_on_npu(file.path, images) if len(images.npu) else NpuScore()
    return FileScore(
        network=network,
        bit_widths=file.bit_widths,
        tool=file.tool,
        miou=100 * metrics.mean_iou(of_file.sum(0)),
        cpu_miou=100 * metrics.mean_iou(of_file[images.npu].sum(0)),
        **vars(npu),
    )


def run_on_npu(path: Path, images: Images) -> NpuScore:
    """Score a file on the emulated NPU; nodes that it refuses run on the CPU."""
    target = NpuTarget(path, CHIPS[DEFAULT_CHIP], fallback=True)
    try:
        with NpuBackend(target, torch.get_num_threads()) as backend:
            runtime = replace(RUNTIME, batch_size=len(backend.processes))
            scores = evaluate({INT8_NPU: backend}, Subset(images.scored, images.npu.tolist()), runtime)
    except UserError as error:
        return NpuScore(failure=str(error).replace(f"{path.parent}/", ""))
    return NpuScore(scores.miou(INT8_NPU), backend.session.cpu_nodes)


class CalibrationReader(quantization.CalibrationDataReader):
    """Give ONNX Runtime's quantization the batches that this project calibrates on, in the same order."""

    def __init__(self, images: CityscapesSplit) -> None:
        self.batches = iter(calibration_batches(images, RUNTIME))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by the name of the network's input; None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT_TENSOR: batch.numpy()}


def quantize_with_baseline(
    source: Path, target: Path, method: str, weight_type: quantization.QuantType, images: CityscapesSplit
) -> None:
    """Write the quantized file that onnxruntime.quantization makes of the FP32 file `source`."""
    prepared = target.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()), quiet_logging():
        quant_pre_process(source, prepared)
        quantization.quantize_static(
            prepared,
            target,
            CalibrationReader(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=weight_type,
            activation_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep onnxruntime.quantization from logging each of its steps to the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
