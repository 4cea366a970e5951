"""INT8 mIoU of this project's export beside ONNX Runtime's own static quantization, all run by ONNX Runtime.

    python -m benchmarks.accuracy                                   # some minutes on two cores
    python -m benchmarks.accuracy --images 4 --calibration-images 4 --json

Both tools start from the same FP32 networks, the demo's and ill-conditioned ones that compute the same, and calibrate
on the same images of the train split; all are scored on the same images of the val split. The peer gets what its
documentation advises: the preprocessed FP32 ONNX file, QDQ, weights int8 a channel, activations uint8.
"""

import argparse
import contextlib
import io
import json
import logging
import tempfile
from pathlib import Path

import torch

from datasets.cityscapes import CityscapesSplit
from datasets.streetscenes import ensure_scenes
from demo.ill_conditioned import ill_conditioned
from ffnet import checkpoint, evaluate, metrics, quantize, report
from ffnet.biases import fit_biases
from ffnet.cache import default_cache_dir
from ffnet.execute import OnnxNetwork
from ffnet.export import INPUT, MODEL, export, write_fp32
from ffnet.variants import DEMO_VARIANTS, VARIANTS

DEMO = Path(__file__).parents[1] / "demo"
CPU = torch.device("cpu")
PEERS = ("MinMax", "Entropy", "Percentile")  # onnxruntime.quantization.CalibrationMethod's names
OURS = "ours"


def main(argv=None):
    args = parse_args(argv)
    root = ensure_scenes(args.cache_dir)
    scored = CityscapesSplit(root, "val", args.images)
    calibration = CityscapesSplit(root, "train", args.calibration_images)
    results = {}
    for name in args.model_name or DEMO_VARIANTS:
        model = checkpoint.load_model(VARIANTS[name], DEMO / f"{name}.pth").model
        for title, network in ((name, model), (f"{name}, ill-conditioned", ill_conditioned(model))):
            results[title] = compare(network, scored, calibration)
    result = {"scored": len(scored), "calibrated": len(calibration), "miou": results, "versions": versions()}
    print(json.dumps(result, indent=1) if args.json else table(result))
    return result


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="only this one; default both")
    parser.add_argument("--images", type=int, metavar="N", help="of val to score; default all")
    parser.add_argument("--calibration-images", type=int, metavar="N", help="of train to calibrate on; default all")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def compare(model, scored, calibration):
    """{pass: mIoU in percent} of the FP32 network, our INT8 and the peer's, executed on the `scored` images."""
    size = scored.height, scored.width
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_fp32(model, size, folder / "fp32.onnx")
        sim = quantize.quantize(model, quantize.Recipe(), calibration_inputs(calibration))
        fit_biases(sim)
        passes = {
            "FP32": OnnxNetwork(folder / "fp32.onnx"),
            OURS: OnnxNetwork(export(sim, size, folder / OURS, {}) / MODEL),
        }
        for method in PEERS:
            quantize_with_peer(folder / "fp32.onnx", folder / f"{method}.onnx", method, calibration)
            passes[method] = OnnxNetwork(folder / f"{method}.onnx")
        scores = evaluate.sweep(passes, evaluate.loader(scored, 1, 0, CPU), CPU)
    return {name: 100 * float(metrics.mean_iou(scores.total(name))) for name in passes}


def calibration_inputs(images):
    """Normalized float32 batches of one image, which both tools see in the same order."""
    for image, _ in images:
        yield evaluate.normalize(image[None])


def quantize_with_peer(source, target, method, calibration):
    """Writes the INT8 file that onnxruntime.quantization makes of the FP32 file `source`."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = calibration_inputs(calibration)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    prepared = target.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()), quiet_logging():
        quant_pre_process(source, prepared)
        quantization.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )


@contextlib.contextmanager
def quiet_logging():
    """The peer logs each of its steps to the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def versions():
    import onnxruntime

    return report.versions() | {"onnxruntime": onnxruntime.__version__}


def table(result):
    """The figures as aligned text, a model a line."""
    passes = ("FP32", OURS, *PEERS)
    rows = [("mIoU %", *passes)]
    rows += [(title, *(f"{mious[name]:.2f}" for name in passes)) for title, mious in result["miou"].items()]
    return "\n".join(
        (
            f"INT8 executed by ONNX Runtime {result['versions']['onnxruntime']}: {result['scored']} images of val, "
            f"calibrated on {result['calibrated']} of train",
            "ours: cross-layer equalization and TF-Enhanced; the others: onnxruntime.quantization.quantize_static",
            report.columns(rows),
        )
    )


if __name__ == "__main__":
    main()
