"""Measure ratios of what the stages of an evaluation cost, each pair alternately in one run.

    python -m benchmarks.speed [--json] [--model-name NAME] [--images N] [--rounds N]

The weights are random, and the images are rendered at 1024x2048. All numbers are medians over the rounds.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aimet_torch.quantsim import QuantizationSimModel
from PIL import Image

from benchmarks import baseline
from benchmarks.inputs import first_image, option_parser, random_model, write_checkpoint, write_images
from benchmarks.program import run_program
from benchmarks.timing import (
    Seconds,
    describe_machine,
    markdown,
    measure_alternately,
    median_ratio,
    medians,
    synchronized_clock,
)
from datasets.cityscapes import CityscapesSplit
from ffnet.config import FLOAT_MODEL_FILE, MODEL_FILE, QuantizationConfig, Runtime
from ffnet.evaluation.compilation import PreparedBackends, compiler_problem, prepare_backends
from ffnet.evaluation.loading import load_batches
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.postprocessing import confusion_matrices, predict
from ffnet.evaluation.scores import FP32, SIMULATED
from ffnet.labels import CITYSCAPES
from ffnet.model import FFNet
from ffnet.onnx.export import export
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantize import quantize
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize

CLASSES = len(CITYSCAPES.classes)
RATIOS = {  # ratio -> the two calls
    "simulated_over_fp32": ("simulated", "fp32"),
    "aimet_over_fp32": ("aimet", "fp32"),
    "scoring_over_fp32": ("scoring", "fp32"),
    "loading_over_decoding": ("loading", "decoding"),
    "loop_over_stages": ("loop", "stages"),
    "run_over_baseline": ("run", "baseline run"),
    "onnx_fp32_over_fp32": ("onnx_fp32", "fp32"),
    "onnx_int8_over_fp32": ("onnx_int8", "fp32"),
}
UPPER_BOUNDS = {  # ratio -> largest allowed value, for 40S_dBBB on two CPU cores
    "simulated_over_fp32": 1.15,
    "scoring_over_fp32": 0.20,
    "loading_over_decoding": 1.20,
    "loop_over_stages": 1.10,
    "run_over_baseline": 0.15,
    "onnx_int8_over_fp32": 0.35,
    "peak_gb": 3.0,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the ratios and the times behind them."""
    parser = option_parser("speed", __doc__, "segmentation_ffnet40S_dBBB_mobile")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--images", type=int, default=4, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    args = parser.parse_args(argv)
    runtime = Runtime("cuda:0" if torch.cuda.is_available() else "cpu", batch_size=1, num_workers=1, quiet=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder, args.images)
        model = random_model(args.model_name).to(runtime.device)
        seconds = measure(images, model, runtime, folder, args.rounds)
        ratios = {ratio: median_ratio(seconds[a], seconds[b]) for ratio, (a, b) in RATIOS.items() if a in seconds}
        if not runtime.on_gpu:
            ratios["peak_gb"] = peak_gb(folder, args.model_name)
    details = {f"{name}, s": value for name, value in medians(seconds).items()}
    machine = describe_machine(runtime.device)
    outcome = {"machine": machine, "model": args.model_name, "ratios": ratios, "details": details}
    print(json.dumps(outcome) if args.json else format_outcome(outcome))


@torch.no_grad()
def measure(images: CityscapesSplit, model: FFNet, runtime: Runtime, folder: Path, rounds: int) -> Seconds:
    """Return the seconds of every call, by round."""
    size = images.size
    network = quantize(model, images.select([0]), runtime=runtime)
    sim = build_quantsim(equalize(model), QuantizationConfig())
    backends = {FP32: model, SIMULATED: network.lowered}
    prepared = prepare_backends(backends, runtime, compiled=compiler_problem(runtime.device) is None)
    image, label = first_image(images, runtime.device), images[0][1][None].to(runtime.device)

    def clock() -> float:
        return synchronized_clock(runtime.device)

    begin = clock()
    fp32_logits, logits = (backend(image) for backend in prepared.backends.values())
    predict(fp32_logits, size, prepared.kernel)
    compilation = clock() - begin

    def run() -> None:
        quantize(model, images, runtime=runtime)
        evaluate(prepared, images, runtime)

    calls = {
        "fp32": lambda: prepared.backends[FP32](image),
        "simulated": lambda: prepared.backends[SIMULATED](image),
        "aimet": lambda: network.sim.model(image),
        "calibration on one image": lambda: calibrate(sim, [image]),
        "scoring": lambda: confusion_matrices(label, predict(logits, size, prepared.kernel), CLASSES),
        **(onnx_calls(network.sim, image, folder) if not runtime.on_gpu else {}),
    }
    loading = {
        "loading": lambda: list(load_batches(images, Runtime(batch_size=1, num_workers=1))),
        "decoding": lambda: [np.asarray(Image.open(path)) for path in (*images.images, *images.targets)],
    }
    whole_runs = {"run": run, "baseline run": lambda: baseline.run(images, model, network.sim, runtime.device)}
    seconds = measure_alternately(calls, rounds, clock)
    seconds |= measure_alternately(loading, rounds, time.process_time)
    seconds |= measure_loop(images, prepared, runtime, rounds)
    seconds |= measure_alternately(whole_runs, max(1, rounds // 2), clock, warm_up=False)
    return seconds | {"compilation": [compilation]}


def onnx_calls(sim: QuantizationSimModel, image: torch.Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return calls of the exported FP32 and INT8 files in ONNX Runtime."""
    exported = export(sim, image.shape[2:], folder / "onnx", {})
    fp32, int8 = (OnnxBackend(exported / name) for name in (FLOAT_MODEL_FILE, MODEL_FILE))
    return {"onnx_fp32": lambda: fp32(image), "onnx_int8": lambda: int8(image)}


def measure_loop(images: CityscapesSplit, prepared: PreparedBackends, runtime: Runtime, rounds: int) -> Seconds:
    """Return the wall times of evaluation loops, and what the backends and scoring take of each."""
    seconds: Seconds = {"loop": [], "stages": []}
    repeated = images.select([*range(len(images))] * 3)
    for _ in range(rounds):
        begin = time.perf_counter()
        scores = evaluate(prepared, repeated, runtime)
        seconds["loop"].append(time.perf_counter() - begin)
        seconds["stages"].append(sum(scores.seconds.values()) + scores.scoring_seconds)
    return seconds


def peak_gb(root: Path, model_name: str) -> float:
    """Return the peak memory, in 10**9 bytes, of a process that makes a whole run on two images, batch size 1."""
    checkpoint = write_checkpoint(model_name, root / "weights.pth")
    options: list[str | Path] = ["--dataset-path", root, "--checkpoint", checkpoint, "--model-name", model_name]
    return run_program([*options, "--limit", "2", "--batch-size", "1", "--num-workers", "1"]).peak_bytes / 1e9


def format_outcome(outcome: dict[str, Any]) -> str:
    """Return the outcome as two Markdown tables."""
    bounds = {name: f"at most {value:.2f}" for name, value in UPPER_BOUNDS.items()}
    ratios = [(name, f"{value:.3f}", bounds.get(name, "")) for name, value in outcome["ratios"].items()]
    details = [(name, f"{value:.3f}") for name, value in outcome["details"].items()]
    lines = [f"{outcome['model']}, 1024x2048, batch size 1: {outcome['machine']}", ""]
    lines += [*markdown([("ratio", "measured", "bound"), *ratios]), "", *markdown([("what", ""), *details])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
