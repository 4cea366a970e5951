"""Compare the INT8 mIoU of this project's export with that of ONNX Runtime's static quantization.

    python -m benchmarks.accuracy                                   # a few minutes on two cores
    python -m benchmarks.accuracy --images 4 --calibration-images 4 --json

Both tools start from the same FP32 networks, the demo's and ill-conditioned copies of them, and calibrate on the same
images of the train split. ONNX Runtime then runs all files on the same images of the val split. The baseline is used as
its documentation advises: preprocessed FP32 file, QDQ, int8 weights with a scale per channel, uint8 activations.
"""

import argparse
import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from datasets.cityscapes import CityscapesSplit
from datasets.streetscenes.scenes import ensure_scenes
from demo.ill_conditioned import ill_conditioned
from ffnet.backends import FP32
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.evaluation.loop import calibration_batches, evaluate
from ffnet.evaluation.runtime import Runtime
from ffnet.inputs import DEMO_FOLDER
from ffnet.model import FFNet
from ffnet.onnx.export import export, export_float
from ffnet.onnx.formats import MODEL_FILE
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantsim import quantize
from ffnet.quantization.sites import INPUT_TENSOR
from ffnet.report.console import format_table
from ffnet.report.result import versions
from ffnet.variants import DEMO_VARIANTS

PROJECT = "ffnet_quanteval"
BASELINES = ("MinMax", "Entropy", "Percentile")  # names of onnxruntime.quantization.CalibrationMethod
RUNTIME = Runtime(batch_size=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mIoU of every network in FP32 and quantized by both tools."""
    args = parse_args(argv)
    root = ensure_scenes(args.cache_dir)
    images = CityscapesSplit(root, "val", args.images)
    calibration_images = CityscapesSplit(root, "train", args.calibration_images)
    mious = {}
    for name in args.model_name or DEMO_VARIANTS:
        model = load_checkpoint(name, DEMO_FOLDER / f"{name}.pth").model
        mious[name] = compare(model, images, calibration_images)
        mious[f"{name}, ill-conditioned"] = compare(ill_conditioned(model), images, calibration_images)
    result = {
        "images": len(images),
        "calibration_images": len(calibration_images),
        "miou": mious,
        "versions": versions(),
    }
    print(json.dumps(result, indent=1) if args.json else format_result(result))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this network; default both")
    parser.add_argument("--images", type=int, metavar="N", help="number of val images to score; default all")
    parser.add_argument("--calibration-images", type=int, metavar="N", help="number of train images; default all")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def compare(model: FFNet, images: CityscapesSplit, calibration_images: CityscapesSplit) -> dict[str, float]:
    """Return the mIoU in percent of the FP32 network, of this project's export and of the baselines."""
    size = images.height, images.width
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp32_file = folder / "fp32.onnx"
        export_float(model, size, fp32_file)
        sim = quantize(model, calibration_images, runtime=RUNTIME)
        files = {FP32: fp32_file, PROJECT: export(sim, size, folder / PROJECT, {}) / MODEL_FILE}
        for method in BASELINES:
            files[method] = folder / f"{method}.onnx"
            quantize_with_baseline(fp32_file, files[method], method, calibration_images)
        scores = evaluate({name: OnnxBackend(file) for name, file in files.items()}, images, RUNTIME)
    return {name: scores.miou(name) for name in files}


class CalibrationReader(quantization.CalibrationDataReader):
    """Give ONNX Runtime's quantization the batches that this project calibrates on, in the same order."""

    def __init__(self, images: CityscapesSplit) -> None:
        self.batches = iter(calibration_batches(images, RUNTIME))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by the name of the network's input; None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT_TENSOR: batch.numpy()}


def quantize_with_baseline(source: Path, target: Path, method: str, images: CityscapesSplit) -> None:
    """Write the INT8 file that onnxruntime.quantization makes of the FP32 file `source`."""
    prepared = target.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()), quiet_logging():
        quant_pre_process(source, prepared)
        quantization.quantize_static(
            prepared,
            target,
            CalibrationReader(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
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


def format_result(result: dict[str, Any]) -> str:
    """Return the mIoU as a table with a row per network."""
    columns = (FP32, PROJECT, *BASELINES)
    rows = [("mIoU %", *columns)]
    rows += [(network, *(f"{mious[name]:.2f}" for name in columns)) for network, mious in result["miou"].items()]
    return "\n".join(
        (
            f"All files run by ONNX Runtime {result['versions']['onnxruntime']} on {result['images']} val images, "
            f"calibrated on {result['calibration_images']} train images",
            f"{PROJECT}: cross-layer equalization and TF-Enhanced; others: onnxruntime.quantization.quantize_static",
            format_table(rows),
        )
    )


if __name__ == "__main__":
    main()
