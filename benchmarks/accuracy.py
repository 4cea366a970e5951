"""Compare the mIoU of this project's quantized export with that of ONNX Runtime's static quantization.

    python -m benchmarks.accuracy                    # up to 45 minutes on two cores
    python -m benchmarks.accuracy --npu-images 0     # a few minutes; does not need onnxruntime-qnn

Both tools quantize the same FP32 networks, the demo's and ill-conditioned copies of them, and calibrate on the same
images of the train split. ONNX Runtime then runs all files on the same images of the val split, and Qualcomm's NPU,
emulated, on some of them. The baseline is used as its documentation advises: preprocessed FP32 file, QDQ, signed
weights with a scale per channel, uint8 activations.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.inputs import DEMO_FOLDER, option_parser
from datasets.cityscapes import CityscapesSplit
from demo.ill_conditioned import ill_conditioned
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.chips import CHIPS, DEFAULT_CHIP, check_npu_package
from ffnet.config import MODEL_FILE, QuantizationConfig, Runtime
from ffnet.evaluation.loading import evenly_spaced, normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.scores import FP32, NPU
from ffnet.model import FFNet
from ffnet.npu.backend import NpuBackend
from ffnet.npu.worker import NpuTarget
from ffnet.onnx.export import EXPORTER, export
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantize import quantize
from ffnet.quantization.sites import INPUT_TENSOR
from ffnet.system.errors import UserError
from ffnet.system.text import count, format_table, list_names
from ffnet.variants import DEMO_VARIANTS

PROJECT = "ffnet_quanteval"
BASELINES = ("MinMax", "Entropy", "Percentile")  # names of onnxruntime.quantization.CalibrationMethod
RUNTIME = Runtime(batch_size=1)
WEIGHTS = {  # bits of the weights, and their type in onnxruntime.quantization; activations have 8 bits
    "W8A8": (8, quantization.QuantType.QInt8),
    "W4A8": (4, quantization.QuantType.QInt4),
}


@dataclass(frozen=True)
class Images:
    """The images on which all files are calibrated and scored."""

    calibration: CityscapesSplit
    scored: CityscapesSplit
    npu: CityscapesSplit | None  # the scored images that the NPU runs; None to run nothing on the NPU


Mious = dict[tuple[str, int], float]  # {("CPU" or "NPU", number of images): mIoU in percent}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the mIoU of every network in FP32 and quantized by both tools."""
    parser = option_parser("accuracy", __doc__)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this network; default both")
    parser.add_argument("--images", type=int, metavar="N", help="number of val images to score; default all")
    parser.add_argument("--calibration-images", type=int, metavar="N", help="number of train images; default all")
    npu_help = "number of these val images, spread evenly, that the NPU runs; 0: without the NPU (default: %(default)s)"
    parser.add_argument("--npu-images", type=int, default=8, metavar="N", help=npu_help)
    args = parser.parse_args(argv)
    if args.npu_images:
        check_npu_package()
    logging.disable(logging.WARNING)  # onnxruntime.quantization logs each of its steps
    root = ensure_scenes(default_cache_dir())
    scored = CityscapesSplit(root, "val", args.images)
    npu = scored.select(evenly_spaced(len(scored), args.npu_images).tolist()) if args.npu_images else None
    images = Images(CityscapesSplit(root, "train", args.calibration_images), scored, npu)
    rows: list[tuple[str, ...]] = [("mIoU %", "", "run by", "images", FP32, PROJECT, *BASELINES)]
    for name in args.model_name or DEMO_VARIANTS:
        model = load_checkpoint(name, DEMO_FOLDER / f"{name}.pth").model
        rows += measure_network(name, model, images)
        rows += measure_network(f"{name}, ill-conditioned", ill_conditioned(model), images)
    print(f"Calibrated on {count(len(images.calibration), 'train image')}; NPU: emulated, {DEFAULT_CHIP}")
    print(format_table(rows))


def measure_network(name: str, model: FFNet, images: Images) -> list[tuple[str, ...]]:
    """Write all files of a network, score each on the CPU and on the NPU, and return the rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, images.calibration, Path(folder))
        mious = {key: score_file(path, images, f"{name}, {' '.join(key)}") for key, path in files.items()}
    return [
        (name, bits, runner, str(number), *(f"{mious[key][runner, number]:.2f}" for key in file_keys(bits)))
        for bits in WEIGHTS
        for runner, number in mious[FP32, FP32]
    ]


def file_keys(bits: str) -> list[tuple[str, str]]:
    """Return the keys of the files with these bit widths, after that of the FP32 file."""
    return [(FP32, FP32), *((bits, tool) for tool in (PROJECT, *BASELINES))]


def write_files(model: FFNet, images: CityscapesSplit, folder: Path) -> dict[tuple[str, str], Path]:
    """Write the FP32 network and, for each pair of bit widths, the file of every tool."""
    files = {(FP32, FP32): folder / "fp32.onnx"}
    torch.onnx.export(model, (torch.zeros(1, 3, *images.size),), str(files[FP32, FP32]), **EXPORTER)
    for bit_widths, (bits, weight_type) in WEIGHTS.items():
        network = quantize(model, images, QuantizationConfig(param_bw=bits), RUNTIME)
        files[bit_widths, PROJECT] = export(network.sim, images.size, folder / bit_widths, {}) / MODEL_FILE
        for method in BASELINES:
            path = files[bit_widths, method] = folder / f"{method}-{bit_widths}.onnx"
            quantize_with_baseline(files[FP32, FP32], path, method, weight_type, images)
    return files


def score_file(path: Path, images: Images, title: str) -> Mious:
    """Return the mIoU of a file on the CPU and on the NPU (nan if it fails), and print what the NPU refuses."""
    backend = OnnxBackend(path)
    splits = [images.scored, *([images.npu] if images.npu else [])]
    mious = {("CPU", len(split)): evaluate({title: backend}, split, RUNTIME).miou(title) for split in splits}
    if images.npu is None:
        return mious
    mious["NPU", len(images.npu)] = float("nan")
    processes = torch.get_num_threads()
    try:
        with NpuBackend(NpuTarget(path, CHIPS[DEFAULT_CHIP], fallback=True), processes) as npu:
            scores = evaluate({NPU: npu}, images.npu, replace(RUNTIME, batch_size=processes))
            mious["NPU", len(images.npu)] = scores.miou(NPU)
            if nodes := npu.session.cpu_nodes:
                print(f"{title}: {count(len(nodes), 'node')} on the CPU, {list_names(nodes)}")
    except UserError as error:
        print(f"{title}: {error}")
    return mious


class CalibrationReader(quantization.CalibrationDataReader):
    """Give ONNX Runtime's quantization the images that this project calibrates on, in the same order."""

    def __init__(self, images: CityscapesSplit) -> None:
        self.inputs = (normalize(images[index][0][None]).numpy() for index in range(len(images)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next image by the name of the network's input; None at the end."""
        image = next(self.inputs, None)
        return None if image is None else {INPUT_TENSOR: image}


def quantize_with_baseline(
    source: Path, target: Path, method: str, weight_type: quantization.QuantType, images: CityscapesSplit
) -> None:
    """Quantize the FP32 file `source` with onnxruntime.quantization and write it to `target`."""
    prepared = target.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
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


if __name__ == "__main__":
    __spec__ = __file__ = None  # keeps the NPU's processes from importing this module, and torch with it
    main()
